"""Adapters in the resident backbone, each with the warm start that it was trained on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

from memmcl.backbone.forward import Backbone
from memmcl.backbone.resident import resident
from memmcl.errors import ModelError
from memmcl.merge.build import added
from memmcl.store import ArtifactRef, Refs
from memmcl.suite.prompts import Prompter
from tasks.run.runtime import Run, load_adapter, open_store

WARM, JOINT, WEAK_LORA = "warm", "joint", "weak"
"""Adapters that are no expert of one subtask, as coefficients and results call them; WARM is a kind of artifact too."""


def warm_start_of(run: Run, trained: ArtifactRef) -> ArtifactRef | None:
    """Return the warm start that an expert is a delta on; None for a delta on the plain base."""
    if trained.kind != "expert":
        return None
    return next((ref for ref in open_store(run).load(trained).inputs if ref.kind == WARM), None)


def base_adapters_of(run: Run, experts: Refs) -> dict[str, ArtifactRef]:
    """Return the experts' warm start as {WARM: reference}, empty without one; ModelError if theirs differ."""
    starts = {warm_start_of(run, ref) for ref in experts.values()}
    if len(starts) > 1:
        raise ModelError("the experts have different warm starts, so that their task vectors do not add up")
    (start,) = starts or {None}
    return {WARM: start} if start is not None else {}


def adapted_model(run: Run, trained: ArtifactRef) -> AbstractContextManager[tuple[Backbone, Prompter]]:
    """Put one adapter, and its warm start, into the resident backbone; see `folded`."""
    return folded(run, [ref for ref in (trained, warm_start_of(run, trained)) if ref is not None])


@contextmanager
def folded(run: Run, adapters: Sequence[ArtifactRef]) -> Iterator[tuple[Backbone, Prompter]]:
    """Add the adapters to the resident backbone's weights; put the base back at the end."""
    backbone, prompter = resident(run.model)
    with added(backbone, {str(number): load_adapter(run, ref) for number, ref in enumerate(adapters)}):
        yield backbone, prompter
