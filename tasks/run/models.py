"""Models in the resident backbone: adapters with what they stand on, and rows that are put to them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from memmcl.backbone.forward import Backbone
from memmcl.backbone.resident import resident
from memmcl.errors import ModelError
from memmcl.merge.build import Merger
from memmcl.merge.genome import Coefficients
from memmcl.store import ArtifactRef
from memmcl.suite.prompts import Prompter
from tasks.run.runtime import Run, load_adapter, load_manifest

WARM = "warm"
"""The warm start: a kind of artifact, and its name in tables of coefficients."""


def standing_on(run: Run, trained: ArtifactRef) -> ArtifactRef | None:
    """Return the warm start that an expert is a delta on; None for whatever is one on the plain base."""
    if trained.kind != "expert":
        return None
    return next((ref for ref in load_manifest(run, trained).inputs if ref.kind == WARM), None)


def start_of(run: Run, experts: Mapping[str, ArtifactRef]) -> dict[str, ArtifactRef]:
    """Return what all these experts stand on, as {WARM: reference}; empty where that is the plain base.

    Raises:
        ModelError: they do not stand on the same.
    """
    found = {standing_on(run, ref) for ref in experts.values()}
    if len(found) > 1:
        raise ModelError("the experts stand on different warm starts, so that their task vectors do not add up")
    start = next(iter(found), None)
    return {WARM: start} if start is not None else {}


def with_start(coefficients: Coefficients, start: Mapping[str, object], blocks: int) -> dict[str, tuple[float, ...]]:
    """Return coefficients over experts with those of the warm start, if there is one: 1 in all blocks."""
    return {**coefficients, **dict.fromkeys(start, (1.0,) * blocks)}


@contextmanager
def adapted_model(run: Run, trained: ArtifactRef) -> Iterator[tuple[Backbone, Prompter]]:
    """Put one adapter, and what it stands on, into the resident backbone; put the base back at the end."""
    with folded(run, [ref for ref in (trained, standing_on(run, trained)) if ref is not None]) as model:
        yield model


@contextmanager
def folded(run: Run, adapters: Sequence[ArtifactRef]) -> Iterator[tuple[Backbone, Prompter]]:
    """Hold the sum of the adapters in the resident backbone's weights; put the base back at the end."""
    backbone, prompter = resident(run.model)
    loaded = {str(number): load_adapter(run, ref) for number, ref in enumerate(adapters)}
    merger = Merger(backbone, loaded, blocks=1)
    try:
        merger.apply(dict.fromkeys(loaded, (1.0,)))
        yield backbone, prompter
    finally:
        merger.reset()
