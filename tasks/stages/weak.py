"""Pseudo-labelled weak rows: each expert labels unlabelled texts of its subtask (METHOD.md 'Weak data', pseudo)."""

from __future__ import annotations

from typing import Any

from prefect import State

from memmcl.errors import DataError
from memmcl.evaluate.asking import make_probe, offsets_of
from memmcl.evaluate.pseudo import keep_confident, label_rows
from memmcl.store import ArtifactRef
from memmcl.suite.examples import to_table
from tasks.run.models import adapted_model
from tasks.run.runtime import Run, read_rows, reuse_or_make, stage_task
from tasks.ui.logs import log

STAGE_VERSION = 1


@stage_task("pseudo labels", run_name="pseudo labels {subtask} {split}", retries=1)
def label_weak(run: Run, subtask: str, split: str, expert: ArtifactRef, texts: ArtifactRef) -> State[ArtifactRef]:
    """Label a subtask's weak or selection texts with its expert; keep the most confident, as many as configured."""
    cfg = run.config
    keep = {"weak": cfg.data.weak_rows, "selection": cfg.data.selection_rows}[split]

    def make() -> tuple[dict[str, bytes], dict[str, Any]]:
        asked, rows = run.subtask(subtask), read_rows(run, texts)
        with adapted_model(run, expert) as model:
            probe = make_probe(cfg.evaluation, model, asked, rows)
            labelled = label_rows(probe, offsets_of(cfg.evaluation, probe))
        kept = keep_confident(rows, labelled, keep=keep, is_tuple=asked.is_tuple)
        if not kept:
            raise DataError(
                f"the expert of {subtask} gave no readable answer to {len(rows)} texts, so there are no weak rows; "
                "train it longer (experts.steps), or use labelled weak rows (data.weak_source)"
            )
        log().info("%s: %d of %d texts labelled by the expert are weak rows", subtask, len(kept), len(rows))
        return {"rows.parquet": to_table(kept)}, {"rows": len(kept), "texts": len(rows)}

    return reuse_or_make(
        run,
        "weak",
        name=f"{split} {subtask}",
        inputs=[expert, texts],
        config={"weak_rows": keep, "evaluation": cfg.evaluation.key(), "model": run.model.key()},
        stage_version=STAGE_VERSION,
        make=make,
    )
