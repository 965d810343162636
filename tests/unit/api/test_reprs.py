"""What the objects of the front door show of themselves, in a terminal and in a notebook."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from memmcl.api.merging import Merge
from memmcl.api.model import Prediction, Predictions, SentimentModel
from memmcl.api.search_result import MergeSearch, SearchResult
from memmcl.config import RunConfig, SearchConfig
from memmcl.evolve import Proposal
from memmcl.merge.genome import Recipe
from memmcl.search.document import EvaluatedCandidate, SearchDocument
from memmcl.search.spec import SearchSpec
from memmcl.suite.subtasks import SUBTASKS

SPEC = SearchSpec(
    name="own",
    key="ab" * 32,
    strategy="random",
    parts={"a": {"a": (1.0,)}, "b": {"b": (1.0,)}},
    subtasks=("sent2",),
    seeds=(),
    evaluations=3,
    blocks=1,
    bounds=(0.0, 1.5),
    mask_seed=0,
)


def candidate(index: int, fitness: float, **more: Any) -> EvaluatedCandidate:
    proposal = vars(Proposal(index, (0.5, 1.0), "random:g1", 1))
    measured = {"values": {"sent2": fitness}, "rungs": [], "stopped": False, "rows": 4, "seconds": {"merge": 0.1}}
    return EvaluatedCandidate(**{**proposal, **measured, "fitness": fitness, **more})


def document() -> SearchDocument:
    return SearchDocument(
        spec=SPEC,
        genes=SPEC.space.genes,
        stopped_early=False,
        candidates=(
            candidate(0, 0.5),
            candidate(1, 0.75),
            candidate(2, float("-inf"), values={"sent2": None}, reused_from=1),
        ),
        winner=1,
        joint=None,
        finalists=(),
        coefficients={"a": (0.5,), "b": (1.0,)},
        recipe=Recipe("ties"),
        fitness=0.75,
    )


def planned() -> Any:
    problem = SimpleNamespace(search=SearchConfig(strategy="random"), experts={"a": None, "b": None})
    return MergeSearch(problem, SimpleNamespace(first=SPEC), *[None] * 4, counts={"sent2": 4})  # type: ignore[arg-type]


def test_a_merge() -> None:
    merge = Merge(SimpleNamespace(name="org/<base>"), (), {"a": (1.0,), "b": (0.5, 0.25)}, Recipe("ties"))  # type: ignore[arg-type]
    assert repr(merge) == "Merge(ties of a=1, b=0.5, 0.25 on org/<base>)"
    assert "<caption>ties on org/&lt;base&gt;</caption>" in merge._repr_html_()
    assert "<td>0.5, 0.25</td>" in merge._repr_html_()


def test_a_search_and_its_result() -> None:
    result = SearchResult(planned(), document(), {"sent2": "a"})
    assert repr(result) == "SearchResult(fitness 0.7500 of 3 candidates: a 0.5, b 1)"
    assert result.winner.index == 1
    html = result._repr_html_()
    assert "fitness of 2 candidates, best 0.7500" in html, "the failed one is no dot of the curve"
    assert html.count("<circle") == 2
    assert html.startswith("<table>")
    assert repr(result.search) == "MergeSearch(linear by random, 3 candidates: a, b on 4 rows)"


def test_a_search_document_is_the_same_after_reading() -> None:
    written = document().model_dump_json()
    assert SearchDocument.model_validate_json(written) == document()
    first, _, last = document().model_dump()["candidates"]
    assert "reused_from" not in first
    assert "objectives" not in last
    assert (last["reused_from"], last["fitness"]) == (1, None)


@pytest.mark.parametrize(
    ("prediction", "answer"),
    [
        (Prediction("sent2", "Good.", {}, label="positive", probability=0.9), "positive"),
        (Prediction("uabsa", "Good soup.", {}, tuples=(("soup", "positive"),), text="..."), "soup, positive"),
        (Prediction("uabsa", "Good soup.", {}, text="no list"), "no list"),
        (Prediction("stance", "Good.", {}, missing=("target",)), "needs target"),
    ],
)
def test_an_answer_in_words(prediction: Prediction, answer: str) -> None:
    assert prediction.answer == answer
    assert answer in repr(Predictions([prediction]))
    assert f"<td>{answer}</td>" in Predictions([prediction])._repr_html_()


def test_many_predictions_are_shown_in_part() -> None:
    one = Prediction("sent2", "Text & more", {}, label="positive", probability=0.9)
    many = Predictions([one] * 12)
    lines = repr(many).splitlines()
    assert (lines[0], lines[1]) == ("Predictions(12)", "  Text & more, sent2, positive, 0.90")
    assert lines[-1] == "  ... and 2 more"
    assert many._repr_html_().count("<tr>") == 13
    assert "Text &amp; more" in many._repr_html_()


def test_a_model() -> None:
    file, spec = SimpleNamespace(run="ab" * 32), SimpleNamespace(base=SimpleNamespace(name="tiny"))
    subtasks = {name: SUBTASKS[name] for name in ("sent2", "uabsa")}
    model = SentimentModel(file, RunConfig(), {}, spec, subtasks)  # type: ignore[arg-type]
    assert repr(model) == "SentimentModel(run abababab on tiny: sent2, uabsa)"
    html = model._repr_html_()
    assert "<td>sent2</td>" in html
    assert "<td>(aspect, polarity)</td>" in html
