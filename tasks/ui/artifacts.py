"""What the Prefect UI shows of a run: name and tags, leaderboard, scores, a summary, the decision of a retrain."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from uuid import UUID

from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.client.orchestration import get_client
from prefect.runtime import flow_run

from memmcl.config import RunConfig
from memmcl.evaluate.promotion import Judgement
from memmcl.report import Results, markdown_table, plain_text, verdict
from memmcl.report.markdown import table
from memmcl.suite.faults import Fault
from memmcl.text import one_line
from memmcl.urls import public, redact

if TYPE_CHECKING:
    from tasks.run.runtime import Run


def run_name() -> str:
    """Return the name of the flow run that is about to start: the configuration's name, its data and seed."""
    parameter = flow_run.parameters.get("config") or {}
    config = parameter if isinstance(parameter, RunConfig) else RunConfig.model_validate(parameter)
    source = re.split(r"[/\\]", public(config.data.source).rstrip("/\\"))[-1]
    return f"{one_line(config.name)}: {len(config.data.subtasks)} subtasks of {source}, seed {config.seed}"


def announce(run: Run) -> None:
    """Put the run's id into the name of its flow run, and tag it by run, base and configuration name."""
    run_id = flow_run.id
    if run_id is None:
        return
    base, name = one_line(run.base.name.rpartition("/")[2]), one_line(run.config.name)
    tags = {f"run:{run.id[:8]}", f"base:{base}", f"name:{name}"}
    with get_client(sync_client=True) as client:
        now = client.read_flow_run(UUID(str(run_id)))
        client.update_flow_run(now.id, name=f"{run_name()}, run {run.id[:8]}", tags=sorted(tags | set(now.tags)))


def show_results(results: Results) -> None:
    """Show the leaderboard, the scores per subtask, and the verdict with the way to the report."""
    name, end = plain_text(results.run.name), results.run.run_id[:8]
    about = f"Models of {name} by mean test score; se is the bootstrap standard error"
    _show_table(_leaderboard(results), f"leaderboard-{end}", about)
    _show_table(_scores(results), f"scores-{end}", f"Test scores of {name} per subtask")
    about = f"The result of {name}, and where its report is"
    create_markdown_artifact(_summary(results), key=f"summary-{end}", description=about)


def show_board(run: Run, stage: str, rows: Sequence[dict[str, Any]]) -> None:
    """Show the best candidates of the searches of a stage, as they are now."""
    if rows:
        key = f"search-{re.sub('[^a-z0-9]+', '-', stage.lower())}-{run.id[:8]}"
        _show_table(rows, key, f"Best candidates of {stage} of {plain_text(run.config.name)} so far, by search")


def show_faults(run: Run, faults: Sequence[Fault]) -> None:
    """Show the rows that were left out because they cannot be used, if any."""
    if faults:
        rows = [{"place": fault.place, "kind": fault.kind, "what": redact(fault.message)} for fault in faults]
        _show_table(rows, f"faults-{run.id[:8]}", "Rows that were left out: they could not be used")


def show_changes(changes: Sequence[dict[str, Any]], against: str) -> None:
    """Show which subtasks' rows differ from the champion's."""
    _show_table(changes, "changed-rows", f"Rows per subtask, against those of the champion, run {against}")


def show_judgement(judged: Judgement, challenger: str, champion: str) -> None:
    """Show champion and challenger on the same test rows, and what the gate decided."""
    word = "promoted" if judged.promoted else "not promoted"
    heads = ["subtask", "rows", f"challenger {challenger}", f"champion {champion}", "difference"]
    rows = []
    for duel in judged.duels:
        scores = [f"{duel.challenger:.3f}", f"{duel.champion:.3f}", f"{duel.difference:+.3f} ± {duel.se:.3f}"]
        rows.append([plain_text(duel.subtask), str(duel.rows), *scores])
    rows.append(["**mean**", "", "", "", f"**{judged.difference:+.3f} ± {judged.se:.3f}**"])
    text = f"## Challenger {challenger} {word}\n\nThe challenger is {plain_text(judged.reason)}.\n\n"
    create_markdown_artifact(
        text + table(heads, rows),
        key=f"challenge-{challenger}",
        description=f"Challenger {challenger}, champion {champion}",
    )


def _show_table(rows: Sequence[dict[str, Any]], key: str, description: str) -> None:
    """Show a table; the UI reads its cells as Markdown."""
    cells = [{name: plain_text(cell) if isinstance(cell, str) else cell for name, cell in row.items()} for row in rows]
    create_table_artifact(cells, key=key, description=description)


def _leaderboard(results: Results) -> list[dict[str, Any]]:
    models = {model.name: model for model in results.models}
    ranked = sorted(results.means, key=lambda mean: -mean.mean)
    return [
        {
            "place": place,
            "model": models[mean.model].title,
            "kind": models[mean.model].kind,
            "mean": round(mean.mean, 4),
            "se": round(mean.se, 4),
            "subtasks": sum(score.model == mean.model for score in results.scores),
        }
        for place, mean in enumerate(ranked, start=1)
    ]


def _scores(results: Results) -> list[dict[str, Any]]:
    titles = {model.name: model.title for model in results.models}
    return [
        {
            "subtask": score.subtask,
            "model": titles[score.model],
            "metric": score.metric,
            "score": round(score.score, 4),
            "se": round(score.se, 4),
            "n": score.n,
            "context": score.context,
        }
        for score in sorted(results.scores, key=lambda score: (score.subtask, -score.score))
    ]


def _summary(results: Results) -> str:
    run, summary = results.run, verdict(results)
    where = f"--store {shlex.quote(run.store_url)}"
    others = "".join(f"* {plain_text(statement.text)}\n" for statement in summary.statements)
    return (
        f"## {plain_text(summary.headline)}\n\n{plain_text(summary.subtasks)}\n\n{others}\n{markdown_table(results)}\n"
        f"Base {plain_text(run.base.name)}, seed {run.seed}, {results.wall_seconds / 60:.0f} minutes, "
        f"{plain_text(results.data.source)} rows.\n\n"
        f"### The report and the model\n\n"
        f"    memmcl report {run.run_id[:8]} {where} --out report-{run.run_id[:8]}\n"
        f'    memmcl predict "The food was great, the wait was not." --run {run.run_id[:8]} {where}\n'
    )
