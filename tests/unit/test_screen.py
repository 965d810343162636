"""The terminal of a run: what is kept of its updates, the time that is left, the picture, the lines."""

from __future__ import annotations

import io
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from flows.cli.screen import log_output, picture, screen, state
from flows.cli.screen.forecast import Forecast, pieces_of
from flows.cli.screen.picture import Picture
from flows.cli.screen.screen import Lines
from flows.cli.screen.state import RunState, clock
from flows.terminal import Terminal, console, fail, notes, output
from memmcl.config import RunConfig, parse_config
from tasks.ui.updates import EXPERTS, STAGES, Update

BEGINS = Update(EXPERTS, "stage")
ENDS = Update(EXPERTS, "stage", "done", seconds=83.0)


class Clock:
    """Stands for the clock."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def at(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    for module in (state, picture, screen):
        monkeypatch.setattr(module, "time", found)
    return found


@pytest.fixture
def run(at: Clock) -> RunState:
    """A run whose first stage is at work: one adapter was in the store, one is trained, one is in training."""
    found = RunState(STAGES)
    for update in (
        BEGINS,
        Update("warm start", "warm", "reused"),
        Update("expert asc", "expert"),
        Update("expert asc", "expert", "done", seconds=3.0),
        Update("expert sent2", "expert"),
        Update("expert sent2", "expert", done=34, total=80, words="loss 0.512"),
    ):
        found.take(update)
    return found


def text_of(renderable: object, width: int = 100, height: int = 30) -> list[str]:
    out = io.StringIO()
    Terminal(file=out, width=width, height=height).print(renderable)
    return out.getvalue().splitlines()


def drawn(run: RunState, width: int = 100, height: int = 30) -> list[str]:
    terminal = Terminal(file=io.StringIO(), width=width, height=height)
    found = Picture(terminal, run)
    found.facts = [("run 3f9a1c22", "quickstart: 6 subtasks"), ("store", f"file:///{'a-long-folder/' * 9}store")]
    return text_of(found.draw(), width, height)


def test_the_picture_shows_stages_and_what_workers_do(run: RunState, at: Clock) -> None:
    at.now += 65
    lines = drawn(run)
    assert lines[0].startswith("memmcl")
    assert lines[0].rstrip().endswith("elapsed 1:05")
    (stage,) = [line for line in lines if "stage 1 of 4" in line]
    assert "● stage 1 of 4: experts" in stage
    assert "1 warm start, 1 adapter, of them 1 from the store" in stage
    assert stage.rstrip().endswith("1:05")
    (work,) = [line for line in lines if "expert sent2" in line]
    assert work.rstrip().endswith("step 34 of 80, loss 0.512")
    assert "".join(lines).replace(" ", "").count("a-long-folder/") == 9, "what is long goes on in the next line"


def test_a_picture_fits_into_the_terminal(run: RunState) -> None:
    for number in range(60):
        run.take(Update(f"evaluation {number}", "evaluation"))
    for width, height in ((100, 30), (60, 24), (100, 16)):
        lines = drawn(run, width, height)
        assert len(lines) < height
        assert max(map(len, lines)) <= width
        assert not any("…" in line for line in lines)
        assert any(line.startswith("and ") and line.rstrip().endswith(" more") for line in lines)


def test_a_stage_that_ended_has_its_facts_and_its_works_are_gone(run: RunState) -> None:
    run.take(ENDS)
    assert run.stage is None
    assert run.works == {}
    assert run.stages[0].facts() == "1 warm start, 1 adapter, of them 1 from the store"


def test_candidates_of_a_search_are_counted(run: RunState) -> None:
    for update in (
        Update("search SC", "search"),
        Update("search SC", "search", done=20, total=20, lines=("SC: best",)),
    ):
        run.take(update)
    assert run.best == ("SC: best",)
    run.take(Update("search SC", "search", "done"))
    assert "20 candidates" in run.stages[0].facts()


def test_lines_tell_begin_and_end_of_a_stage_and_progress_ever_less_often(
    run: RunState, at: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []

    class Event:
        """Stands for the end of the run: it comes after 12 hours."""

        def wait(self, seconds: float) -> bool:
            waits.append(seconds)
            at.now += seconds
            return at.now > 1000.0 + 12 * 3600

        def set(self) -> None:
            pass

    class Thread:
        def __init__(self, target: Callable[[], None], **_: object) -> None:
            self.start = target

    monkeypatch.setattr(screen.threading, "Event", Event)
    monkeypatch.setattr(screen.threading, "Thread", Thread)
    out = io.StringIO()
    lines = Lines(Terminal(file=out, width=100), run)
    lines.take(ENDS)
    said = out.getvalue().splitlines()
    assert said[0] == "  0:30  expert sent2 step 34 of 80, loss 0.512"
    assert said[-1] == "stage 1 of 4: experts, done in 83 s: 1 warm start, 1 adapter, of them 1 from the store"
    assert waits[:3] == [30.0] * 3
    assert len(said) < 45, "of twelve hours"


def test_the_time_left_is_not_told_before_it_is_known() -> None:
    config = parse_config({"data": {"subtasks": ["sent2", "irony"], "weak_rows": 10, "test_rows": 10}}, "test")
    forecast = Forecast(config)
    assert forecast.left(0.0) is None
    steps = sum(piece.size for _, piece in pieces_of(config) if piece.kind == "training")
    for name, piece in pieces_of(config):
        if piece.kind == "training":
            forecast.take(Update(name, "expert"), 0.0)
            forecast.take(Update(name, "expert", "done", seconds=piece.size * 0.5), 1.0)
    assert steps
    assert forecast.left(2.0) is None, "nobody knows how long scoring takes"
    rows = {name: piece.size for name, piece in pieces_of(config) if piece.kind == "scoring"}
    for name in ("reference sent2", "reference irony"):
        forecast.take(Update(name, "reference", "done", seconds=2.0 * rows.pop(name)), 2.0)
    assert forecast.left(3.0) is None, "nobody knows how long a candidate takes: it is merged, too"
    pieces = dict(pieces_of(config))
    search = Update("search SC, MAST", "search", total=10)
    forecast.take(search, 3.0)
    forecast.take(replace(search, done=5), 13.0)
    searching = 10.0 * (1 + 2 * pieces["search 2"].size / pieces["search 1"].size)
    assert forecast.left(13.0) == pytest.approx(searching + 2.0 * sum(rows.values()) / config.ray.workers)
    for name, kind in (("search SC, MAST", "search"), ("search unified", "search"), *((name, "x") for name in rows)):
        forecast.take(Update(name, kind, "reused"), 14.0)
    assert forecast.left(15.0) == 0.0


def test_what_an_earlier_process_did_is_no_measure() -> None:
    config = RunConfig()
    forecast = Forecast(config)
    forecast.take(Update("warm start", "warm", done=90, total=100), 0.0)
    forecast.take(Update("warm start", "warm", done=91, total=100), 10.0)
    piece = forecast._pieces["warm start"]
    assert (piece.restored, piece.done, piece.started) == (0.9, 0.91, 0.0)


@pytest.mark.parametrize(("seconds", "said"), [(5, "0:05"), (65.9, "1:05"), (3753, "1:02:33")])
def test_a_clock(seconds: float, said: str) -> None:
    assert clock(seconds) == said


CHILD = """
import logging, os, subprocess, sys
from flows.cli.screen import log_output
from flows.terminal import console, fail, notes, output
from memmcl.errors import UsageError
what = sys.argv[1]
output.choose(verbose=what == "verbose")
try:
    with log_output() as log:
        notes.print("note")
        console.print("result")
        if what != "silent":
            print("library on stdout")
            print("library on stderr", file=sys.stderr)
            os.write(1, b"C on stdout\\n")
            subprocess.run(["sh", "-c", "echo child; echo child >&2"])
            logging.getLogger("some.library").warning("a library warns")
        logging.getLogger("memmcl.store").warning("not of this package")
        if what == "failing":
            raise UsageError("it failed")
except UsageError as error:
    fail(str(error))
print("after")
"""


def said_by(what: str, folder: Path) -> tuple[list[str], list[str], list[Path]]:
    done = subprocess.run(
        [sys.executable, "-c", CHILD, what],
        env=os.environ | {"TMPDIR": str(folder)},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.splitlines(), done.stderr.splitlines(), sorted(folder.glob("memmcl-*/logs/*.log"))


def test_what_others_print_is_in_the_log(tmp_path: Path) -> None:
    out, err, (log,) = said_by("working", tmp_path)
    assert (out, err) == (["note", "result", "after"], [])
    text = log.read_text()
    for line in ("library on stdout", "library on stderr", "C on stdout", "child\nchild"):
        assert line in text
    assert log.stat().st_mode & 0o777 == 0o600


def test_a_failure_names_the_log(tmp_path: Path) -> None:
    out, err, (log,) = said_by("failing", tmp_path)
    assert out == ["note", "result", "after"]
    assert err == [f"the log of this command is {log}", "error: it failed"]


def test_a_log_with_nothing_in_it_is_removed(tmp_path: Path) -> None:
    assert said_by("silent", tmp_path) == (["note", "result", "after"], [], [])


def test_verbose_keeps_nothing_back(tmp_path: Path) -> None:
    out, err, logs = said_by("verbose", tmp_path)
    assert logs == []
    assert {"library on stdout", "C on stdout", "child"} <= set(out)
    assert "library on stderr" in err


def test_a_command_that_is_started_without_stdout_runs(tmp_path: Path) -> None:
    done = subprocess.run(
        ["sh", "-c", 'exec "$0" -c "$1" silent >&-', sys.executable, CHILD],
        env=os.environ | {"TMPDIR": str(tmp_path)},
        stderr=subprocess.PIPE,
        check=True,
    )
    assert done.stderr == b""


def test_a_warning_of_ours_is_said_on_the_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    said: list[str] = []
    record = logging.LogRecord("memmcl.store", logging.WARNING, state.__file__, 1, "2 rows \x1b[2J", (), None)
    with log_output(said.append):
        logging.getLogger("memmcl.store").handle(record)
        logging.getLogger("some.library").warning("not ours")
    assert said == ["2 rows \\u001b[2J"]


def test_results_and_notes_under_quiet_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    try:
        for options, expected in (
            ({}, "note\nresult\n"),
            ({"quiet": True}, "result\n"),
            ({"json": True}, '{\n "a": [\n  1\n ]\n}\n'),
        ):
            output.choose(**options)
            notes.print("note")
            console.print("result")
            output.answer({"a": {1}})
            fail("error")
            out, err = capsys.readouterr()
            assert (out, err) == (expected, "error: error\n")
    finally:
        output.choose()
