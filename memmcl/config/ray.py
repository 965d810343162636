"""The section `ray`."""

from pydantic import Field

from memmcl.config.section import Place, Section


class RayConfig(Section):
    """Where work runs."""

    address: Place | None = Field(None, description="Address of a running Ray cluster; empty: a local one for this run")
    workers: int = Field(2, ge=1, description="Workers at once: experts in training, candidates in a search")
    cpus_per_worker: float = Field(1.0, gt=0, title="CPUs per worker", description="CPUs, and threads, of a worker")
    gpus_per_worker: float = Field(
        0.0, ge=0, title="GPUs per worker", description="GPUs of a worker; a share is allowed"
    )
