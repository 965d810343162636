"""Parquet, terminal and Markdown tables against the document they come from."""

from __future__ import annotations

import copy
import io
from typing import Any

import pyarrow.parquet as pq
import pytest
from report_fixture import LEVELS, SUBTASKS, results_document
from rich.console import Console

from memmcl.report import markdown_table, results_table, write_tables


def _read(files: dict[str, bytes], name: str) -> list[dict[str, Any]]:
    return list(pq.read_table(io.BytesIO(files[name])).to_pylist())


def _printed(document: dict[str, Any], width: int = 100) -> str:
    console = Console(width=width, file=io.StringIO(), no_color=True)
    console.print(results_table(document, width=width))
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


def test_scores_and_contexts_come_back_as_they_were() -> None:
    document = results_document()
    files = write_tables(document)
    names = ("candidates", "contexts", "experts", "interference", "scores")
    assert sorted(files) == [f"{name}.parquet" for name in names]
    assert _read(files, "scores.parquet") == document["scores"]
    assert _read(files, "contexts.parquet") == document["curriculum"]["contexts"]
    assert _read(files, "experts.parquet") == document["experts"]
    assert _read(files, "interference.parquet") == document["interference"]


def test_candidates_come_back_with_their_search() -> None:
    document = results_document()
    rows = _read(write_tables(document), "candidates.parquet")
    expected = [(s, c) for s in document["searches"] for c in s["candidates"]]
    assert len(rows) == len(expected) == 80
    for row, (search, candidate) in zip(rows, expected, strict=True):
        assert (row["stage"], row["group"]) == (search["stage"], search["group"])
        assert {name: row[name] for name in ("index", "origin", "genome", "fitness", "reused")} == {
            name: candidate[name] for name in ("index", "origin", "genome", "fitness", "reused")
        }
        assert dict(row["values"]) == candidate["values"]
        assert {part: row[f"seconds_{part}"] for part in candidate["seconds"]} == candidate["seconds"]
        assert row["winner"] == (candidate["index"] == search["winner"])
    assert [row["index"] for row in rows if row["fitness"] is None] == [13]


def test_empty_tables_keep_their_columns() -> None:
    document = results_document()
    document.update(scores=[], searches=[], experts=[], interference=[], curriculum={})
    files = write_tables(document)
    assert all(pq.read_table(io.BytesIO(data)).num_rows == 0 for data in files.values())
    schema = pq.read_schema(io.BytesIO(files["candidates.parquet"]))
    assert str(schema.field("genome").type).startswith("list<")
    assert str(schema.field("fitness").type) == "double"
    schema = pq.read_schema(io.BytesIO(files["experts.parquet"]))
    assert str(schema.field("validation").type) == "list<element: struct<step: int64, loss: double>>"
    assert {str(schema.field(name).type) for name in ("anchor_every", "best_step", "rows_per_micro_batch")} == {"int64"}


def test_the_terminal_table_holds_every_score_within_its_width() -> None:
    text = _printed(results_document())
    assert max(map(len, text.splitlines())) <= 100
    lines = {line.split()[0]: line.split()[1:] for line in text.splitlines()}
    assert lines["model"] == [*SUBTASKS, "mean"]
    for model, levels in LEVELS.items():
        assert [cell.split("±")[0] for cell in lines[model][:6]] == [f"{level:.3f}"[1:] for level in levels]
        assert lines[model][6].endswith("±.016")


@pytest.mark.parametrize("extra", [0, 3, 10])
@pytest.mark.parametrize("width", [60, 80, 100])
def test_more_subtasks_and_narrow_terminals_still_fit(extra: int, width: int) -> None:
    document = results_document()
    for number in range(extra):
        document["subtasks"].append({**copy.deepcopy(document["subtasks"][0]), "name": f"more{number}"})
        sent2 = [score for score in document["scores"] if score["subtask"] == "sent2"]
        document["scores"] += [{**score, "subtask": f"more{number}"} for score in sent2]
    text = _printed(document, width)
    assert max(map(len, text.splitlines())) <= width
    assert ".817" in text  # the unified model on sent2
    if width == 100 or not extra:
        assert "…" not in "".join(text.splitlines()[2:])


def test_bold_marks_leaders_only() -> None:
    rows = [line.split(" | ") for line in markdown_table(results_document()).splitlines()]
    by_title = {row[0].removeprefix("| "): row for row in rows}
    assert by_title["Joint LoRA"][1] == "**0.614 ± 0.016**"
    assert by_title["Unified model"][1] == "0.571 ± 0.016"
    assert by_title["Experts, each on its own"][2] == "0.842 ± 0.033"
    assert by_title["Sum of all experts"][1] == "0.449 ± 0.016"
    assert by_title["LoRA on the weak rows"][1] == "0.383 ± 0.016"
    assert by_title["Best constant answer"][6] == "**0.667 ± 0.043**"


def test_markdown_has_one_cell_a_score_whatever_the_names_hold() -> None:
    document = results_document()
    document["models"][0]["title"] = "Base | <b>bold</b>\n**really**"
    lines = markdown_table(document).splitlines()
    assert len(lines) == 2 + len(LEVELS)
    assert lines[2].startswith(r"| Base \| &lt;b&gt;bold&lt;/b&gt; \*\*really\*\* | 0.286 ± 0.016 | 0.583 ± 0.045 |")
    assert {line.replace(r"\|", "").count("|") for line in lines} == {len(SUBTASKS) + 3}


def test_a_model_without_scores_is_a_row_of_dashes() -> None:
    document = results_document()
    document["scores"] = [score for score in document["scores"] if score["model"] != "joint"]
    document["means"] = [mean for mean in document["means"] if mean["model"] != "joint"]
    last = markdown_table(document).splitlines()[-1]
    assert last.count("\N{EN DASH}") == 7
    assert _printed(document).splitlines()[-1].split() == ["joint", *["\N{EN DASH}"] * 7]
