"""What the tests of searches share: experts of random numbers, a few rows, and references of the same likelihood."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from pathlib import Path

from memmcl.adapters import format as adapter
from memmcl.search.problem import SearchProblem
from memmcl.store import ArtifactRef
from memmcl.suite.examples import to_table
from tasks.run.runtime import Run, open_store
from tasks.stages.run_artifacts import TrainedArtifacts

Published = dict[str, dict[str, ArtifactRef]]
"""By group (experts, weak, references) and subtask, an artifact."""


def publish_experts(run: Run, base: Path, rows: Mapping[str, int], broken: Collection[str] = ()) -> Published:
    """Publish, for each subtask, an expert, `rows` weak rows and a reference; `broken` experts hold a NaN."""
    from tiny import corpus, random_factors  # it loads transformers, which `problem_of` does without

    store = open_store(run)
    published: Published = {"experts": {}, "weak": {}, "references": {}}
    for number, (name, count) in enumerate(rows.items()):
        factors = random_factors(base, layers=(2, 3), seed=number)
        if name in broken:
            factors[min(factors)].b[0, 0] = math.nan
        expert = adapter.to_files(factors, base_name=run.base.name, rank=3, alpha=6.0)
        split = {"rows.parquet": to_table(corpus(name, count))}
        values = {"loglik": -1.0, "score": 0.5, "logprobs": [-2.0] * count, "choices": None}
        measured = {"expert": values, "base": {"logprobs": [-2.0 - row % 3 for row in range(count)]}}
        reference = {"reference.json": json.dumps(measured).encode()}
        of = (("expert", "experts", expert), ("split", "weak", split), ("reference", "references", reference))
        for kind, group, files in of:
            published[group][name] = store.publish(kind, f"{number:064x}", name=f"{kind} {name}", files=files).ref
    return published


def problem_of(run: Run, published: Published) -> SearchProblem:
    """Return the problem of merging what `publish_experts` published."""
    return TrainedArtifacts(**published).problem(run)
