"""What the report says of the experts' task vectors: where, in what order, and in words."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from report_fixture import LAYERS, SUBTASKS, only, results_document, sixteen_subtasks, task_vectors

from memmcl.report import parse_results, render_html
from memmcl.report.plots import merge as plots_merge
from memmcl.report.plots.axes import shade
from memmcl.report.plots.figure import SERIES, Plot

GROUPED = ("sent2", "asc", "uabsa", "aste", "irony", "emotion")
MINUS = "\N{MINUS SIGN}"


def _with(groups: dict[str, str]) -> dict[str, Any]:
    document = results_document()
    document["task_vectors"] = task_vectors(groups)
    return document


def _three() -> dict[str, Any]:
    return _with({"irony": "MAST", "sent2": "SC", "aste": "ABSA"})


def _two() -> dict[str, Any]:
    return _with({"sent2": "SC", "asc": "SC"})


def _one_layer() -> dict[str, Any]:
    document = results_document()
    document["task_vectors"]["layers"] = document["task_vectors"]["layers"][:1]
    return document


def _sixteen_long_names() -> dict[str, Any]:
    document = sixteen_subtasks()
    names = {part["name"]: f"{part['name']}_of_customers" for part in document["subtasks"]}
    document = {**document, "scores": [], "retention": [], "interference": [], "curriculum": {}}
    for part in document["subtasks"]:
        part["name"] = names[part["name"]]
    document["task_vectors"]["experts"] = [names[name] for name in document["task_vectors"]["experts"]]
    return document


def _opposed() -> dict[str, Any]:
    document = results_document()
    for relation in (document["task_vectors"]["overall"], *document["task_vectors"]["layers"]):
        relation["cosines"] = (1.5 * np.eye(6) - 0.5).tolist()
        relation.update(conflict=0.9, cancelled=0.95, norms=[1e-4, 2e-4, 0.0, 12345.6, 3.0, 4.0])
    return document


def drawn(document: dict[str, Any]) -> Plot:
    plot = plots_merge.task_vectors_plot(parse_results(document))
    assert plot is not None
    return plot


def lines_of(axes: Axes) -> dict[str, tuple[list[float], list[float]]]:
    return {
        str(line.get_label()): (list(line.get_xdata()), list(line.get_ydata()))
        for line in axes.lines
        if not str(line.get_label()).startswith("_")
    }


def frames_of(axes: Axes) -> list[list[float]]:
    """Return the framed places: first row and column, and how many."""
    corners = [(patch.get_x(), patch.get_y(), patch.get_width()) for patch in axes.patches if not patch.get_fill()]
    assert all(x == y for x, y, _ in corners)
    return [[round(x + 0.5), round(width)] for x, _, width in corners]


def test_pairs_stand_by_group_in_the_colour_of_their_cosine(figures: list[Figure]) -> None:
    document = results_document()
    drawn(document)
    axes = figures[0].axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == list(GROUPED)
    assert [label.get_text() for label in axes.get_xticklabels()] == list(GROUPED)
    experts, cosines = document["task_vectors"]["experts"], document["task_vectors"]["overall"]["cosines"]
    assert experts != list(GROUPED)
    texts = {(round(text.get_position()[1]), round(text.get_position()[0])): text.get_text() for text in axes.texts}
    fills = {
        (
            round(patch.get_y() + patch.get_height() / 2),
            round(patch.get_x() + patch.get_width() / 2),
        ): patch.get_facecolor()
        for patch in axes.patches
        if patch.get_fill()
    }
    reach = max(cosines[one][other] for one in range(6) for other in range(one))
    assert reach > 0.3
    for y, row in enumerate(GROUPED):
        for x, column in enumerate(GROUPED):
            value = cosines[experts.index(row)][experts.index(column)]
            assert texts[y, x] == ("1" if row == column else f"{value:.2f}")
            colour = shade(value, -reach, reach)[0]
            assert fills[y, x] == pytest.approx([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)] + [1])
    assert frames_of(axes) == [[0, 2], [2, 2], [4, 2]]


def test_only_groups_of_several_among_several_are_framed(figures: list[Figure]) -> None:
    for make in (_three, _two, sixteen_subtasks):
        drawn(make())
    assert [frames_of(figure.axes[0]) for figure in figures] == [[], [], [[0, 6], [6, 6], [12, 4]]]


def test_cosines_of_chance_stay_pale(figures: list[Figure]) -> None:
    document = results_document()
    cosines = np.full((6, 6), -0.004)
    cosines[0, 1] = cosines[1, 0] = 0.02
    document["task_vectors"]["overall"]["cosines"] = (cosines + np.diag([1.0] * 6)).tolist()
    plot = drawn(document)
    axes = figures[0].axes[0]
    assert sum(patch.get_facecolor()[0] > 0.8 for patch in axes.patches if patch.get_fill()) == 30
    assert {text.get_text() for text in axes.texts} == {"1", "0.00", "0.02"}, "no minus before nothing"
    assert "mean 0.00" in plot.alt


def test_every_line_is_that_of_the_document(figures: list[Figure]) -> None:
    document = results_document()
    drawn(document)
    _, mean, signs, norms = figures[0].axes
    found, layers = document["task_vectors"]["layers"], list(LAYERS)
    upper = np.triu_indices(6, 1)
    means = [float(np.array(part["cosines"])[upper].mean()) for part in found]
    assert lines_of(mean) == {"mean": (layers, pytest.approx(means))}
    assert lines_of(signs) == {
        "pairs that differ in sign": (layers, [part["conflict"] for part in found]),
        "cancelled in the sum": (layers, [part["cancelled"] for part in found]),
    }
    experts = document["task_vectors"]["experts"]
    assert lines_of(norms) == {
        name: (layers, [part["norms"][experts.index(name)] for part in found]) for name in GROUPED
    }
    assert [set(line.get_ydata()) for axes in (mean, signs) for line in axes.lines[:1]] == [{0}, {0.5}]
    (legend,) = figures[0].legends
    assert [text.get_text() for text in legend.get_texts()] == list(GROUPED)


@pytest.mark.parametrize(("make", "colours"), [(results_document, 6), (sixteen_subtasks, 3)])
def test_no_two_experts_look_alike(figures: list[Figure], make: Callable[[], dict[str, Any]], colours: int) -> None:
    document = make()
    drawn(document)
    lines = figures[0].axes[3].lines
    looks = {(line.get_color(), line.get_marker(), line.get_linestyle()) for line in lines}
    assert len(looks) == len(lines) == len(document["task_vectors"]["experts"])
    assert len({line.get_color() for line in lines}) == colours, "one an expert, or one a group beyond ten"
    if len(lines) > len(SERIES):
        groups = {part["name"]: part["group"] for part in document["subtasks"]}
        assert len({(groups[str(line.get_label())], line.get_color()) for line in lines}) == colours


def test_the_plot_in_words() -> None:
    document = _two()
    vectors = document["task_vectors"]
    vectors["overall"].update(norms=[2.5, 1.25], cosines=[[1, -0.25], [-0.25, 1]])
    vectors["layers"] = [
        {
            **vectors["layers"][place],
            "cosines": [[1, value], [value, 1]],
            "conflict": 0.6 - place / 10,
            "cancelled": 0.5,
        }
        for place, value in enumerate((-0.4, 0.1))
    ]
    assert drawn(document).alt.split("; ") == [
        "Task vectors of 2 experts",
        f"cosine similarity over all layers {MINUS}0.25 (asc and sent2)",
        "norm from 1.250 (sent2) to 2.500 (asc)",
        f"by layer, 20 to 21: mean cosine {MINUS}0.40 to 0.10, pairs that differ in sign 0.50 to 0.60, "
        "cancelled in the plain sum 0.50 to 0.50",
    ]
    document = results_document()
    pairs = {}
    for row, name in enumerate(document["task_vectors"]["experts"]):
        for column, other in enumerate(document["task_vectors"]["experts"][:row]):
            pairs[f"{other} and {name}"] = document["task_vectors"]["overall"]["cosines"][row][column]
    low, high = (f"{pick(pairs.values()):.2f} ({pick(pairs, key=pairs.__getitem__)})" for pick in (min, max))
    mean = np.mean(list(pairs.values()))
    assert f"cosine similarity over all layers from {low} to {high}, mean {mean:.2f};" in drawn(document).alt


def test_what_was_not_measured_is_left_out(figures: list[Figure]) -> None:
    document = _two()
    for relation in (document["task_vectors"]["overall"], *document["task_vectors"]["layers"]):
        relation.update(norms=[0.0, 2.0], cosines=[[None, None], [None, 1.0]], conflict=None, cancelled=float("nan"))
    plot = drawn(document)
    assert plot.alt == "Task vectors of 2 experts; norm from 0.000 (asc) to 2.000 (sent2)"
    pairs, mean, signs, _ = figures[0].axes
    assert sorted(text.get_text() for text in pairs.texts) == ["1", *["\N{EN DASH}"] * 3]
    assert all(not ys for axes in (mean, signs) for _, ys in lines_of(axes).values())


def test_nothing_is_drawn_without_two_experts() -> None:
    for vectors in (None, task_vectors({"sent2": "SC"})):
        document = {**only(results_document(), "experts", "interference"), "task_vectors": vectors}
        assert plots_merge.task_vectors_plot(parse_results(document)) is None
        assert "How their task vectors relate" not in render_html(document)


def test_the_page_has_the_numbers_and_says_what_is_left_out() -> None:
    document = only(results_document(), "experts", "interference", "task_vectors", "timings")
    page = render_html(document)
    section = page[page.index("How their task vectors relate") : page.index('<section id="time"')]
    assert page.index('<section id="experts"') < page.index("How their task vectors relate")
    assert "The warm start of all experts is not an expert itself and is left out." in section
    rows = re.findall(r'<th scope="row">(\d+|all layers)</th>(.*?)</tr>', section)
    vectors = document["task_vectors"]
    assert [name for name, _ in rows] == [*map(str, LAYERS), "all layers"]
    for (_, cells), part in zip(rows, (*vectors["layers"], vectors["overall"]), strict=True):
        mean = float(np.array(part["cosines"])[np.triu_indices(6, 1)].mean())
        norms = [part["norms"][vectors["experts"].index(name)] for name in GROUPED]
        found = re.findall(r">([^<]+)</td>", cells)
        assert float(found[0]) == pytest.approx(mean, abs=6e-4)
        assert found[1:] == [f"{value:.3f}" for value in (part["conflict"], part["cancelled"], *norms)]
    heads = re.findall(r'<th class="num" scope="col">(\w+)</th>', section)
    assert heads == list(GROUPED) == [name for name in GROUPED if name in SUBTASKS]
    document["experts"] = [expert for expert in document["experts"] if expert["subtask"] != "warm"]
    assert "is left out" not in render_html(document)


@pytest.mark.parametrize(
    "make", [_two, _three, results_document, sixteen_subtasks, _sixteen_long_names, _opposed, _one_layer]
)
def test_no_label_lies_on_another_or_is_cut_off(
    figures: list[Figure], check_labels: Callable[[Figure, int], None], make: Callable[[], dict[str, Any]]
) -> None:
    drawn(make())
    (figure,) = figures
    check_labels(figure, 20)
