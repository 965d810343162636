"""What the tests of searches share: experts of random numbers, a few rows, and references of the same likelihood."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from pathlib import Path

from tiny import corpus, random_factors

from memmcl.adapters import format as adapter
from memmcl.store import ArtifactRef
from memmcl.suite.examples import to_table
from tasks.run.runtime import Run, open_store
from tasks.stages.merge import Grounds


def publish_grounds(run: Run, base: Path, rows: Mapping[str, int], broken: Collection[str] = ()) -> Grounds:
    """Publish, for each subtask, an expert, `rows` weak rows and a reference; `broken` experts hold a NaN."""
    store = open_store(run)
    found: dict[str, dict[str, ArtifactRef]] = {"experts": {}, "weak": {}, "references": {}}
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
            found[group][name] = store.publish(kind, f"{number:064x}", name=f"{kind} {name}", files=files).ref
    return Grounds(**found, selection={})
