"""Anchor rows, on which experts stay close to the base: from other subtasks, the shipped corpus, or plain texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from memmcl import seeds
from memmcl.backbone.resident import resident_prompter
from memmcl.config import ExpertsConfig
from memmcl.errors import ConfigError, DataError
from memmcl.experts.forced import LEAST, forced_rows, read_texts
from memmcl.store import ArtifactRef, StageSettings, cache_key
from memmcl.suite.configured import lenders, reading_of
from memmcl.suite.examples import Example, from_table, normalised, to_table
from memmcl.suite.faults import Faults
from memmcl.suite.overlap import Blocklist
from memmcl.suite.sources import read_sources
from memmcl.suite.splits import Splits, digest_of
from memmcl.suite.subtasks import SUBTASKS, Subtask
from memmcl.urls import public
from tasks.run.runtime import Run, cannot_remake, open_store, publish_once

STAGE_VERSION = 2
RowsBySubtask = Mapping[str, Sequence[Example]]
"""Anchor rows by the subtask that they are asked as."""


@dataclass(frozen=True)
class Anchors:
    """Anchor rows by subtask. config: of their artifact: settings, and digests of rows and questions."""

    rows: dict[str, list[Example]]
    config: dict[str, Any]

    @property
    def key(self) -> str:
        """The key of their artifact."""
        return cache_key("anchors", inputs=(), config=self.config, stage_version=STAGE_VERSION, seed=0)


def reads_anchors(cfg: ExpertsConfig) -> bool:
    """Return whether experts need anchor rows: for the anchor, or for an initialisation that reads other subtasks."""
    return cfg.anchor_weight > 0 or cfg.init == "osrm"


def choose_anchors(run: Run, splits: Splits) -> Anchors | None:
    """Return anchor rows by this run's data and settings, None where its experts need none; DataError for few texts.

    A run of one subtask has no training rows of others: then they come from the shipped corpus.
    """
    cfg = run.config.experts
    if not reads_anchors(cfg):
        return None
    if cfg.anchor_source == "train" and len(splits.parts) > 1:
        rows: RowsBySubtask = {name: parts["train"][: cfg.anchor_rows] for name, parts in sorted(splits.parts.items())}
    elif cfg.anchor_texts is not None:
        rows = _of_texts(run, cfg.anchor_texts, splits)
    else:
        rows = _of_corpus(run, splits)
    return anchors_of(run, rows)


def anchors_of(run: Run, rows: RowsBySubtask) -> Anchors:
    """Return anchor rows with all that decides what they are and how they are asked."""
    cfg, known = run.config.experts, lenders(run.config)
    kept = {name: list(examples) for name, examples in rows.items() if examples}
    digests = {name: digest_of(examples, known.get(name)) for name, examples in kept.items()}
    return Anchors(kept, {"source": cfg.anchor_source, "anchor_rows": cfg.anchor_rows, "rows": digests})


def anchors_key(run: Run, anchors: Anchors | None) -> str | None:
    """Return the key of the anchor rows that the run uses: the pinned ones, or else `anchors`; None for none."""
    used = run.pinned.anchors or anchors
    return used.key if used else None


def publish_anchors(run: Run, splits: Splits, anchors: Anchors | None) -> ArtifactRef | None:
    """Return the anchor rows that the run uses: the pinned ones, or `anchors`, which are published.

    Pinned ones that are damaged are published again; CorruptArtifact if this run's rows give others.
    """
    pinned = run.pinned.anchors
    if pinned is not None and open_store(run).find(pinned.kind, pinned.key) is None:
        anchors = choose_anchors(run, splits)
        if anchors is None or anchors.key != pinned.key:
            raise cannot_remake(run, pinned)
    elif pinned is not None or anchors is None:
        return pinned
    rows, counts = anchors.rows.values(), {name: len(rows) for name, rows in anchors.rows.items()}
    return publish_once(
        run,
        "anchors",
        anchors.key,
        name="anchor rows",
        files=lambda: {"rows.parquet": to_table([row for examples in rows for row in examples])},
        settings=StageSettings(anchors.config, stage_version=STAGE_VERSION),
        metrics={"rows": sum(counts.values()), "by_subtask": counts},
    )


def read_anchors(run: Run, ref: ArtifactRef) -> dict[str, list[Example]]:
    """Return the anchor rows by subtask."""
    rows = iter(from_table(open_store(run).read(ref, "rows.parquet")))
    counts: dict[str, int] = open_store(run).load(ref).metrics["by_subtask"]
    return {name: list(islice(rows, count)) for name, count in counts.items()}


def tests_of(splits: Splits) -> Blocklist:
    """Return the block list of the test texts of all subtasks."""
    return Blocklist.of(normalised(row.text) for parts in splits.parts.values() for row in parts["test"])


def _of_corpus(run: Run, splits: Splits) -> RowsBySubtask:
    """Return training rows of the shipped corpus, of each subtask of the catalogue whose question fits a prompt."""
    tested = tests_of(splits)
    fitting = [subtask for subtask in SUBTASKS.values() if _fits(run, subtask)]
    read = read_sources(fitting)
    count = run.config.experts.anchor_rows
    return {name: _untested(pools["train"], tested)[:count] for name, pools in sorted(read.pools.items())}


def _of_texts(run: Run, url: str, splits: Splits) -> RowsBySubtask:
    """Deal plain texts, in the order of a hash, to the run's subtasks in turn (all known ones, if it has only one)."""
    cfg, known = run.config.experts, lenders(run.config)
    names = sorted(splits.parts) if len(splits.parts) > 1 else sorted(known)
    asked = [known[name] for name in names if _fits(run, known[name])]
    faults = Faults()
    texts = read_texts(url, storage=reading_of(run.config).storage, faults=faults)
    texts = sorted(texts, key=lambda text: (seeds.digest(normalised(text)), text))
    overlapping = tests_of(splits).overlapping([normalised(text) for text in texts])
    usable = [text for text, tested in zip(texts, overlapping, strict=True) if not tested]
    least = min(LEAST, cfg.anchor_rows) * len(asked)
    if len(usable) < least:
        raise DataError(
            f"experts.anchor_texts: expected at least {least} texts for {len(asked)} subtasks, got {len(usable)} that "
            f"can be used in {public(url)} ({int(overlapping.sum())} overlap with test texts, {len(faults)} are broken "
            "rows); add texts, or take another anchor_source"
        )
    seed = run.seed("anchors")
    return {
        subtask.name: forced_rows(subtask, usable[number :: len(asked)][: cfg.anchor_rows], seed)
        for number, subtask in enumerate(asked)
    }


def _untested(rows: Sequence[Example], tested: Blocklist) -> list[Example]:
    overlapping = tested.overlapping([normalised(row.text) for row in rows])
    return [row for row, tests in zip(rows, overlapping, strict=True) if not tests]


def _fits(run: Run, subtask: Subtask) -> bool:
    try:
        resident_prompter(run.model).check(subtask)
    except ConfigError:
        return False
    return True
