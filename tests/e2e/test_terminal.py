"""What a run prints: in a terminal one live picture, elsewhere about thirty lines; the rest is in a log."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from e2e_driver import COMMAND, ONE_WORKER, Desk, tiny_config

from tasks.ui.updates import STAGES

pytestmark = pytest.mark.timeout(1800)


@pytest.fixture(scope="module")
def recorder() -> ModuleType:
    """The script that records terminals."""
    path = Path(__file__).parents[2] / "benchmarks" / "record_terminal.py"
    spec = importlib.util.spec_from_file_location("record_terminal", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def test_without_a_terminal_a_run_prints_about_thirty_lines(reference: Desk) -> None:
    out = (reference.root / "out.txt").read_text().splitlines()
    assert len(out) < 50
    for number, title in enumerate(STAGES, start=1):
        assert f"stage {number} of 4: {title}" in out
        (ended,) = [line for line in out if line.startswith(f"stage {number} of 4: {title}, done in ")]
        assert number == 4 or ended.count(": ") == 2, "what came out of it"
    assert any(re.match(r"Ship ", line) for line in out), "which model"
    for what in ("unified model", "report", "predict", "export", "run history"):
        assert any(line.startswith(f"{what:<14} ") for line in out), what
    assert (reference.root / "err.txt").read_text() == ""


def test_what_prefect_and_ray_say_is_in_the_log(reference: Desk) -> None:
    (name,) = re.findall(r"^log: (\S+)$", (reference.root / "out.txt").read_text(), re.MULTILINE)
    text = Path(name).read_text()
    assert "Finished in state" in text
    assert "training on" in text, "lines of workers, too"
    assert "__magic_token__" not in text


def test_a_finished_run_as_json(reference: Desk) -> None:
    done = reference.store.list("run")[0].key
    for arguments in (("run", reference.config), ("report",)):
        ended = reference.run(*arguments, "--json")
        assert (ended.code, ended.err) == (0, ""), ended
        said = json.loads(ended.out)
        assert said["run"] == done
        assert said["ship"]["model"] in ("unified", "joint", "base")
        assert Path(reference.cwd, said["files"]["report"]).is_file()
        assert {entry["model"] for entry in said["results"]["means"]} >= {"base", "unified", "joint"}
    quiet = reference.run("run", reference.config, "--quiet")
    assert quiet.code == 0
    assert "from the store" not in quiet.out
    assert re.search(r"^unified .*\d", quiet.out, re.MULTILINE)
    asked = json.loads(reference.run("predict", "The food was great.", "--json").out)
    assert {one["subtask"] for one in asked["predictions"]} >= {"sent2", "irony"}


def test_in_a_terminal_a_run_is_one_picture(recorder: ModuleType, tiny_base: Path, tmp_path: Path) -> None:
    """No line is clipped, none is foreign, and it is never silent for long."""
    settings = tiny_config(tiny_base)
    settings["data"]["subtasks"] = ["sent2", "irony"]
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(settings))
    recording = recorder.record([str(COMMAND), "run", "two.yaml", *ONE_WORKER], tmp_path)
    faults, screen = recorder.faults_of(recording)
    assert [fault for fault in faults if "silence" not in fault] == [], "silence is for a machine that is not busy"
    recorder.write_image(tmp_path / "image.svg", screen)
    image = (tmp_path / "image.svg").read_text()
    assert "stage" in image
    assert "http://" not in image.replace("http://www.w3.org/2000/svg", "").replace("http://127.0.0.1", "")
    *_, (_, last) = recorder.frames(recording)
    text = "\n".join(last.lines())
    assert "Ship " in text
    assert "memmcl predict" in text
    assert "stage 1 of 4" not in text, "the picture is gone"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("ab\r\n\x1b[1mcd\x1b[0m\r\n", ["ab", "cd"]),
        ("ab\r\ncd\r\x1b[2K\x1b[1A\x1b[2Kx", ["x", ""]),
        ("a" * 101, ["a" * 100, "a"]),
    ],
)
def test_the_recorder_reads_what_rich_writes(recorder: ModuleType, text: str, said: list[str]) -> None:
    screen = recorder.Screen()
    screen.feed(text)
    assert screen.lines()[:2] == said
    assert screen.overflows == (len(text) > 100 and "\x1b" not in text)


def test_the_recorder_sees_what_is_wrong(recorder: ModuleType) -> None:
    end = "\r\x1b[2K\x1b[1A\x1b[2K"
    bytes_of = "memmcl   elapsed 0:01\r\nWARNING: a library\r\n● stage 1 of 4: exp…\r\n" + end
    recording = recorder.Recording([(0.5, bytes_of.encode()), (12.0, b"end")], 12.5, 1)
    faults, _ = recorder.faults_of(recording)
    assert {fault.partition(":")[0] for fault in faults} >= {"not ours", "clipped"}
    assert any("11.5 s of silence after 0.5 s" in fault for fault in faults)
    assert any("exit code 1" in fault for fault in faults)
