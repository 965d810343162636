"""What a search is about: all that a candidate's score depends on, small enough to travel to every worker."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache

from safetensors.torch import load as load_tensors

from memmcl import seeds
from memmcl.adapters.format import Adapter
from memmcl.adapters.load import load_published
from memmcl.backbone.resident import ModelSpec
from memmcl.config import EvaluationConfig, SearchConfig
from memmcl.evaluate.teacher_forced import Distributions
from memmcl.search.document import ReferenceValues
from memmcl.store import ArtifactRef, Refs, Store
from memmcl.suite.examples import Example, from_table
from memmcl.suite.subtasks import Subtask

WEAK, SELECTION = "weak", "selection"
REFERENCE, DISTRIBUTIONS = "reference.json", "expert.safetensors"


@dataclass(frozen=True)
class SearchProblem:
    """Experts of one base, and the rows that their merges are scored on.

    store: as `Store.spec` describes it. subtasks: by name of the rows, what they are asked. experts: by name.
    base_adapters: those that every merge adds as they are, as a warm start that the experts are deltas on. weak,
    selection: rows by name; selection rows decide between finalists, and may be missing. references: by name of the
    rows, what the reference model reaches on them. seed: of the run; strategies and random masks derive theirs from it.
    """

    store: dict[str, str | None]
    model: ModelSpec
    search: SearchConfig
    evaluation: EvaluationConfig
    seed: int
    subtasks: Mapping[str, Subtask]
    experts: Refs
    weak: Refs
    references: Refs
    selection: Refs = field(default_factory=dict)
    base_adapters: Refs = field(default_factory=dict)

    @property
    def mask_seed(self) -> int:
        """The seed of the random masks of merge methods."""
        return seeds.derive(self.seed, "masks")

    def open_store(self) -> Store:
        """Return the store; one connection per process."""
        return store_at(self.store)

    def inputs(self, names: list[str]) -> list[ArtifactRef]:
        """Return the artifacts that a search over these subtasks depends on."""
        groups = (self.experts, self.weak, self.references, self.selection)
        return [refs[name] for refs in groups for name in names if name in refs]

    def adapters(self) -> dict[str, Adapter]:
        """Return the LoRA factors of all experts and base adapters, by name."""
        store, refs = self.open_store(), {**self.experts, **self.base_adapters}
        return {name: load_published(store, ref) for name, ref in refs.items()}

    def read_rows(self, which: str, name: str) -> list[Example] | None:
        """Return the weak or selection rows of this name; None where there are none."""
        ref = {WEAK: self.weak, SELECTION: self.selection}[which].get(name)
        return None if ref is None else from_table(self.open_store().read(ref, "rows.parquet"))


def store_at(spec: Mapping[str, str | None]) -> Store:
    """Return the store that `Store.spec` described; one connection per process."""
    return _store(tuple(sorted(spec.items())))


@lru_cache(maxsize=4)
def _store(spec: tuple[tuple[str, str | None], ...]) -> Store:
    return Store.from_spec(dict(spec))


def read_reference(store: Store, ref: ArtifactRef, rows: str) -> tuple[ReferenceValues, Distributions | None]:
    """Return the expert's values on weak or selection rows, and its distributions there, if they are kept."""
    document = json.loads(store.read(ref, REFERENCE))
    values = ReferenceValues.model_validate((document if rows == WEAK else document[rows])["expert"])
    if DISTRIBUTIONS not in store.load(ref).blobs:
        return values, None
    tensors = load_tensors(store.read(ref, DISTRIBUTIONS))
    return values, Distributions(tensors[f"{rows}.ids"].long(), tensors[f"{rows}.logprobs"].float())
