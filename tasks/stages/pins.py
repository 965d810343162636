"""The artifacts that a retrain takes over from the champion, so that new rows of one subtask retrain one expert."""

from __future__ import annotations

from collections.abc import Iterable

from memmcl.experts.train import STAGE_VERSION
from memmcl.store import ArtifactRef
from memmcl.suite.examples import Example, normalised
from memmcl.suite.splits import Splits
from tasks.run.journal import Pinned
from tasks.run.models import WARM
from tasks.run.runtime import Run, open_store, read_rows
from tasks.stages.anchors import anchors_of, read_anchors, reads_anchors, tests_of
from tasks.stages.experts import warm_config
from tasks.stages.promotion import Champion
from tasks.ui.logs import log


def pins_of(run: Run, champion: Champion | None, splits: Splits) -> Pinned:
    """Return the champion's anchor rows and warm start, each if this run's settings give the same.

    One that was made from a text which overlaps with a test text by now is not taken: a warning says so.
    """
    if champion is None:
        return Pinned()
    cfg, refs = run.config.experts, champion.refs
    anchors, warm = refs.get("anchors:anchor rows"), refs.get(f"{WARM}:warm start")
    return Pinned(
        anchors=anchors if anchors and reads_anchors(cfg) and _anchors_fit(run, anchors, splits) else None,
        warm=warm if warm and cfg.warm_start > 0 and _warm_fits(run, warm, splits) else None,
    )


def _anchors_fit(run: Run, pinned: ArtifactRef, splits: Splits) -> bool:
    again = "new ones are chosen, all experts retrain"
    if _damaged(run, pinned):
        log().warning("the champion's anchor rows are damaged: %s", again)
        return False
    rows = read_anchors(run, pinned)
    if anchors_of(run, rows).key != pinned.key:  # other settings, or another question
        return False
    shared = _overlapping((row for examples in rows.values() for row in examples), splits)
    if shared:
        log().warning("%d pinned anchor rows overlap with test rows now: %s", shared, again)
    return not shared


def _warm_fits(run: Run, pinned: ArtifactRef, splits: Splits) -> bool:
    again = "a new one is trained, all experts retrain"
    if _damaged(run, pinned):
        log().warning("the champion's warm start is damaged: %s", again)
        return False
    manifest = open_store(run).load(pinned)
    if (manifest.config, manifest.seed, manifest.stage_version) != (warm_config(run), run.config.seed, STAGE_VERSION):
        log().warning("the champion's warm start was trained with other settings: %s", again)
        return False
    shared = _overlapping((row for ref in manifest.inputs for row in read_rows(run, ref)), splits)
    if shared:
        log().warning("%d rows of the pinned warm start overlap with test rows now: %s", shared, again)
    return not shared


def _damaged(run: Run, pinned: ArtifactRef) -> bool:
    """Return whether the artifact, or any of the rows that it was made from, is damaged."""
    return bool(open_store(run).closure(pinned.kind, pinned.key).problems)


def _overlapping(rows: Iterable[Example], splits: Splits) -> int:
    return int(tests_of(splits).overlapping([normalised(row.text) for row in rows]).sum())
