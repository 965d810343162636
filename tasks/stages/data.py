"""The rows of a run, one artifact per subtask and split, and how difficult the subtasks are."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from statistics import fmean

from prefect import task
from prefect.cache_policies import NO_CACHE

from memmcl import seeds
from memmcl.curriculum.difficulty import DifficultyReport, difficulties, order_subtasks
from memmcl.errors import DataError
from memmcl.store import ArtifactRef, StageSettings, cache_key
from memmcl.suite.configured import read_splits
from memmcl.suite.examples import Example, to_table
from memmcl.suite.splits import Splits
from tasks.run.runtime import Run, publish_once, read_rows
from tasks.stages.anchors import Anchors, anchors_key, choose_anchors, publish_anchors
from tasks.ui.artifacts import show_faults
from tasks.ui.logs import log

STAGE_VERSION = 1
SHOWN_FAULTS = 20
SplitRefs = dict[str, dict[str, ArtifactRef]]
"""Subtask -> split -> artifact."""


def data_digests(splits: Splits) -> dict[str, dict[str, str]]:
    """Return the digest of every split of every subtask."""
    return {name: {split: splits.digest(name, split) for split in rows} for name, rows in splits.parts.items()}


def rows_digest(splits: Splits, anchors: str | None) -> str:
    """Return the digest of all rows; anchors: the key of the anchor rows."""
    return seeds.digest([data_digests(splits), anchors])


def split_ref(splits: Splits, subtask: str, split: str) -> ArtifactRef:
    """Return the reference under which a split is published, whether it is or not."""
    return ArtifactRef(kind="split", key=_key("split", _describe(splits, subtask, split)), name=f"{subtask} {split}")


@task(name="splits", task_run_name="splits", cache_policy=NO_CACHE)
def publish_splits(run: Run) -> tuple[SplitRefs, ArtifactRef | None, ArtifactRef]:
    """Publish one artifact per subtask and split, the anchor rows, and what was read: digests, and what was left out.

    Pinned anchor rows are used as they are: rows that change in one subtask must not retrain other experts.
    """
    splits = read_splits(run.config)
    anchors = choose_anchors(run, splits) if run.pinned.anchors is None else None
    check_unchanged(run, splits, anchors)
    refs: SplitRefs = {}
    for name, by_split in splits.parts.items():
        refs[name] = {split: _publish(run, splits, name, split) for split in by_split}
        log().info("%s: %s", name, ", ".join(f"{len(rows)} {split}" for split, rows in by_split.items()))
    for reason, count in splits.dropped.items():
        log().info("left out: %d %s", count, reason)
    for fault in splits.faults[:SHOWN_FAULTS]:
        log().warning("left out: %s", fault)
    show_faults(run, splits.faults)
    document = {"dropped": splits.dropped, "digests": data_digests(splits)}  # for the report, hours later
    files = {"data.json": json.dumps(document).encode()}
    key = _key("data", document)
    read = publish_once(run, "data", key, name="rows read", files=lambda: files, metrics=splits.dropped)
    return refs, publish_anchors(run, splits, anchors), read


def check_unchanged(run: Run, splits: Splits, anchors: Anchors | None) -> None:
    """Raise DataError if the rows changed since the run was opened: its id depends on them."""
    if run.rows and rows_digest(splits, anchors_key(run, anchors)) != run.rows:
        raise DataError(f"the rows changed while run {run.id[:8]} was starting; start it again")


def longest_first(run: Run, train: Mapping[str, ArtifactRef]) -> list[str]:
    """Return the subtasks by the mean length of their training rows, the longest, which train longest, first."""
    rows = {name: read_rows(run, ref) for name, ref in train.items()}
    lengths = {name: fmean(len(row.text) + len(row.answer) for row in examples) for name, examples in rows.items()}
    return sorted(lengths, key=lambda name: (-lengths[name], name))


def measure_difficulty(
    run: Run, train: Mapping[str, Sequence[Example]]
) -> tuple[dict[str, DifficultyReport], tuple[str, ...]]:
    """Return the difficulty of every subtask, from training rows, and the curriculum's order, the easiest first."""
    reports = difficulties([run.subtask(name) for name in train], train, run.config.curriculum.weights)
    return reports, order_subtasks({name: report.difficulty for name, report in reports.items()})


def _key(kind: str, described: Mapping[str, object]) -> str:
    return cache_key(kind, inputs=(), config=described, stage_version=STAGE_VERSION, seed=0)


def _describe(splits: Splits, subtask: str, split: str) -> dict[str, object]:
    return {"subtask": subtask, "part": split, "rows": splits.digest(subtask, split)}


def _publish(run: Run, splits: Splits, subtask: str, split: str) -> ArtifactRef:
    ref, rows = split_ref(splits, subtask, split), splits.parts[subtask][split]
    return publish_once(
        run,
        ref.kind,
        ref.key,
        name=ref.name,
        files=lambda: {"rows.parquet": to_table(rows)},
        settings=StageSettings(_describe(splits, subtask, split)),
        metrics={"rows": len(rows)},
    )
