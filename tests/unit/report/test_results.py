"""The results schema and what the numbers allow to say."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
from pydantic import ValidationError
from report_fixture import results_document

from memmcl.errors import DataError
from memmcl.report import Results, parse_results
from memmcl.report.verdict import advice, leaders, outcome, plus_minus, signed, verdict


def test_the_document_survives_json() -> None:
    results = parse_results(results_document())
    again = Results.model_validate(json.loads(results.model_dump_json()))
    assert again == results
    assert results.score_of("unified", "sent2").score == 0.817  # type: ignore[union-attr]
    assert results.score_of("unified", "nothing") is None


def test_a_document_from_before_the_interference_is_still_read() -> None:
    document = results_document()
    del document["interference"], document["task_vectors"]
    document["retention"] = [part for part in document["retention"] if part.pop("model") == "unified"]
    since = ("anchor_every", "validation", "best_step", "stopped_early", "constant_weak_score", "gpu_memory_gb")
    for expert in document["experts"]:
        for field in (*since, "rows_per_micro_batch"):
            del expert[field]
    results = parse_results(document)
    assert results.interference == ()
    assert results.task_vectors is None
    assert {part.model for part in results.retention} == {"unified"}
    assert {(e.anchor_every, e.validation, e.best_step, e.stopped_early) for e in results.experts} == {
        (1, (), None, False)
    }


def test_seeds_are_told_by_their_origin() -> None:
    search = parse_results(results_document()).searches[0]
    assert [candidate.is_seed for candidate in search.candidates] == [True] * 6 + [False] * 14


def test_every_part_is_frozen() -> None:
    results = parse_results(results_document())
    with pytest.raises(ValidationError, match="frozen"):
        results.run.seed = 8  # type: ignore[misc]


@pytest.mark.parametrize("bad", [float("-inf"), float("nan"), float("inf"), None])
def test_a_failed_candidate_has_no_fitness(bad: float | None) -> None:
    document = results_document()
    document["searches"][0]["candidates"][3]["fitness"] = bad
    assert parse_results(document).searches[0].candidates[3].fitness is None


def _unknown_key(document: dict[str, Any]) -> None:
    document["run"]["colour"] = "blue"


def _unknown_model(document: dict[str, Any]) -> None:
    document["scores"][0]["model"] = "ghost"


def _double_score(document: dict[str, Any]) -> None:
    document["scores"].append(dict(document["scores"][0]))


def _unknown_merge(document: dict[str, Any]) -> None:
    document["retention"][3]["model"] = "ghost"


def _double_retention(document: dict[str, Any]) -> None:
    document["retention"].append(dict(document["retention"][0]))


def _unknown_expert(document: dict[str, Any]) -> None:
    document["interference"][9]["expert"] = "joint"


def _unknown_column(document: dict[str, Any]) -> None:
    document["interference"][9]["subtask"] = "base"


def _double_interference(document: dict[str, Any]) -> None:
    document["interference"].append({**document["interference"][0], "score": 0.9})


def _missing_winner(document: dict[str, Any]) -> None:
    document["searches"][3]["winner"] = 99


def _ragged_coefficients(document: dict[str, Any]) -> None:
    document["merge"]["coefficients"][1].append(0.5)


def _unknown_task_vector(document: dict[str, Any]) -> None:
    document["task_vectors"]["experts"][2] = "warm"


def _double_task_vector(document: dict[str, Any]) -> None:
    document["task_vectors"]["experts"][2] = "asc"


def _ragged_cosines(document: dict[str, Any]) -> None:
    document["task_vectors"]["layers"][1]["cosines"][2].append(0.5)


def _missing_norm(document: dict[str, Any]) -> None:
    del document["task_vectors"]["overall"]["norms"][0]


def _not_finite(document: dict[str, Any]) -> None:
    document["means"][0]["mean"] = float("nan")


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (_unknown_key, "run.colour"),
        (_unknown_model, "model 'ghost' is not one of"),
        (_double_score, "score 'base on sent2' is there twice"),
        (_unknown_merge, "model 'ghost' is not one of"),
        (_double_retention, "retention 'sum on sent2' is there twice"),
        (_unknown_expert, "expert 'joint' is not one of asc, aste, base"),
        (_unknown_column, "subtask 'base' is not one of asc, aste, emotion"),
        (_double_interference, "interference 'base on sent2' is there twice"),
        (_missing_winner, "candidate of Stage 2, unified '99' is not one of"),
        (_ragged_coefficients, "6 experts x 2 blocks"),
        (_unknown_task_vector, "expert 'warm' is not one of asc, aste"),
        (_double_task_vector, "task vector 'asc' is there twice"),
        (_ragged_cosines, "6 norms and 6 x 6 cosines, got 6 and rows of [6, 6, 7, 6, 6, 6]"),
        (_missing_norm, "6 norms and 6 x 6 cosines, got 5 and"),
        (_not_finite, "means.0.mean"),
    ],
)
def test_a_bad_document_is_refused_in_one_line(spoil: Any, told: str) -> None:
    document = results_document()
    spoil(document)
    with pytest.raises(DataError) as error:
        parse_results(document)
    assert told in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("difference", "se", "expected"),
    [(0.05, 0.02, "ahead"), (0.04, 0.02, "level"), (-0.05, 0.02, "behind"), (0.0, 0.0, "level"), (0.01, 0.0, "ahead")],
)
def test_a_difference_counts_beyond_two_standard_errors(difference: float, se: float, expected: str) -> None:
    assert outcome(difference, se) == expected


def test_numbers_are_printed_as_they_are() -> None:
    assert plus_minus(0.6124, 0.0306) == "0.612 ± 0.031"
    assert plus_minus(-0.25) == "\N{MINUS SIGN}0.250"
    assert plus_minus(None, 0.1) == "\N{EN DASH}"
    assert signed(0.05, 0.02) == "+0.050 ± 0.020"
    assert signed(-0.0001) == "+0.000"


def test_the_verdict_follows_the_comparisons() -> None:
    told = verdict(parse_results(results_document()))
    assert told.outcome == "ahead"
    assert told.headline == "The unified model beats the base model by 0.285 ± 0.019"
    assert [(s.comparison.b, s.outcome) for s in told.statements] == [
        ("task-arithmetic", "ahead"),
        ("joint", "behind"),
        ("unified", "level"),
    ]
    assert told.statements[1].text == "The unified model falls behind joint LoRA by 0.042 ± 0.015."
    assert told.subtasks.startswith("Above the base on 6 of 6 subtasks")


def test_the_verdict_compares_with_models_of_any_name() -> None:
    document = results_document()
    document["comparisons"] += [
        {"a": "unified", "b": "weak", "difference": 0.188, "se": 0.02, "n": 720},
        {"a": "sum", "b": "base", "difference": 0.163, "se": 0.02, "n": 720},
    ]
    told = verdict(parse_results(document))
    assert [statement.text for statement in told.statements[3:]] == [
        "The unified model beats LoRA on the weak rows by 0.188 ± 0.020.",
        "Sum of all experts beats the base model by 0.163 ± 0.020.",
    ]


def test_the_verdict_does_not_claim_a_win_within_the_error() -> None:
    document = results_document()
    document["comparisons"][0].update(difference=0.02, se=0.015)
    told = verdict(parse_results(document))
    assert told.outcome == "level"
    assert "beats" not in told.headline
    document["comparisons"] = []
    assert verdict(parse_results(document)).headline == "The unified model was not compared with its base"


@pytest.mark.parametrize(
    ("base", "joint", "model", "text"),
    [
        (0.2, -0.1, "joint", "Ship the joint LoRA: the unified model falls behind joint LoRA by 0.100 ± 0.020."),
        (
            0.2,
            0.01,
            "unified",
            "Ship the unified model: it beats the base model by 0.200 ± 0.020, and is level with joint LoRA "
            "(+0.010 ± 0.020).",
        ),
        (0.2, None, "unified", "Ship the unified model: it beats the base model by 0.200 ± 0.020."),
        (
            0.01,
            0.1,
            "base",
            "Ship none yet: the unified model is level with the base model (+0.010 ± 0.020), and beats joint LoRA by "
            "0.100 ± 0.020. More rows or steps may help.",
        ),
    ],
)
def test_the_advice_follows_the_verdict(base: float, joint: float | None, model: str, text: str) -> None:
    document = results_document()
    document["comparisons"] = [
        {"a": "unified", "b": name, "difference": difference, "se": 0.02, "n": 720}
        for name, difference in (("base", base), ("joint", joint))
        if difference is not None
    ]
    told = advice(parse_results(document))
    assert (told.model, told.text) == (model, text)


def test_leaders_are_the_best_and_all_within_one_standard_error() -> None:
    document = results_document()
    for score in document["scores"]:
        if score["subtask"] == "sent2":
            value = {"joint": 0.80, "unified": 0.77, "uniform": 0.74, "experts": 0.99}
            score.update(score=value.get(score["model"], 0.1), se=0.04)
    assert leaders(parse_results(document), "sent2") == {"joint", "unified"}
    assert leaders(parse_results(document), None) == {"joint"}
    document["means"] = []
    assert leaders(parse_results(document), None) == frozenset()


def test_importing_the_report_loads_no_heavy_package() -> None:
    code = (
        "import sys, memmcl.report; "
        "print([m for m in ('torch', 'matplotlib', 'pyarrow', 'prefect', 'ray') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
