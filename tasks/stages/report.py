"""The run's last artifacts: the report with its tables, and, if configured, the model as a plain directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect import State, task
from prefect.cache_policies import NO_CACHE

from memmcl.api.model_file import model_file_of
from memmcl.api.runs import MODEL_FILE
from memmcl.backbone.resident import find_base, resident_prompter
from memmcl.merge.export import write_merge
from memmcl.report import model_card, render_html, write_tables
from memmcl.store import ArtifactRef, StageSettings
from tasks.run.leftovers import work_folder
from tasks.run.runtime import Run, load_adapter, open_store, reuse_or_make, stage_task
from tasks.stages.results import gather
from tasks.stages.run_artifacts import RunArtifacts
from tasks.ui.artifacts import show_results
from tasks.ui.logs import log

EXPORT_VERSION = 1
REPORT_VERSION = 2


@stage_task("export", run_name="export full model")
def export_full(run: Run, unified: ArtifactRef) -> State[ArtifactRef]:
    """Publish the unified model as a plain Hugging Face directory."""

    def make() -> tuple[dict[str, Path], dict[str, Any]]:
        base = find_base(run.base, run.config.model.revision)
        directory = scratch / "model"
        directory.mkdir()
        adapters, ones = {"unified": load_adapter(run, unified)}, {"unified": (1.0,)}
        write_merge(directory, base, adapters, ones, dtype=run.base.dtype, split=run.base.split)
        return {path.name: path for path in sorted(directory.iterdir())}, {}

    with work_folder("export") as scratch:
        return reuse_or_make(
            run,
            "model",
            name="unified model, full weights",
            inputs=[unified],
            config={"model": run.model.key()},
            stage_version=EXPORT_VERSION,
            make=make,
        )


@task(name="report", task_run_name="report", cache_policy=NO_CACHE)
def publish_report(run: Run, artifacts: RunArtifacts, started: float, peak_memory_gb: float) -> ArtifactRef:
    """Gather the results, draw the report, and publish both as the run's last artifact: it marks the run finished.

    A report that is in the store stays: the run was finished, and something else of it was damaged.
    """
    store = open_store(run)
    stored = store.find("run", run.id)
    if stored is not None:
        log().info("report: in the store, reused")
        return stored.ref
    results = gather(run, artifacts, started, peak_memory_gb)
    refs = {f"{ref.kind}:{ref.name}": ref for ref in artifacts.refs()}
    model_file = model_file_of(results, run.base, run.config, store, refs, resident_prompter(run.model))
    files: dict[str, bytes] = {
        "report.html": render_html(results).encode(),
        "results.json": results.model_dump_json(indent=1).encode(),
        "base.json": run.base.model_dump_json().encode(),
        MODEL_FILE: model_file.model_dump_json(indent=1).encode(),
        "adapter.md": model_card(results, base_model=run.base.name, adapter=True).encode(),
        "model.md": model_card(results, base_model=run.base.name, adapter=False).encode(),
        **write_tables(results),
    }
    unified, base = results.mean_of("unified"), results.mean_of("base")
    assert unified is not None and base is not None
    log().info("unified %.3f ± %.3f, base %.3f ± %.3f", unified.mean, unified.se, base.mean, base.se)
    show_results(results)
    return store.publish(
        "run",
        run.id,
        name=run.config.name,
        files=files,
        inputs=artifacts.refs(),
        settings=StageSettings(run.config.what(), run.config.seed, REPORT_VERSION),
        seconds=results.wall_seconds,
        metrics={
            "unified": unified.mean,
            "unified_se": unified.se,
            "base": base.mean,
            "base_se": base.se,
            "flow_run_id": results.run.flow_run_id,
        },
    ).ref
