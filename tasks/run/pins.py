"""What a retrain takes over from the champion, so that new rows of one subtask retrain one expert."""

from __future__ import annotations

from collections.abc import Iterable

from memmcl.experts.train import STAGE_VERSION
from memmcl.store import ArtifactRef, Manifest
from memmcl.suite.examples import Example, normalised
from memmcl.suite.splits import Splits
from tasks.run.journal import Pinned
from tasks.run.models import WARM
from tasks.run.runtime import Run, load_manifest, log, open_store, read_rows
from tasks.stages.anchors import anchors_of, read_anchors, reads_anchors, tests_of
from tasks.stages.experts import warm_config
from tasks.stages.promotion import Champion


def pins_of(run: Run, champion: Champion | None, splits: Splits) -> Pinned:
    """Return the champion's anchor rows and warm start, each where this run would make it by the same settings.

    One is left behind, with a warning, when a text that it was made from overlaps with a test text by now.
    """
    if champion is None:
        return Pinned()
    return Pinned(anchors=_anchors(run, champion, splits), warm=_warm(run, champion, splits))


def _anchors(run: Run, champion: Champion, splits: Splits) -> ArtifactRef | None:
    pinned = champion.refs.get("anchors:anchor rows")
    if pinned is None or not reads_anchors(run.config.experts):
        return None
    if _damaged(run, pinned):
        log().warning("the champion's anchor rows are damaged: new ones are lent, all experts retrain")
        return None
    rows = read_anchors(run, pinned)
    if anchors_of(run, rows).key != pinned.key:  # other settings, or another question
        return None
    shared = _overlapping((row for found in rows.values() for row in found), splits)
    if shared:
        log().warning(
            "%d pinned anchor rows overlap with test rows now: new ones are lent, all experts retrain", shared
        )
        return None
    return pinned


def _warm(run: Run, champion: Champion, splits: Splits) -> ArtifactRef | None:
    pinned = champion.refs.get(f"{WARM}:warm start")
    if pinned is None or run.config.experts.warm_start == 0:
        return None
    if _damaged(run, pinned):
        log().warning("the champion's warm start is damaged: a new one is made, all experts retrain")
        return None
    manifest = load_manifest(run, pinned)
    if not _would_be(run, manifest):
        log().warning("the champion's warm start was made by other settings: a new one is made, all experts retrain")
        return None
    rows = (row for ref in manifest.inputs for row in read_rows(run, ref))
    shared = _overlapping(rows, splits)
    if shared:
        log().warning(
            "%d rows of the pinned warm start overlap with test rows now: a new one is made, all experts retrain",
            shared,
        )
        return None
    return pinned


def _damaged(run: Run, pinned: ArtifactRef) -> bool:
    """Return whether the artifact, or any of the rows that it was made from, is damaged."""
    return bool(open_store(run).closure(pinned.kind, pinned.key).problems)


def _would_be(run: Run, manifest: Manifest) -> bool:
    """Return whether this run would make the warm start in the same way, whatever its rows."""
    made_by = (manifest.config, manifest.seed, manifest.stage_version)
    return made_by == (warm_config(run), run.config.seed, STAGE_VERSION)


def _overlapping(rows: Iterable[Example], splits: Splits) -> int:
    contents = [normalised(row.text) for row in rows]
    return int(tests_of(splits).overlapping(contents).sum())
