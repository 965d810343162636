"""Opening a run: what it is, that it is held by one process only, the Ray it works on, the memory it takes."""

from __future__ import annotations

import logging
import math
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil
import ray
from prefect.runtime import deployment

from memmcl import seeds
from memmcl.backbone.load import resolve_device, resolve_dtype
from memmcl.config import RayConfig, RunConfig
from memmcl.errors import ConfigError, MemmclError, ServiceDied, ServiceError, shown
from memmcl.experts import train
from memmcl.merge.table import check_search
from memmcl.store import Lease, Manifest
from memmcl.urls import first_line
from tasks import anchors, contexts, data, evaluate, history, merge, plans, references, report, weak
from tasks.anchors import anchors_key, lend_anchors
from tasks.data import data_digests, rows_digest
from tasks.experts import warm_key
from tasks.inputs import Inputs, find_inputs
from tasks.journal import Pinned, note_run
from tasks.local_ray import joined_ray, local_ray
from tasks.progress import choose_display
from tasks.repair import drop_damaged_records
from tasks.runtime import Base, Run, closure_of, open_store, resident_prompter

logger = logging.getLogger(__name__)
STAGE_VERSIONS = {
    "split": data.STAGE_VERSION,
    "anchors": anchors.STAGE_VERSION,
    "expert": train.STAGE_VERSION,
    "reference": references.REFERENCE_VERSION,
    "search": plans.STAGE_VERSION,
    "unified": merge.UNIFIED_VERSION,
    "gate": contexts.GATE_VERSION,
    "weak": weak.STAGE_VERSION,
    "evaluation": evaluate.EVALUATION_VERSION,
    "report": report.REPORT_VERSION,
}
"""A finished run of older stages is another run."""


def open_run(config: RunConfig, inputs: Inputs | None = None, pins: Callable[[Run], Pinned] | None = None) -> Run:
    """Return the run that data, base and store make; they are found first where `inputs` does not bring them.

    The run's id is the digest of the configuration (but for where it runs), the rows, the base's weights, and the
    anchor rows and the warm start that its experts are trained with. pins: says which of these an earlier run made.

    Raises:
        MemmclError: anything that is missing or wrong, before any work begins.
    """
    search = config.search
    check_search(search.method, search.parameters, search.genes, search.bounds[0])
    inputs = inputs or find_inputs(config)
    found, layers, splits = inputs.base, inputs.layers, inputs.splits
    device = resolve_device(config.model.device, config.ray.gpus_per_worker)
    adapted = layers if config.experts.adapt_layers == "all" else int(config.experts.adapt_layers.removeprefix("top-"))
    base = Base(
        name=found.name, digest=found.digest, licence=found.licence, device=device,
        dtype=resolve_dtype(config.model.dtype, device), layers=layers, split=max(0, layers - adapted),
    )  # fmt: skip
    run = Run(id="", config=config, base=base, store=inputs.store.spec, command=history.started_by())
    prompter = resident_prompter(run)
    for name in config.data.subtasks:
        prompter.check(run.subtask(name))
    run = run.model_copy(update={"pinned": pins(run) if pins else Pinned()})
    lent = anchors_key(run, lend_anchors(run, splits) if run.pinned.anchors is None else None)
    identity = {
        "config": config.what(),
        "data": data_digests(splits),
        "base": base.model_dump(mode="json", exclude={"licence"}),
        "stages": STAGE_VERSIONS,
        "anchors": lent,
        "warm": warm_key(run, splits),
    }
    return run.model_copy(update={"id": seeds.digest(identity), "rows": rows_digest(splits, lent)})


def check_place(config: RunConfig) -> None:
    """Refuse relative places in a deployment's run: its worker runs it in a folder of its own that is removed.

    Raises:
        ConfigError: the store, or where rows lie, is relative.
    """
    if not deployment.id:
        return
    for key, place in {"store.url": config.store.url, **_places_of_rows(config)}.items():
        if "://" not in place and not Path(place).is_absolute():
            raise ConfigError(
                f"{key} of a deployment must be absolute, got {shown(place)}: a worker runs flows in folders that it "
                "removes; give s3://bucket/folder or an absolute path"
            )


def _places_of_rows(config: RunConfig) -> dict[str, str]:
    """Return setting -> file or directory that rows are read from."""
    data, texts = config.data, config.experts.anchor_texts
    places = {} if data.source == "embedded" else {"data.source": data.source}
    places |= {"experts.anchor_texts": texts} if texts else {}
    own = {f"data.custom.{number}.data": subtask.data for number, subtask in enumerate(data.custom)}
    for setting, source in {**own, **{f"data.sources.{name}": source for name, source in data.sources.items()}}.items():
        files = ("path",) if source.dataset else ("path", "train", "weak", "test")
        places |= {f"{setting}.{name}": place for name in files if (place := getattr(source, name))}
    return places


def finished(run: Run) -> Manifest | None:
    """Return the run's last artifact if the run is finished and whole, with all that it was made from.

    Damage is logged as one warning; the stages of the run make again what is damaged.
    """
    found = closure_of(open_store(run), run.id)
    if not found.problems:
        return found.root
    first, *others = found.problems
    more = f", and {len(others)} more" if others else ""
    logger.warning(
        "run %s was finished, but is damaged and will be mended: %s: %s%s", run.id[:8], first.where, first.what, more
    )
    return None


def refuse_second(run: Run) -> None:
    """Raise LeaseHeld when another live process works on the same run, before anything is started for this one."""
    Lease(open_store(run), run.id, {}).refuse_if_held()


@contextmanager
def held(run: Run) -> Iterator[Lease]:
    """Hold the run's lease; runs that died with it are closed in the history.

    Raises:
        LeaseHeld: another live process works on the same run.
    """
    store = open_store(run)
    with Lease(store, run.id, {"flow_run_id": history.root_flow_run_id()}) as lease:
        history.close_abandoned(lease)
        for path in drop_damaged_records(store, run.id):
            logger.warning("%s: damaged, removed", path)
        note_run(store, run)
        try:
            yield lease
        except ServiceDied:  # tasks on Ray ended without a word
            history.close_interrupted()
            raise
        except Exception:
            raise
        except BaseException:  # a signal or a cancellation: the same
            history.close_interrupted()
            raise


@contextmanager
def ray_session(cfg: RayConfig) -> Iterator[None]:
    """Join the Ray cluster at `cfg.address`, or start one here that ends with the block. One that was joined stays.

    Raises:
        ServiceError: the cluster cannot be reached, or a local one cannot start.
        ServiceDied: it is gone in the midst of the work.
    """
    if ray.is_initialized():
        yield
        return
    if cfg.address:
        _check_reachable(cfg.address)
    choose_display()
    in_main = threading.current_thread() is threading.main_thread()
    on_sigterm = signal.getsignal(signal.SIGTERM)
    with ExitStack() as stack:
        try:
            if cfg.address:
                stack.enter_context(joined_ray(address=cfg.address, logging_level="warning", namespace="memmcl"))
            else:
                os.environ.setdefault("RAY_idle_worker_killing_time_threshold_ms", "600000")  # they hold the model
                stack.enter_context(local_ray(
                    num_cpus=math.ceil(cfg.workers * cfg.cpus_per_worker), include_dashboard=False,
                    logging_level="warning", object_store_memory=256 * 2**20, namespace="memmcl",
                ))  # fmt: skip
        except MemmclError:
            raise
        except Exception as error:  # a node that is not up in time is one of no class of its own
            where = f"reach the Ray cluster at {cfg.address}" if cfg.address else "start a local Ray"
            raise ServiceError(f"cannot {where}: {first_line(error)}; check ray.address and free memory") from error
        if in_main:
            signal.signal(signal.SIGTERM, on_sigterm)  # Ray's own would keep Prefect from cancelling in good order
        if not cfg.address:
            _check_gpus(cfg)
        yield


def _check_gpus(cfg: RayConfig) -> None:
    found = float(ray.cluster_resources().get("GPU", 0))
    if found < cfg.gpus_per_worker:
        raise ServiceError(
            f"ray.gpus_per_worker is {cfg.gpus_per_worker:g}, but Ray sees {found:g} GPUs on this machine; "
            "set it to 0, or name a cluster with GPUs as ray.address"
        )


def _check_reachable(address: str, seconds: float = 10.0) -> None:
    """Look whether something listens at host:port; Ray itself would try for a quarter of an hour."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal():
        return  # "auto" and the like: Ray finds out at once
    try:
        socket.create_connection((host.strip("[]"), int(port)), seconds).close()
    except (OSError, OverflowError) as error:
        raise ServiceError(
            f"nothing answers at ray.address {address} ({error}); start that cluster, correct the address, "
            "or leave it out for a local Ray"
        ) from error


class PeakMemory:
    """Samples the memory of this process and all below it (proportional set size, GiB) while the block runs."""

    def __init__(self, every: float = 3.0) -> None:
        self.gib = 0.0
        self._every = every
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="peak-memory", daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        while True:
            self.gib = max(self.gib, tree_memory())
            if self._stop.wait(self._every):
                return


def tree_memory() -> float:
    """Return the memory in GiB that this process and all below it take, shared pages counted once."""
    total = 0
    me = psutil.Process()
    for process in [me, *me.children(recursive=True)]:
        try:
            info = process.memory_full_info()
            total += getattr(info, "pss", info.uss)
        except (psutil.NoSuchProcess, psutil.AccessDenied, FileNotFoundError):
            continue
    return total / 2**30
