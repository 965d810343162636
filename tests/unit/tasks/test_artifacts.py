"""What the Prefect UI shows: names are text there, not Markdown, and commands are safe to copy."""

from __future__ import annotations

import shlex
from typing import Any

import pytest
from markdown_it import MarkdownIt
from report_fixture import results_document

from memmcl.evaluate.promotion import Judgement, SubtaskDuel
from memmcl.report import parse_results
from tasks.ui import artifacts

EVIL = "x](javascript:1) | <img src=x onerror=alert(1)>\n\n# `code` **bold** ![a](http://evil) \x1b[2J"
MARKDOWN = MarkdownIt("gfm-like", {"linkify": False, "html": True})
STORE = "s3://x/$(touch planted)`id`"


def kinds(source: str) -> set[str]:
    """Return what Markdown is made of: types of blocks, and of what is in them."""
    tokens = MARKDOWN.parse(source)
    every = [*tokens, *(child for token in tokens for child in token.children or ())]
    return {token.type for token in every if token.content != "<br>"}  # our own, in the heads of a table


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = []
    monkeypatch.setattr(artifacts, "create_markdown_artifact", lambda text, **rest: made.append({"text": text, **rest}))
    monkeypatch.setattr(artifacts, "create_table_artifact", lambda rows, **rest: made.append({"rows": rows, **rest}))
    return made


def test_the_summary_is_text_and_its_commands_can_be_copied(shown: list[dict[str, Any]]) -> None:
    document = results_document()
    document["run"] |= {"name": EVIL, "store_url": STORE}
    document["run"]["base"]["name"] = EVIL
    document["data"]["source"] = EVIL
    for model in document["models"]:
        model["title"] = EVIL
    artifacts.show_results(parse_results(document))
    (summary,) = (one["text"] for one in shown if "text" in one)
    found = kinds(summary)
    assert "code_block" in found
    assert not found & {"html_block", "html_inline", "image", "link_open", "code_inline", "fence"}
    assert summary.count("\n#") == 1, "its own heading below the first"
    commands = [line.strip() for line in summary.splitlines() if line.startswith("    ")]
    assert len(commands) == 2
    for command in commands:
        words = shlex.split(command)
        assert words[words.index("--store") + 1] == STORE
    for one in shown:
        assert not kinds(one["description"]) & {"html_block", "html_inline", "image", "link_open", "code_inline"}
        assert "\x1b" not in one["description"] + one.get("text", "")


def test_cells_of_tables_are_text(shown: list[dict[str, Any]]) -> None:
    artifacts.show_changes([{"subtask": EVIL, "train": "same", "rows": 3}], "0a")
    document = results_document()
    for model in document["models"]:
        model["title"] = EVIL
    artifacts.show_results(parse_results(document))
    tables = [one["rows"] for one in shown if "rows" in one]
    assert len(tables) == 3
    assert tables[0][0]["rows"] == 3
    for cell in (cell for rows in tables for row in rows for cell in row.values() if isinstance(cell, str)):
        assert not kinds(cell) & {"html_block", "html_inline", "image", "link_open", "code_inline", "strong_open"}
        assert "\x1b" not in cell


def test_a_decision_is_text(shown: list[dict[str, Any]]) -> None:
    duel = SubtaskDuel(subtask=EVIL, rows=3, challenger=0.5, champion=0.4, difference=0.1, se=0.1)
    judged = Judgement(promoted=False, reason=EVIL, difference=0.1, se=0.1, p=0.3, margin=2.0, duels=(duel,))
    artifacts.show_judgement(judged, "0a", "0b")
    assert not kinds(shown[0]["text"]) & {"html_block", "html_inline", "image", "link_open", "code_inline"}
    assert "\x1b" not in shown[0]["text"]
