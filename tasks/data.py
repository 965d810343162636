"""The rows of a run, as one artifact per subtask and part."""

from __future__ import annotations

import json
from collections.abc import Mapping

from prefect import task
from prefect.cache_policies import NO_CACHE

from memmcl import seeds
from memmcl.errors import DataError
from memmcl.store import ArtifactRef, cache_key
from memmcl.suite.examples import Example, to_table
from memmcl.suite.splits import PREPARED_PARTS, Splits
from tasks.artifacts import show_faults
from tasks.inputs import read_splits
from tasks.runtime import Run, log, open_store, read_rows

STAGE_VERSION = 1
SHOWN_FAULTS = 20
SplitRefs = dict[str, dict[str, ArtifactRef]]
"""Subtask -> part -> artifact."""


def data_digests(splits: Splits) -> dict[str, dict[str, str]]:
    """Return the digest of every part of every subtask."""
    return {name: {part: splits.digest(name, part) for part in parts} for name, parts in splits.parts.items()}


def rows_digest(splits: Splits) -> str:
    """Return the digest of all rows."""
    return seeds.digest(data_digests(splits))


@task(name="splits", task_run_name="splits", cache_policy=NO_CACHE)
def publish_splits(run: Run) -> tuple[SplitRefs, ArtifactRef, ArtifactRef]:
    """Publish one artifact per subtask and part, the anchor rows, and what was read: digests, and what was left out.

    The anchor rows are those that an earlier run pinned, where there are any: rows that change in one subtask must
    not retrain the experts of the others.
    """
    config = run.config
    splits = read_splits(config)
    check_unchanged(run, splits)
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
    for fault in splits.faults[:SHOWN_FAULTS]:
        log().warning("left out: %s", fault)
    show_faults(run, splits.faults)
    read = _publish_read(run, splits)
    if run.anchors is not None:
        return refs, run.anchors, read
    lent = {name: parts["train"][: config.experts.anchor_rows] for name, parts in sorted(splits.parts.items())}
    rows = [row for name in lent for row in lent[name]]
    counts = {name: len(found) for name, found in lent.items()}
    described = describe_anchors(splits, config.experts.anchor_rows)
    return refs, _publish(run, "anchors", "anchor rows", described, rows, counts), read


def check_unchanged(run: Run, splits: Splits) -> None:
    """Refuse rows that are not those that gave the run its id.

    Raises:
        DataError: they changed since the run was opened.
    """
    if run.rows and rows_digest(splits) != run.rows:
        raise DataError(f"the rows changed while run {run.id[:8]} was starting; start it again, with those of now")


def _publish_read(run: Run, splits: Splits) -> ArtifactRef:
    """Publish what a report says of the rows: read hours later, their source may have changed."""
    said = {"dropped": splits.dropped, "digests": data_digests(splits)}
    key = _key("data", said)
    found = open_store(run).find("data", key)
    if found is not None:
        return found.ref
    files = {"data.json": json.dumps(said).encode()}
    return open_store(run).publish("data", key, name="rows read", files=files, metrics=splits.dropped).ref


def describe_anchors(splits: Splits, count: int) -> dict[str, object]:
    """Return what the anchor rows that a run lends by itself depend on."""
    return {"train": {name: splits.digest(name, "train") for name in splits.parts}, "anchor_rows": count}


def anchors_key(splits: Splits, count: int) -> str:
    """Return the key of the anchor rows that a run lends by itself."""
    return _key("anchors", describe_anchors(splits, count))


def longest_first(run: Run, train: Mapping[str, ArtifactRef]) -> list[str]:
    """Return the subtasks by the mean length of their training rows, the longest first: they take longest to train.

    Who starts the longest work first waits least at its end.
    """
    rows = {name: read_rows(run, ref) for name, ref in train.items()}
    lengths = {name: sum(len(row.text) + len(row.answer) for row in found) / len(found) for name, found in rows.items()}
    return sorted(lengths, key=lambda name: (-lengths[name], name))


def _key(kind: str, described: Mapping[str, object]) -> str:
    return cache_key(kind, inputs=(), config=described, stage_version=STAGE_VERSION, seed=0)


def _publish(
    run: Run, kind: str, name: str, described: dict[str, object], rows: list[Example] | tuple[Example, ...],
    counts: dict[str, int] | None = None,
) -> ArtifactRef:  # fmt: skip
    key = _key(kind, described)
    found = open_store(run).find(kind, key)
    if found is not None:
        return found.ref
    metrics = {"rows": len(rows), **({"by_subtask": counts} if counts else {})}
    files = {"rows.parquet": to_table(rows)}
    return open_store(run).publish(kind, key, name=name, files=files, config=described, metrics=metrics).ref
