"""The report: one HTML file with everything in it, without scripts and without anything fetched."""

from __future__ import annotations

from collections.abc import Callable
from importlib.resources import files

import jinja2
import yaml
from markupsafe import Markup

from memmcl.report.plots import common as plots
from memmcl.report.plots import experts as plots_experts
from memmcl.report.plots import merge as plots_merge
from memmcl.report.plots import search as plots_search
from memmcl.report.plots.figure import COLOURS, Plot
from memmcl.report.results import Document, Results, parse_results
from memmcl.report.transfer import interference, retention_rows
from memmcl.report.verdict import leaders, outcome, plus_minus, signed, verdict

PLOTS: dict[str, Callable[[Results], Plot | tuple[Plot, ...] | None]] = {
    "mean": plots.mean_plot,
    "subtasks": plots.subtask_plots,
    "fitness": plots.fitness_plots,
    "fronts": plots_search.front_plots,
    "seconds": plots.seconds_plots,
    "weights": plots.weights_plot,
    "difficulty": plots.difficulty_plot,
    "contexts": plots.context_plot,
    "losses": plots_experts.loss_plots,
    "interference": plots_experts.interference_plot,
    "nai": plots_experts.nai_plot,
    "task_vectors": plots_merge.task_vectors_plot,
    "time": plots.time_plot,
}
"""by the name that the template uses"""


def render_html(document: Document) -> str:
    """Return the report of `document` as one self-contained HTML page, for light and dark paper and print.

    Everything that comes from the document is escaped. The same document gives the same page.
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
        best={column: leaders(results, column) for column in (None, *(s.name for s in results.subtasks))},
        retention=retention_rows(results),
        interference=interference(results),
        outcome=outcome,
        groups=results.names_by_group(),
        config=yaml.safe_dump(results.run.config, sort_keys=False, allow_unicode=True),
        features={(feature.subtask, feature.feature): feature for feature in results.curriculum.features},
        plots={name: plot(results) for name, plot in PLOTS.items()},
        colours=COLOURS,
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
