"""The HTML report: well-formed, self-contained, escaped, and with the numbers of the document."""

from __future__ import annotations

import re
from collections.abc import Callable
from html.parser import HTMLParser
from typing import Any

import pytest
from report_fixture import LEVELS, SUBTASKS, only, results_document, task_vectors

from memmcl.report import render_html
from memmcl.report.html import duration
from memmcl.report.plots.axes import heat_map, shade
from memmcl.report.plots.figure import BIG, draw, shorten

VOID = {"meta", "link", "br", "img", "hr", "input"}
EVIL = "<script>alert('x')</script>\"&' $x_1$ --> ]]>"


class Page(HTMLParser):
    """Collects what the tests ask about, and fails on tags that do not match."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.cells: dict[tuple[str, str], str] = {}
        self.text: list[str] = []
        self._cell: tuple[str, str] | None = None
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.append((tag, found))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "td" and "data-model" in found:
            self._cell = (str(found["data-model"]), str(found["data-subtask"]))
            self.cells[self._cell] = ""

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        if tag == "td":
            self._cell = None

    def handle_data(self, data: str) -> None:
        self.text.append(data)
        if self._cell:
            self.cells[self._cell] += data


@pytest.fixture(scope="module")
def html() -> str:
    return render_html(results_document())


@pytest.fixture(scope="module")
def page(html: str) -> Page:
    return Page(html)


def test_nothing_is_fetched_and_nothing_runs(page: Page, html: str) -> None:
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "iframe", "object", "embed", "form", "base"}
    for _, attributes in page.tags:
        for name in ("src", "href", "xlink:href", "srcset", "poster", "action"):
            value = attributes.get(name)
            assert value is None or value.startswith(("#", "data:")), value
    assert "@import" not in html
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", html))


def test_ids_are_unique_and_every_link_has_its_target(page: Page) -> None:
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = [str(a["href"]) for _, a in page.tags if str(a.get("href") or "").startswith("#")]
    assert len(links) > 20
    assert {link[1:] for link in links} <= set(ids)


def test_every_score_and_mean_is_that_of_the_document(page: Page) -> None:
    document = results_document()
    expected = {(s["model"], s["subtask"]): f"{s['score']:.3f} ± {s['se']:.3f}" for s in document["scores"]}
    expected |= {(m["model"], ""): f"{m['mean']:.3f} ± {m['se']:.3f}" for m in document["means"]}
    for s in document["scores"]:
        if s["strict_score"] is not None and f"{s['strict_score']:.3f}" != f"{s['score']:.3f}":
            expected[s["model"], s["subtask"]] += f"strict {s['strict_score']:.3f}"
        if s["rejected"]:
            expected[s["model"], s["subtask"]] += f"{s['rejected']} of {s['n']} unreadable"
    assert sum("strict" in text for text in expected.values()) > 10
    assert sum("unreadable" in text for text in expected.values()) > 10
    shown = {key: text.replace("curriculum", "") for key, text in page.cells.items()}
    assert shown == expected


def test_unreadable_answers_are_counted_on_the_page_and_only_where_there_are_some(page: Page) -> None:
    document = results_document()
    unreadable, answered = (sum(score[key] for score in document["scores"]) for key in ("rejected", "n"))
    said = f"{unreadable:,} of {answered:,} answers could not be read"
    assert said in " ".join(page.text)
    for score in document["scores"]:
        score.update(rejected=0, score=round(score["score"], 3))
        score["strict_score"] = None if score["strict_score"] is None else score["score"] + 0.0001
    read = render_html(only(document, "scores", "means"))
    assert "could not be read" not in read
    assert "remark" not in read


def test_a_matrix_of_sixteen_columns_keeps_its_labels() -> None:
    def markup(columns: int) -> str:
        cells = [[(x / 10, f"0.{y}{x:02d}") for x in range(columns)] for y in range(16)]
        names = [f"subtask {number}" for number in range(columns)]
        return draw(
            "matrix",
            lambda figure: heat_map(figure.add_subplot(), cells, [f"r{y}" for y in range(16)], names, 0, 2),
            width=560,
            height=538,
            alt="matrix",
        ).markup

    found = markup(16)
    assert all(f"0.{y}{x:02d}" in found for y in range(16) for x in range(16))
    assert all(f"subtask {number}<" in found for number in range(16))
    assert "0.101<" not in markup(21)


def test_the_verdict_is_the_headline(page: Page, html: str) -> None:
    assert "<h1>The unified model beats the base model by 0.285 ± 0.019</h1>" in html
    assert html.index("<h1>") < html.index("falls behind joint LoRA") < html.index("<table")


def test_other_numbers_are_on_the_page(page: Page) -> None:
    document = results_document()
    text = " ".join(page.text)
    for search in document["searches"]:
        winner = search["candidates"][search["winner"]]
        assert f"{winner['fitness']:.3f}" in text
    for row in document["merge"]["coefficients"]:
        assert all(f"{value:.3f}" in text for value in row)
    for part in document["curriculum"]["contexts"]:
        assert f"{part['test_score']:.3f} ± {part['test_se']:.3f}" in text
    for part in document["retention"]:
        assert f"{part['nai']:.3f}" in text
    for value in (document["run"]["run_id"], document["run"]["base"]["digest"], "12 min 45 s", "3.41 GB"):
        assert value in text
    assert all(d in text for parts in document["data"]["digests"].values() for d in parts.values())


def _rows(html: str, label: str) -> dict[str, list[str]]:
    """Return the body of the table called `label`: first cell -> the others, as text."""
    table = html[html.index(f'aria-label="{label}"') :]
    body = table[table.index("<tbody>") : table.index("</tbody>")]
    rows = [[re.sub(r"<small>", " ", cell) for cell in re.split(r"</t[hd]>", row)] for row in body.split("</tr>")]
    cells = [[" ".join(re.sub(r"<[^>]+>", "", cell).split()) for cell in row] for row in rows]
    return {row[0]: row[1:-1] for row in cells if row[0]}


def test_retention_has_a_pair_of_columns_a_merged_model_and_one_row_over_all(html: str) -> None:
    document = results_document()
    rows = _rows(html, "Retention by subtask")
    assert list(rows) == [*document["curriculum"]["order"], "all subtasks from the mean scores"]
    for name in SUBTASKS:
        parts = [part for part in document["retention"] if part["subtask"] == name]
        assert rows[name] == [f"{part[field]:.3f}" for part in parts for field in ("retention", "nai")]
    base, expert, *merged = (sum(LEVELS[name]) for name in ("base", "experts", "sum", "unified"))
    over_all = [f"{value:.3f}" for m in merged for value in (m / expert, (m - base) / (expert - base))]
    assert rows["all subtasks from the mean scores"] == over_all
    document["retention"] = [part for part in document["retention"] if part["model"] == "unified"]
    assert (
        _rows(render_html(only(document, "retention", "curriculum")), "Retention by subtask")["asc"] == rows["asc"][2:]
    )


def test_interference_as_numbers(html: str) -> None:
    document = results_document()
    rows = _rows(html, "Scores of the base and of every expert on every subtask")
    order = document["curriculum"]["order"]
    assert list(rows) == ["base", *order]
    cells = {(part["expert"], part["subtask"]): part for part in document["interference"]}
    for row, shown in rows.items():
        parts = [cells[row, column] for column in order]
        assert shown[:6] == [f"{part['score']:.3f} ± {part['se']:.3f}" for part in parts]
    assert rows["base"][6:] == ["–", "–"]
    assert rows["asc"][6] == f"+{LEVELS['experts'][1] - LEVELS['base'][1]:.3f}"
    assert "one bootstrap standard error over the test rows, 60 a subtask" in html


def test_a_training_shows_what_it_reached_and_what_it_took(html: str) -> None:
    document = results_document()
    rows = _rows(html, "Trainings")
    trained = {expert["subtask"]: expert for expert in document["experts"]}
    names = [row.split()[0] for row in rows]
    assert names == list(trained) == ["warm", *SUBTASKS, "weak", "joint"]
    assert "warm the warm start of all experts, trained on the rows of all subtasks" in rows
    assert rows["irony"][0] == "40 × 8 stopped early kept: step 30"
    assert rows["aste"][0] == "40 × 8 2 at once"
    assert rows["asc"][0] == "40 × 8"
    for name in SUBTASKS:
        expert = trained[name]
        anchors = [value for value in expert["anchor"] if value is not None]
        weak = [expert[f"{which}weak_score"] for which in ("base_", "constant_", "")]
        assert rows[name][4:9] == [
            f"{expert['loss'][-1]:.3f}",
            f"{anchors[-1]:.3f} every 4 steps",
            *(f"{score:.3f}" for score in weak),
        ]
        assert rows[name][9:] == ["612.4", "7.25", "44.0"]
    assert "No better on the weak rows" not in html


def test_columns_of_trainings_are_there_only_where_something_was_measured() -> None:
    document = results_document()
    for expert in document["experts"]:
        expert.update(constant_weak_score=None, gpu_memory_gb=None, validation=[], best_step=None, stopped_early=False)
    html = render_html(only(document, "experts"))
    assert [len(row) for row in _rows(html, "Trainings").values()] == [10] * 9
    assert "GPU" not in html
    assert "Dots: the loss on validation rows" not in html


def test_an_expert_that_a_constant_answer_equals_is_named() -> None:
    document = results_document()
    for expert in document["experts"]:
        if expert["subtask"] in ("asc", "irony"):
            expert["constant_weak_score"] = expert["weak_score"]
    page = render_html(only(document, "experts"))
    assert "No better on the weak rows than the best constant answer: asc, irony." in page


def test_every_drawing_has_a_text_alternative(page: Page) -> None:
    drawings = [attributes for tag, attributes in page.tags if tag == "svg"]
    assert len(drawings) == 6 + 4 + 4 + 9 + 8  # subtasks, fitness, seconds, losses, single ones
    assert all(a["role"] == "img" and len(str(a["aria-label"])) > 20 for a in drawings)
    fitness = next(str(a["aria-label"]) for a in drawings if "Stage 1, ABSA: " in str(a["aria-label"]))
    assert "20 evaluations, 0 stopped early, 1 failed" in fitness


def test_the_same_document_gives_the_same_page(html: str) -> None:
    assert render_html(results_document()) == html


def test_data_cannot_become_markup() -> None:
    document = results_document()
    names: dict[str, str] = {}
    for subtask in document["subtasks"]:
        names[subtask["name"]] = subtask["name"] = EVIL + subtask["name"]
        subtask.update(title=EVIL, metric=EVIL, group=EVIL, labels=[EVIL])
        subtask["example"] = {"prompt": EVIL, "answer": EVIL}
    for part in document["interference"]:
        part["expert"] = names.get(part["expert"], part["expert"])
    parts = [*document["scores"], *document["retention"], *document["interference"]]
    parts += document["curriculum"]["features"]
    for part in [*parts, *document["curriculum"]["contexts"], *document["experts"]]:
        part["subtask"] = names.get(part["subtask"], part["subtask"])
        for field in ("context", "metric", "feature"):
            if field in part:
                part[field] = EVIL + str(part[field])
    document["curriculum"]["order"] = [names[name] for name in document["curriculum"]["order"]]
    document["task_vectors"]["experts"] = [names[name] for name in document["task_vectors"]["experts"]]
    for model in document["models"]:
        model.update(title=EVIL, description=EVIL)
    for search in document["searches"]:
        search.update(strategy=EVIL, genes=[EVIL + gene for gene in search["genes"]])
    for timing in document["timings"]:
        timing.update(stage=EVIL, name=EVIL)
    document["merge"].update(method=EVIL, experts=[EVIL] * 6, blocks=[EVIL] * 2)
    document["run"].update(name=EVIL, command=EVIL, store_url=EVIL, config={EVIL: EVIL}, versions={EVIL: EVIL})
    document["data"].update(source=EVIL, dropped={EVIL: 1}, digests={EVIL: {EVIL: EVIL}})
    document["notes"] = [EVIL]
    html = render_html(document)
    page = Page(html)
    assert not [tag for tag, _ in page.tags if tag == "script"]
    assert "<script" not in html
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert any(EVIL in text for text in page.text)


def _one_subtask(document: dict[str, Any]) -> None:
    document["subtasks"] = document["subtasks"][:1]
    for key in ("scores", "retention"):
        document[key] = [part for part in document[key] if part["subtask"] == "sent2"]
    document["interference"] = document["interference"][:1]
    document["task_vectors"] = task_vectors({"sent2": "SC"})
    document["curriculum"] = {}
    document["searches"] = document["searches"][-1:]


def _no_rival(document: dict[str, Any]) -> None:
    for key, field in (("models", "name"), ("scores", "model"), ("means", "model"), ("comparisons", "b")):
        document[key] = [part for part in document[key] if part[field] != "joint"]
    document["experts"] = document["experts"][:-1]


def _no_tuples(document: dict[str, Any]) -> None:
    document["subtasks"] = [part for part in document["subtasks"] if part["group"] != "ABSA"]
    names = [part["name"] for part in document["subtasks"]]
    document["curriculum"]["order"] = [n for n in document["curriculum"]["order"] if n in names]
    for holder, key in ((document, "scores"), (document, "retention"), (document["curriculum"], "features")):
        holder[key] = [part for part in holder[key] if part["subtask"] in names]
    pairs = [part for part in document["interference"] if {part["expert"], part["subtask"]} <= {"base", *names}]
    document["interference"] = pairs
    document["task_vectors"] = task_vectors({part["name"]: part["group"] for part in document["subtasks"]})
    contexts = document["curriculum"]["contexts"]
    document["curriculum"]["contexts"] = [part for part in contexts if part["subtask"] in names]


def _all_failed(document: dict[str, Any]) -> None:
    only(document, "scores", "means", "searches", "merge")
    for search in document["searches"]:
        search["winner"] = None
        for candidate in search["candidates"]:
            candidate.update(fitness=float("-inf"), values={})


def _no_candidates(document: dict[str, Any]) -> None:
    only(document, "scores", "means", "searches", "merge")
    for search in document["searches"]:
        search.update(candidates=[], winner=None)


def _bare(document: dict[str, Any]) -> None:
    only(document).update(comparisons=[], peak_memory_gb=None, notes=[])


def _long_names(document: dict[str, Any]) -> None:
    only(document, "scores", "means", "timings", "curriculum")
    for model in document["models"]:
        model["title"] = model["title"] * 12
    document["run"]["name"] = "x" * 400
    document["timings"] = [{"stage": "s" * 90, "name": f"{n}" * 50, "seconds": n} for n in range(60)]


def _untested_contexts(document: dict[str, Any]) -> None:
    only(document, "scores", "means", "curriculum")
    for part in document["curriculum"]["contexts"]:
        part.update(test_score=None, test_se=None)


@pytest.mark.parametrize(
    "change", [_one_subtask, _no_rival, _no_tuples, _all_failed, _no_candidates, _bare, _long_names, _untested_contexts]
)
def test_incomplete_runs_still_make_a_page(change: Callable[[dict[str, Any]], None]) -> None:
    document = results_document()
    change(document)
    html = render_html(document)
    page = Page(html)
    assert len(page.cells) == len(document["models"]) + len(document["scores"])
    assert "nan" not in " ".join(page.text).split()
    assert "None" not in " ".join(page.text).split()
    sections = {str(a["id"]) for tag, a in page.tags if tag == "section"}
    assert ("search" in sections) == bool(document["searches"])
    assert ("interference" in sections) == bool(document["interference"])
    assert ("How their task vectors relate" in page.text) == (
        len((document["task_vectors"] or {"experts": ""})["experts"]) > 1
    )
    assert ("weights" in sections) == (document["merge"] is not None)
    assert ("curriculum" in sections) == bool(document["curriculum"])


def test_a_big_drawing_becomes_a_bitmap_with_alt_text() -> None:
    def paint(figure: Any) -> None:
        figure.add_subplot().plot([x % 7 for x in range(BIG // 50)], "o")

    plot = draw("big", paint, width=200, height=100, alt='many "dots"')
    assert plot.markup.startswith('<img src="data:image/png;base64,')
    assert 'alt="many &quot;dots&quot;"' in plot.markup


def test_drawing_leaves_no_trace_in_matplotlib() -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    plot = draw("trace", lambda figure: figure.add_subplot().plot([1, 2]), width=90, height=60, alt="a line")
    assert dict(matplotlib.rcParams) == before
    assert "var(--line)" in plot.markup  # the page's colours, not fixed ones
    assert "<metadata" not in plot.markup
    assert "<style" not in plot.markup


def test_helpers() -> None:
    assert shade(0.0, 0.0, 1.0) == ("#f2f5f4", "#1c1f21")
    assert shade(1.0, 0.0, 1.0) == ("#095c53", "#ffffff")
    assert shade(-2.0, -2.0, 1.0) == ("#943e08", "#ffffff")
    assert shorten("a  b\nc", 5) == "a b c"
    assert shorten("abcdef", 5) == "abcd…"
    assert [duration(s) for s in (4.21, 59.96, 764.9, 4321)] == ["4.2 s", "1 min 00 s", "12 min 45 s", "1 h 12 min"]
