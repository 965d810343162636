"""The report: one HTML file with everything in it, without scripts and without anything fetched."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

import jinja2
import yaml
from markupsafe import Markup

from memmcl.report.plots import common as plots
from memmcl.report.plots import experts as plots_experts
from memmcl.report.plots import merge as plots_merge
from memmcl.report.plots import search as plots_search
from memmcl.report.plots.figure import COLOURS
from memmcl.report.results import Document, Results, parse_results
from memmcl.report.schema import Comparison, ExpertResult, SearchResult, SubtaskScore
from memmcl.report.transfer import interference, kept
from memmcl.report.verdict import ceiling, leaders, outcome, plus_minus, signed, verdict

DARK = {
    "ink": "#e6e9ec",
    "muted": "#9aa3ab",
    "line": "#343a41",
    "paper": "#16191d",
    "unified": "#45c2b1",
    "rival": "#ec9a52",
    "merge": "#86aee6",
    "baseline": "#8d959d",
    "expert": "#b79be6",
    "bad": "#ff8a80",
}
"""the colours of `figure.COLOURS` on dark paper"""

TRAININGS = {
    "joint": "a rival: one LoRA on the train rows of all subtasks",
    "weak": "a rival: one LoRA on the weak rows of all subtasks",
    "warm": "the start that all experts stand on, on the rows of all subtasks",
}
"""what a training is that is no subtask's expert"""

GLOSSARY = (
    ("expert", "A LoRA adapter trained on one subtask; its score on that subtask is the ceiling of a merge."),
    ("interference", "What an expert changes on the subtasks of others; in a merge it works against their experts."),
    ("task vector", "What an expert adds to the base weights; a merge is a weighted sum of task vectors."),
    ("genome", "The coefficients of a merge, one per expert (or group model) and layer block."),
    ("candidate", "A genome with its scores; its fitness is its mean retention on the weak set."),
    ("group model", "The winner of a stage-1 search: the experts of one group of subtasks, merged."),
    ("unified model", "The winner of the stage-2 search: the group models, merged into one model."),
    ("weak set", "The few rows of a subtask that a search may look at; disjoint from training and test rows."),
    ("retention", "Score of a merge divided by the score of that subtask's expert; 1 means nothing was lost."),
    ("NAI", "(merge − base) / (expert − base): the share of what training gained that the merge keeps."),
    ("difficulty", "A weighted sum of a subtask's meta features, each scaled to [0, 1] over the suite."),
    ("curriculum", "The subtasks in ascending difficulty; a context takes demonstrations in that order."),
    ("context gate", "Picks the context of a subtask by its score on the weak set; test rows play no part."),
    ("calibrated", "Label scores corrected for what the model prefers whatever the input says."),
    ("balanced accuracy", "The mean of the recalls of all labels; a constant answer scores one over their number."),
    ("±", "One standard error: bootstrap over test rows. It holds no variance of training or of the search."),
)


def render_html(document: Document) -> str:
    """Return the report of `document` as one self-contained HTML page, for light and dark paper and print.

    Everything that comes from the document is escaped. The same document gives the same page.

    Raises:
        DataError: `document` does not follow the schema.
    """
    results = parse_results(document)
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(
        pm=plus_minus, signed=signed, duration=duration, markup=Markup, p_value=p_value, number=number
    )
    source = files("memmcl.report").joinpath("template.html.j2").read_text(encoding="utf-8")
    return environment.from_string(source).render(
        r=results,
        verdict=verdict(results),
        tiles=_tiles(results),
        best={column: leaders(results, column) for column in (None, *(s.name for s in results.subtasks))},
        kept=kept(results),
        kept_names=[n for n in results.curriculum_names() if any(part.subtask == n for part in results.retention)],
        interference=interference(results),
        outcome=_outcome,
        hint=_hint,
        remarks=_remarks,
        unreadable=sum(score.rejected for score in results.scores),
        answered=sum(score.n for score in results.scores),
        groups=list(dict.fromkeys(subtask.group for subtask in results.subtasks)),
        search_rows=[_search_row(search) for search in results.searches],
        finalists=[search for search in results.searches if search.finalists],
        trainings=[_training(expert) for expert in results.experts],
        shown={
            "validation": any(e.validation or e.best_step is not None for e in results.experts),
            "constant": any(e.constant_weak_score is not None for e in results.experts),
            "gpu": any(e.gpu_memory_gb is not None for e in results.experts),
        },
        below_constant=_below_constant(results),
        config=yaml.safe_dump(results.run.config, sort_keys=False, allow_unicode=True),
        features=list(dict.fromkeys(part.feature for part in results.curriculum.features)),
        scaled={(part.subtask, part.feature): part for part in results.curriculum.features},
        plots={
            "mean": plots.mean_plot(results),
            "subtasks": plots.subtask_plots(results),
            "fitness": plots.fitness_plots(results),
            "fronts": plots_search.front_plots(results),
            "seconds": plots.seconds_plots(results),
            "weights": plots.weights_plot(results),
            "difficulty": plots.difficulty_plot(results),
            "contexts": plots.context_plot(results),
            "losses": plots_experts.loss_plots(results),
            "interference": plots_experts.interference_plot(results),
            "nai": plots_experts.nai_plot(results),
            "task_vectors": plots_merge.task_vectors_plot(results),
            "time": plots.time_plot(results),
        },
        glossary=GLOSSARY,
        light=COLOURS,
        dark=DARK,
    )


def duration(seconds: float) -> str:
    """Return `seconds` as "4.2 s", "3 min 05 s" or "1 h 12 min"."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def number(value: float | None) -> str:
    """Return `value` with at most four digits and thousands apart; an en dash for None."""
    if value is None:
        return "–"
    return (f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}").replace("-", "−")


def p_value(value: float | None) -> str:
    """Return "0.019", "< 0.001" or an en dash for None."""
    if value is None:
        return "–"
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _tiles(results: Results) -> list[dict[str, Any]]:
    top = ceiling(results)
    wanted = [
        "base",
        *(m.name for m in results.models if m.kind in ("unified", "rival")),
        *([top.model] if top else []),
    ]
    tiles = []
    for name in dict.fromkeys(wanted):
        model, mean = results.model_of(name), results.mean_of(name)
        if model and mean:
            tiles.append({"model": model, "mean": mean})
    return tiles


def _outcome(pair: Comparison) -> str:
    return outcome(pair.difference, pair.se)


def _hint(score: SubtaskScore) -> str:
    parts = [f"{score.metric}, n = {score.n}, {score.context}"]
    if score.balanced_accuracy is not None:
        parts.append(f"balanced accuracy {score.balanced_accuracy:.3f}")
    if score.strict_score is not None:
        parts.append(f"without tolerant parsing {score.strict_score:.3f}")
    if score.rejected:
        parts.append(f"{score.rejected} unreadable answers")
    return "; ".join(parts)


def _remarks(score: SubtaskScore) -> list[str]:
    """Return what stands under a score: the strict one where the page would show another number, unreadable answers."""
    remarks = []
    if score.strict_score is not None and plus_minus(score.strict_score) != plus_minus(score.score):
        remarks.append(f"strict {plus_minus(score.strict_score)}")
    if score.rejected:
        remarks.append(f"{score.rejected} of {score.n} unreadable")
    return remarks


def _training(expert: ExpertResult) -> dict[str, Any]:
    rows = expert.rows_per_micro_batch
    return {
        "expert": expert,
        "what": TRAININGS.get(expert.subtask, ""),
        "at_once": rows if rows is not None and rows < expert.batch_size else None,
        "loss": next((value for value in reversed(expert.loss) if value is not None), None),
        "anchor": next((value for value in reversed(expert.anchor) if value is not None), None),
    }


def _below_constant(results: Results) -> list[str]:
    """Return the trainings that answer their weak rows no better than the best constant answer does."""
    return [
        expert.subtask
        for expert in results.experts
        if expert.weak_score is not None
        and expert.constant_weak_score is not None
        and expert.weak_score <= expert.constant_weak_score
    ]


def _search_row(search: SearchResult) -> dict[str, Any]:
    winner = next((c for c in search.candidates if c.index == search.winner), None)
    seeds = [c.fitness for c in search.candidates if c.is_seed and c.fitness is not None and not c.stopped]
    return {
        "search": search,
        "winner": winner,
        "best_seed": max(seeds, default=None),
        "seeds": sum(c.is_seed for c in search.candidates),
        "failed": sum(c.fitness is None for c in search.candidates),
        "stopped": sum(c.stopped for c in search.candidates),
        "all_failed": all(c.fitness is None for c in search.candidates),
        "reused": sum(c.reused for c in search.candidates),
        "genome": [] if winner is None else list(zip(search.genes, winner.genome, strict=False)),
    }
