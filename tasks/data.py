"""The rows of a run, as one artifact per subtask and part."""

from __future__ import annotations

from prefect import task
from prefect.cache_policies import NO_CACHE

from memmcl.store import ArtifactRef, cache_key
from memmcl.suite.examples import Example, to_table
from memmcl.suite.splits import PREPARED_PARTS, Splits
from tasks.inputs import read_splits
from tasks.runtime import Run, log, open_store

STAGE_VERSION = 1
SplitRefs = dict[str, dict[str, ArtifactRef]]
"""Subtask -> part -> artifact."""


def data_digests(splits: Splits) -> dict[str, dict[str, str]]:
    """Return the digest of every part of every subtask."""
    return {name: {part: splits.digest(name, part) for part in parts} for name, parts in splits.parts.items()}


@task(name="splits", task_run_name="splits", cache_policy=NO_CACHE)
def publish_splits(run: Run) -> tuple[SplitRefs, ArtifactRef]:
    """Publish one artifact per subtask and part, and the anchor rows, which are an artifact of their own."""
    config = run.config
    splits = read_splits(config)
    refs: SplitRefs = {}
    for name, parts in splits.parts.items():
        digests = {part: splits.digest(name, part) for part in PREPARED_PARTS}
        refs[name] = {
            part: _publish(run, "split", f"{name} {part}", {"subtask": name, "part": part, "rows": digests[part]}, rows)
            for part, rows in parts.items()
        }
        log().info("%s: %s", name, ", ".join(f"{len(rows)} {part}" for part, rows in parts.items()))
    for reason, count in splits.dropped.items():
        log().info("left out: %d %s", count, reason)
    lent = {name: parts["train"][: config.experts.anchor_rows] for name, parts in splits.parts.items()}
    digests = {name: splits.digest(name, "train") for name in lent}
    rows = [row for name in sorted(lent) for row in lent[name]]
    described = {"train": digests, "anchor_rows": config.experts.anchor_rows}
    counts = {name: len(lent[name]) for name in sorted(lent)}
    return refs, _publish(run, "anchors", "anchor rows", described, rows, counts)


def _publish(
    run: Run, kind: str, name: str, described: dict[str, object], rows: list[Example] | tuple[Example, ...],
    counts: dict[str, int] | None = None,
) -> ArtifactRef:  # fmt: skip
    key = cache_key(kind, inputs=(), config=described, stage_version=STAGE_VERSION, seed=0)
    found = open_store(run).find(kind, key)
    if found is not None:
        return found.ref
    metrics = {"rows": len(rows), **({"by_subtask": counts} if counts else {})}
    files = {"rows.parquet": to_table(rows)}
    return open_store(run).publish(kind, key, name=name, files=files, config=described, metrics=metrics).ref
