"""What the report says of experts: how they were trained, what they do to each other, what merged models keep."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from report_fixture import LEVELS, MORE, SUBTASKS, results_document, sixteen_subtasks

from memmcl.report import parse_results
from memmcl.report.plots import common as plots
from memmcl.report.plots import experts as plots_experts
from memmcl.report.plots.axes import shade
from memmcl.report.transfer import interference, retention_rows

ORDER = ("sent2", "asc", "irony", "emotion", "aste", "uabsa")


def _long_names() -> dict[str, Any]:
    document = results_document()
    document["merge"]["blocks"] = [f"layers {2 * block}-{2 * block + 1}" for block in range(8)]
    document["merge"]["coefficients"] = [[0.5] * 8] * 6
    names = {name: f"{name}_of_customers" for name in SUBTASKS}
    for key in ("scores", "retention", "interference", "experts"):
        for part in document[key]:
            part["subtask"] = names.get(part["subtask"], part["subtask"])
            if "expert" in part:
                part["expert"] = names.get(part["expert"], part["expert"])
    for subtask in document["subtasks"]:
        subtask["name"] = names[subtask["name"]]
    document["merge"]["experts"] = list(names.values())
    document["task_vectors"]["experts"] = [names[name] for name in document["task_vectors"]["experts"]]
    document["curriculum"] = {"order": [names[name] for name in ORDER]}
    return document


def _outliers() -> dict[str, Any]:
    document = sixteen_subtasks()
    for number, part in enumerate(document["retention"]):
        part["nai"] = (-123.4, 45.6, 0.5)[number % 3]
    return document


def test_a_matrix_has_the_base_on_top_and_the_order_of_the_curriculum() -> None:
    document = results_document()
    matrix = interference(parse_results(document))
    assert matrix is not None
    assert tuple(document["curriculum"]["order"]) == ORDER
    assert (matrix.rows, matrix.columns) == (("base", *ORDER), ORDER)
    assert matrix.own == tuple((name, name) for name in ORDER)
    base = dict(zip(SUBTASKS, LEVELS["base"], strict=True))
    scores = {(part["expert"], part["subtask"]): part["score"] for part in document["interference"]}
    assert matrix.gains == {
        (row, column): pytest.approx(score - base[column]) for (row, column), score in scores.items() if row != "base"
    }
    table = np.array([[scores[row, column] - base[column] for column in SUBTASKS] for row in SUBTASKS])
    own = np.eye(6, dtype=bool)
    assert matrix.gain(own=True) == pytest.approx(np.subtract(LEVELS["experts"], LEVELS["base"]).mean())
    assert matrix.gain(own=False) == pytest.approx(table[~own].mean())
    for number, name in enumerate(SUBTASKS):
        assert matrix.gain(own=True, expert=name) == pytest.approx(table[number, number])
        assert matrix.gain(own=False, expert=name) == pytest.approx(np.delete(table[number], number).mean())
    assert matrix.gain(own=True, expert="base") is None
    assert matrix.span == "60"


def test_a_matrix_with_holes_counts_what_was_measured() -> None:
    def part(expert: str, subtask: str, score: float, n: int) -> dict[str, Any]:
        return {"expert": expert, "subtask": subtask, "score": score, "se": 0.01, "n": n}

    document = results_document()
    document["interference"] = [
        part("irony", "sent2", 0.5, 40),
        part("base", "sent2", 0.7, 40),
        part("irony", "irony", 0.9, 12),
    ]
    matrix = interference(parse_results(document))
    assert matrix is not None
    assert (matrix.rows, matrix.columns, matrix.own) == (("base", "irony"), ("sent2", "irony"), (("irony", "irony"),))
    assert matrix.gain(own=False) == pytest.approx(-0.2)
    assert matrix.gain(own=True) is None  # the base was not measured there
    assert matrix.span == "12 to 40"
    plot = plots_experts.interference_plot(parse_results(document))
    assert plot is not None
    assert "on other subtasks, less the base: mean \N{MINUS SIGN}0.200" in plot.alt
    assert "on their own" not in plot.alt
    document["interference"] = []
    assert interference(parse_results(document)) is None
    assert plots_experts.interference_plot(parse_results(document)) is None


def test_over_all_subtasks_mean_scores_are_divided() -> None:
    results = parse_results(results_document())
    base, expert = np.mean(LEVELS["base"]), np.mean(LEVELS["experts"])
    found = retention_rows(results)
    assert [part.model.name for part in found] == ["sum", "unified"]
    for part in found:
        merged = np.mean(LEVELS[part.model.name])
        assert part.retention == pytest.approx(merged / expert)
        assert part.nai == pytest.approx((merged - base) / (expert - base))
        assert set(part.by_subtask) == set(SUBTASKS)


def test_one_expert_that_learned_nothing_does_not_decide_the_mean() -> None:
    document = results_document()
    for score in document["scores"]:
        if (score["model"], score["subtask"]) == ("experts", "irony"):
            score["score"] = LEVELS["base"][4] + 1e-3
    unified = retention_rows(parse_results(document))[1]
    ratios = [(m - b) / (e - b) for m, b, e in zip(*(LEVELS[k] for k in ("unified", "base", "experts")), strict=True)]
    ratios[4] = (LEVELS["unified"][4] - LEVELS["base"][4]) / 1e-3
    assert np.mean(ratios) > 40
    assert unified.nai is not None
    assert 0.9 < unified.nai < 1.1


def test_only_subtasks_with_all_three_scores_are_in_the_mean() -> None:
    document = results_document()
    document["scores"] = [
        score for score in document["scores"] if score["subtask"] == "asc" or score["model"] != "experts"
    ]
    unified = retention_rows(parse_results(document))[1]
    assert unified.retention == pytest.approx(LEVELS["unified"][1] / LEVELS["experts"][1])
    document["scores"] = []
    bare = retention_rows(parse_results(document))[1]
    assert (bare.retention, bare.nai) == (None, None)
    assert bare.by_subtask["asc"].retention is not None


@pytest.mark.parametrize("worst", [0.431, 0.1])  # uabsa's expert on sent2, where the base has 0.583
@pytest.mark.parametrize(("make", "names"), [(results_document, ORDER), (sixteen_subtasks, (*ORDER, *MORE))])
def test_the_heat_map_shows_scores_in_the_colour_of_their_gain(
    figures: list[Figure], make: Callable[[], dict[str, Any]], names: tuple[str, ...], worst: float
) -> None:
    document = make()
    next(p for p in document["interference"] if (p["expert"], p["subtask"]) == ("uabsa", "sent2"))["score"] = worst
    plot = plots_experts.interference_plot(parse_results(document))
    (axes,) = figures[0].axes
    assert plot is not None
    assert [label.get_text() for label in axes.get_yticklabels()] == ["base", *names]
    assert [label.get_text() for label in axes.get_xticklabels()] == list(names)
    scores = {(part["expert"], part["subtask"]): part["score"] for part in document["interference"]}
    gains = {place: score - scores["base", place[1]] for place, score in scores.items()}
    reach = max(0.2, 0.583 - worst)
    texts = {(round(text.get_position()[1]), round(text.get_position()[0])): text.get_text() for text in axes.texts}
    fills, frames = {}, set()
    for patch in axes.patches:
        place = (round(patch.get_y() + patch.get_height() / 2), round(patch.get_x() + patch.get_width() / 2))
        if patch.get_fill():
            fills[place] = patch.get_facecolor()
        else:
            frames.add(place)
    assert frames == {(number + 1, number) for number in range(len(names))}
    for y, row in enumerate(("base", *names)):
        for x, column in enumerate(names):
            assert texts[y, x] == f"{scores[row, column]:.3f}"
            colour = shade(gains[row, column], -reach, reach)[0]
            assert fills[y, x] == pytest.approx([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)] + [1])
    own = np.mean([gains[name, name] for name in names])
    others = np.mean([gain for (row, column), gain in gains.items() if row not in ("base", column)])
    assert f"{len(names)} experts on {len(names)} subtasks" in plot.alt
    assert f"own subtask, less the base: mean +{own:.3f}" in plot.alt
    assert f"on other subtasks, less the base: mean \N{MINUS SIGN}{-others:.3f}" in plot.alt


def test_noise_between_experts_stays_pale(figures: list[Figure]) -> None:
    document = results_document()
    base = dict(zip(SUBTASKS, LEVELS["base"], strict=True))
    for part in document["interference"]:
        if part["expert"] not in ("base", part["subtask"]):
            part["score"] = base[part["subtask"]] + 0.01
    plots_experts.interference_plot(parse_results(document))
    (axes,) = figures[0].axes
    palest = [patch.get_facecolor()[0] for patch in axes.patches if patch.get_fill()]
    assert sum(red > 0.9 for red in palest) == 36  # all but the six on the diagonal


def test_retention_and_nai_are_drawn_where_they_are(figures: list[Figure]) -> None:
    document = results_document()
    document["retention"][0].update(retention=None, nai=-7.25)  # the sum on sent2
    plot = plots_experts.nai_plot(parse_results(document))
    assert plot is not None
    left, right = figures[0].axes
    assert [label.get_text() for label in left.get_yticklabels()] == [*ORDER, "all subtasks"]
    whole = {part.model.name: part for part in retention_rows(parse_results(document))}
    for axes, field in ((left, "retention"), (right, "nai")):
        expected = sorted(
            [max(-1.0, part[field]) for part in document["retention"] if part[field] is not None]
            + [getattr(whole[name], field) for name in ("sum", "unified")]
        )
        drawn = sorted(float(line.get_xdata()[0]) for line in axes.lines if len(line.get_xdata()) == 1)
        assert drawn == pytest.approx(expected)
    assert [text.get_text() for text in right.texts] == ["\N{MINUS SIGN}7.250"]
    assert not left.texts
    assert f"Unified model retention {whole['unified'].retention:.3f}, NAI {whole['unified'].nai:.3f}" in plot.alt
    document["retention"] = []
    assert plots_experts.nai_plot(parse_results(document)) is None


def test_a_training_is_drawn_with_its_gaps_its_validation_and_the_step_it_kept(figures: list[Figure]) -> None:
    document = results_document()
    panels = plots_experts.loss_plots(parse_results(document))
    assert [panel.title for panel in panels] == ["warm", *SUBTASKS, "weak", "joint"]
    irony = next(expert for expert in document["experts"] if expert["subtask"] == "irony")
    (axes,) = figures[5].axes
    lines = {str(line.get_label()): line for line in axes.lines}
    measured = [step for step, value in enumerate(irony["anchor"], 1) if value is not None]
    assert len(measured) == 10
    assert list(lines["anchor KL"].get_xdata()) == measured  # one line over the gaps
    points = [(point["step"], point["loss"]) for point in irony["validation"]]
    assert list(zip(lines["validation"].get_xdata(), lines["validation"].get_ydata(), strict=True)) == points
    assert set(lines["kept"].get_xdata()) == {30}
    assert panels[5].alt.endswith("; kept: step 30 of 40; stopped early")
    assert f"validation loss: first {points[0][1]:.3f}, last {points[-1][1]:.3f}" in panels[5].alt
    assert {str(line.get_label()) for line in figures[8].axes[0].lines if line.get_label()[0] != "_"} == {"loss"}
    tops = {figure.axes[0].get_ylim()[1] for figure in figures}
    assert len(tops) == 1
    irony["validation"].append({"step": 40, "loss": 9.5})
    plots_experts.loss_plots(parse_results(document))
    assert figures[-1].axes[0].get_ylim()[1] > 9.5


@pytest.mark.parametrize("make", [results_document, sixteen_subtasks, _long_names, _outliers])
def test_no_label_lies_on_another_or_is_cut_off(
    figures: list[Figure], check_labels: Callable[[Figure, int], None], make: Callable[[], dict[str, Any]]
) -> None:
    results = parse_results(make())
    for plot in (plots_experts.interference_plot, plots_experts.nai_plot, plots.weights_plot):
        assert plot(results) is not None
    assert len(plots_experts.loss_plots(results)) == len(results.experts)
    for figure in figures:
        check_labels(figure, 5)
