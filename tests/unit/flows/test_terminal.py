"""What reaches the terminal: text that others wrote does nothing there."""

from __future__ import annotations

import io
import json
import re
import sys

import pytest
from rich.live import Live
from rich.progress import Progress, TextColumn
from rich.table import Table
from rich.text import Text

from flows.cli import main
from flows.terminal import Terminal, console, fail, output, warn

HOSTILE = "a\x1b[2J\x1b]8;;https://evil\x07b\x9b31m\u202ec\r\x7f\x08[red]d[/red] [link=https://evil]e[/link] :bomb:"
ACTIVE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
OURS = re.compile(r"\x1b\[[0-9;]*[mKAG]|\x1b\[\?25[lh]|\r")
"""Control codes that rich writes for colours, and to draw a moving line anew."""


def shown(renderable: object, **options: object) -> str:
    out = io.StringIO()
    Terminal(file=out, width=200, **options).print(renderable)
    return out.getvalue()


def table() -> Table:
    found = Table(HOSTILE, "number", title=HOSTILE, box=None)
    found.add_row(HOSTILE, "1")
    found.add_row(Text(HOSTILE), Text.assemble((HOSTILE, "bold")))
    return found


@pytest.mark.parametrize("renderable", [HOSTILE, Text(HOSTILE), table(), Text.assemble((HOSTILE, "red"), HOSTILE)])
def test_nothing_that_is_printed_is_obeyed(renderable: object) -> None:
    for options in ({}, {"force_terminal": True, "color_system": "truecolor"}):
        text = OURS.sub("", shown(renderable, **options))
        assert not ACTIVE.search(text)
        assert "[red]d[/red] [link=https://evil]e[/link] :bomb:" in text
        assert r"a\u001b[2J\u001b]8;;https://evil" in text


def test_columns_are_as_wide_as_what_is_shown() -> None:
    lines = shown(table()).splitlines()
    assert len({line.rindex("1") for line in lines if line.rstrip().endswith(" 1")}) == 1
    assert all("…" not in line for line in lines)


def test_moving_lines_are_clean_too() -> None:
    out = io.StringIO()
    terminal = Terminal(file=out, width=200, force_terminal=True, color_system=None)
    with Progress(TextColumn("{task.fields[name]}", markup=False), console=terminal) as bar:
        bar.update(bar.add_task("x", name=HOSTILE), advance=1)
    with Live(table(), console=terminal, auto_refresh=False) as live:
        live.update(table(), refresh=True)
    with terminal.status(Text(HOSTILE)):
        pass
    assert not ACTIVE.search(OURS.sub("", out.getvalue()))


def test_json_stays_json() -> None:
    out = io.StringIO()
    value = {"name": "a\x9b\x7f\u202e\x1b[red]", "n": [1]}
    Terminal(file=out, width=40).print_json(json.dumps(value, ensure_ascii=False))
    assert json.loads(out.getvalue()) == value
    assert not ACTIVE.search(out.getvalue())


def test_the_result_as_json_is_clean_and_stays_json(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    monkeypatch.setattr(console, "_file", out)
    monkeypatch.setattr(output, "json", True)
    output.answer({"name": HOSTILE, "file": "a\udcffb", "url": "s3://me:hunter2@bucket/x", "n": [1.5]})
    assert not ACTIVE.search(out.getvalue())
    out.getvalue().encode()
    assert "hunter2" not in out.getvalue()
    value = json.loads(out.getvalue())
    assert value == {"name": HOSTILE, "file": "a\udcffb", "url": "s3://***@bucket/x", "n": [1.5]}


def test_errors_and_warnings_are_clean_lines(capsys: pytest.CaptureFixture[str]) -> None:
    for say in (fail, warn):
        say(f"no {HOSTILE}\nat https://host/a?sig=hunter2, https://me:hunter2@host/b")
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 2
    assert not ACTIVE.search(said)
    assert "hunter2" not in said
    assert "[red]d[/red]" in said


@pytest.mark.parametrize(
    "arguments",
    [
        [HOSTILE],
        ["run", "a", HOSTILE],
        ["run", HOSTILE],
        ["data", "list", f"--{HOSTILE}"],
        ["store", "show", HOSTILE],
        ["data", "check", HOSTILE],
        ["run", "x", "--port", HOSTILE],
        ["store", "ls", "--store", f"s3://{HOSTILE}"],
    ],
)
def test_refused_arguments_are_clean(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["memmcl", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code
    said = "".join(capsys.readouterr())
    assert said
    assert not ACTIVE.search(OURS.sub("", said))
