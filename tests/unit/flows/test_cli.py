"""The command line: help that teaches, output that is printed as it is, and the last resort for errors."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.core import TyperCommand, TyperGroup

from flows.cli import root as cli
from flows.cli import run as run_command
from memmcl import __version__
from memmcl.config import load_config
from memmcl.store import Store

COMMAND = Path(sys.executable).with_name("memmcl")
KEY = "0123456789abcdef" * 4


def commands(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], TyperCommand | TyperGroup]]:
    yield path, command
    if isinstance(command, TyperGroup):
        for name, below in command.commands.items():
            yield from commands(below, (*path, name))


def examples(command: TyperCommand | TyperGroup) -> list[str]:
    lines = (command.help or "").replace("\\[", "[").splitlines()
    return [line.strip().removeprefix("$ ") for line in lines if line.strip().startswith("$ ")]


COMMANDS = dict(commands(typer.main.get_command(cli.app)))
EXAMPLES = sorted({example for command in COMMANDS.values() for example in examples(command)})


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["memmcl", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


def test_the_commands() -> None:
    assert {" ".join(path) for path in COMMANDS} == {
        "",
        "run",
        "retrain",
        "report",
        "ui",
        "predict",
        "deploy",
        "version",
        "data",
        "data list",
        "data check",
        "data stats",
        "data fetch",
        "experts",
        "experts anchor",
        "merge",
        "merge search",
        "search",
        "search show",
        "search resume",
        "champion",
        "champion show",
        "champion history",
        "champion rollback",
        "store",
        "store ls",
        "store show",
        "store fetch",
        "store verify",
        "store gc",
        "store rm",
    }


@pytest.mark.parametrize("width", [80, 120])
def test_help_teaches_at_every_width(width: int, tmp_path: Path) -> None:
    script = "import sys; from flows.cli import app\nfor path in sys.argv[1:]:\n" + (
        "    try: app([*path.split(), '--help'], prog_name='memmcl')\n    except SystemExit as e: assert not e.code\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *(" ".join(path) for path in COMMANDS)],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
        env={"COLUMNS": str(width), "LANG": "C.UTF-8", "PATH": ""},
    )
    assert done.stderr == ""
    assert max(map(len, done.stdout.splitlines())) <= width
    words = " ".join(done.stdout.replace("│", " ").split())
    for example in EXAMPLES:
        assert f"$ {example}" in words
    for path, command in COMMANDS.items():
        assert f"Usage: {' '.join(('memmcl', *path))} " in words
        assert command.help
        for parameter in command.params:
            described = getattr(parameter, "help", None)
            assert described, f"{' '.join(path)}: {parameter.name} says nothing"


@pytest.mark.parametrize("name", ["", "run", "report", "predict", "store ls", "store fetch"])
def test_commands_with_arguments_show_examples(name: str) -> None:
    shown = examples(COMMANDS[tuple(name.split())])
    assert shown
    assert all(example.startswith(f"memmcl {name}".rstrip()) for example in shown)


@pytest.mark.parametrize("example", EXAMPLES)
def test_an_example_is_a_command_that_works(example: str) -> None:
    _, *words = shlex.split(example)
    path = next(path for path in sorted(COMMANDS, key=len, reverse=True) if tuple(words[: len(path)]) == path)
    context = COMMANDS[path].make_context(" ".join(path), words[len(path) :])  # raises on what it does not know
    config = context.params.get("config")
    if path == ("run",) and (Path(__file__).parents[3] / str(config)).is_file():
        load_config(Path(__file__).parents[3] / str(config), context.params["set_"] or ())
    elif path == ("run",):
        load_config(None, context.params["set_"] or ())


def test_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "version") == 0
    assert capsys.readouterr().out == f"{__version__}\n"


def test_version_as_an_option_and_as_json(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"{__version__}\n"
    assert run(monkeypatch, "version", "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"version": __version__}


def test_every_command_that_prints_a_result_has_json() -> None:
    for path, command in COMMANDS.items():
        if isinstance(command, TyperGroup) and path != ("merge",):
            continue
        names = {option for parameter in command.params for option in parameter.opts}
        assert ("--json" in names) == (path != ("ui",)), path
    for name in ("run", "retrain", "predict", "merge", "merge search", "experts anchor", "search resume"):
        options = {option for one in COMMANDS[tuple(name.split())].params for option in one.opts}
        assert {"--quiet", "--verbose"} <= options, name


def test_json_is_all_that_is_on_stdout(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    url = str(tmp_path / "store")
    Store.open(url).publish("expert", KEY, name="[/x]", files={"a": b"b"})
    for arguments, key in {
        ("store", "ls"): KEY,
        ("store", "show", KEY[:5]): KEY,
        ("store", "fetch", KEY[:5], f"{url}/out"): KEY,
        ("store", "verify"): "problems",
        ("store", "gc"): "plan",
        ("champion", "history"): "[]",
    }.items():
        assert run(monkeypatch, *arguments, "--store", url, "--json") == 0
        out, err = capsys.readouterr()
        assert err == ""
        assert key in json.dumps(json.loads(out))
    assert run(monkeypatch, "data", "check", "--json") == 0
    assert json.loads(capsys.readouterr().out)["faults"] == []
    assert run(monkeypatch, "store", "ls", "--store", url) == 0
    assert KEY[:12] in capsys.readouterr().out, "the next command prints text again"
    assert run(monkeypatch, "store", "show", "[/y]", "--store", url, "--json") == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)


def test_quiet_and_verbose_exclude_each_other(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "run", "any.yaml", "--quiet", "--verbose") == 2
    assert "exclude each other" in capsys.readouterr().err


def test_the_shell_completes_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {"_MEMMCL_COMPLETE": "complete_bash", "COMP_WORDS": "memmcl st", "COMP_CWORD": "1"}
    done = subprocess.run([COMMAND], env=os.environ | asked, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["store"]
    assert "--install-completion" in (COMMANDS[()].help or "")


def test_brackets_and_colons_are_no_markup(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    url = str(tmp_path / "[bold]")
    Store.open(url).publish("expert", KEY, name="[/x] :cat:", files={"a": b"b"})
    assert run(monkeypatch, "store", "ls", "--store", url) == 0
    listed = capsys.readouterr().out
    assert "[/x] :cat:" in listed
    assert KEY[:12] in listed
    assert run(monkeypatch, "store", "ls", "expert", "--store", url) == 0
    assert capsys.readouterr().out == listed
    assert run(monkeypatch, "store", "show", KEY[:5], "--store", url) == 0
    assert '"name": "[/x] :cat:"' in capsys.readouterr().out
    assert run(monkeypatch, "store", "fetch", KEY[:5], f"{url}/out", "--store", url) == 0
    assert capsys.readouterr().out == f"{url}/out\n"
    assert (tmp_path / "[bold]" / "out" / "a").read_bytes() == b"b"
    assert run(monkeypatch, "store", "show", "[/y]", "--store", url) == 2
    assert capsys.readouterr().err == (
        f"error: no artifact has a key that starts with '[/y]' in file://{url}; `memmcl store ls` lists them\n"
    )


def test_an_error_nobody_expected_is_one_line_and_its_traceback_is_kept(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("first [/line]\nsecond line")

    monkeypatch.setattr(run_command, "load_config", broken)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert run(monkeypatch, "run", "any.yaml") == 1
    out, err = capsys.readouterr()
    (kept,) = tmp_path.glob("memmcl-*/errors/*.txt")
    assert out == ""
    assert err == (
        "error: unexpected RuntimeError: first [/line] second line; this is a defect of memmcl, please report it "
        f"with its traceback in {kept}\n"
    )
    assert "in broken" in kept.read_text()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    assert run(monkeypatch, "run", "any.yaml") == 1
    assert f"(its traceback could not be written to {tmp_path / 'missing'})\n" in capsys.readouterr().err


def test_ctrl_c_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run_command, "load_config", interrupted)
    assert run(monkeypatch, "run", "any.yaml") == 130
    assert capsys.readouterr() == ("", "error: interrupted; run the same command again to go on\n")
