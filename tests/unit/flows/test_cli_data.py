"""`memmcl data`: every planted fault is found with its file and line, and nothing else."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import Result
from tiny import make_sixteen
from typer.testing import CliRunner

from flows.cli.common import console
from flows.cli.data import data_app
from memmcl.errors import ConfigError, DataError
from memmcl.suite.subtasks import SUBTASKS

_FAULT = re.compile(r"^(?P<file>.+), line (?P<line>\d+): (?P<message>.+)$")


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give tables room, however wide the console was when some other test made it."""
    monkeypatch.setattr(console, "_width", 200)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(data_app, list(arguments))


def line(**values: Any) -> bytes:
    return json.dumps(values).encode()


def good(file: str, number: int) -> bytes:
    """Return a row without fault."""
    text = f"{file} number {number}"
    if file.endswith(".csv"):
        return f"{text},anger".encode()
    if file.startswith("absa/"):
        return line(text=text, label=[["food", "positive"]])
    if "asc" in file:
        return line(text=text, aspect="food", label="neutral")
    return line(text=text, label="positive")


TRAIN, DEV, TEST, CSV = (
    "sc/mr/train.jsonl",
    "sc/asc_rest14/dev.jsonl",
    "absa/uabsa_rest14/test.jsonl",
    "mast/emotion/train.csv",
)
PLANTED: list[tuple[str, bytes, str]] = [
    (TRAIN, line(text="a label of its own", label="great"), "unknown label 'great'"),
    (TRAIN, line(text="a label in capitals", label="Positive"), "write 'positive'"),
    (TRAIN, line(text="", label="positive"), "non-empty"),
    (TRAIN, b'{"text": "not closed", "label": "posi', "broken JSON"),
    (TRAIN, '{"text": "café", "label": "positive"}'.encode("latin-1"), "not UTF-8"),
    (TRAIN, b'{"text": "half \\ud83d", "label": "positive"}', "half a surrogate pair"),
    (TRAIN, line(text=None, label="positive"), "no value (null)"),
    (TRAIN, line(text="no label at all"), "no column 'label'"),
    (TRAIN, good(TRAIN, 0), "the same question and answer as"),
    (TRAIN, good(TRAIN, 1).replace(b"positive", b"negative"), "with another answer"),
    (DEV, line(text="an aspect is needed", label="neutral"), "no column 'aspect'"),
    (DEV, line(text="an aspect that is none", aspect="None", label="neutral"), "only the word 'None'"),
    (TEST, line(text="one too few", label=[["food"]]), "expected 2 strings"),
    (TEST, line(text="no such polarity", label=[["food", "good"]]), "unknown polarity 'good'"),
    (TEST, line(text="no list", label="food, positive"), "expected a list of"),
    (CSV, b"one field too many,joy,anger", "expected 2 fields"),
    (CSV, b"spaces around the label, joy ", "write 'joy'"),
    (CSV, b"NA,joy", "only the word 'NA'"),
    (CSV, b"x" * 20_001 + b",joy", "20001 characters"),
    (CSV, "na\u00efve,joy".encode("latin-1"), "not UTF-8"),
]


def make_directory(root: Path, planted: list[tuple[str, bytes, str]]) -> dict[tuple[str, int], str]:
    """Write rows with the planted ones between them; return (file, line) -> what the message must say."""
    expected = {}
    for dataset in ("sc/mr", "sc/asc_rest14", "absa/uabsa_rest14", "mast/emotion"):
        ending = "csv" if "emotion" in dataset else "jsonl"
        (root / dataset).mkdir(parents=True)
        for part in ("train", "dev", "test"):
            file = f"{dataset}/{part}.{ending}"
            lines = [b"text,label"] if ending == "csv" else []
            lines += [good(file, number) for number in range(4)]
            for number, (_, row, message) in enumerate(p for p in planted if p[0] == file):
                lines += [row, good(file, number + 4)]
                expected[file, len(lines) - 1] = message
            (root / file).write_bytes(b"\n".join(lines) + b"\n")
    return expected


def found(root: Path, output: str) -> dict[tuple[str, int], str]:
    matches = [match for match in map(_FAULT.match, output.splitlines()) if match and "warning: " not in match[0]]
    places = [(Path(match["file"]).relative_to(root).as_posix(), int(match["line"])) for match in matches]
    assert len(set(places)) == len(places)
    return dict(zip(places, (match["message"] for match in matches), strict=True))


def test_check_finds_exactly_the_twenty_planted_faults(tmp_path: Path) -> None:
    expected = make_directory(tmp_path, PLANTED)
    assert len(expected) == 20
    result = run("check", str(tmp_path))
    assert result.exit_code == 1
    messages = found(tmp_path, result.stdout)
    assert messages.keys() == expected.keys()
    for place, part in expected.items():
        assert part in messages[place], place
    assert result.stdout.splitlines()[-1].startswith("4 subtasks, ")
    assert result.stdout.splitlines()[-1].endswith(" 20 faults, 0 warnings")
    assert result.stdout.splitlines()[20:24] == [
        f"{tmp_path / TEST}: 1 tuple arity, 1 unknown polarity, 1 broken tuples",
        f"{tmp_path / CSV}: 1 broken line, 1 unknown label, 1 missing value, 1 long text, 1 encoding",
        f"{tmp_path / DEV}: 1 missing column, 1 missing value",
        f"{tmp_path / TRAIN}: 2 unknown label, 2 encoding, 1 empty text, 1 broken line, 1 missing value, "
        f"1 missing column, 1 repeated row, 1 contradicting row",
    ]


@pytest.mark.parametrize("number", range(len(PLANTED)))
def test_check_finds_each_planted_fault_alone(number: int, tmp_path: Path) -> None:
    expected = make_directory(tmp_path, [PLANTED[number]])
    result = run("check", str(tmp_path))
    assert result.exit_code == 1
    assert found(tmp_path, result.stdout).keys() == expected.keys()


def test_check_of_a_clean_directory_succeeds(tmp_path: Path) -> None:
    make_directory(tmp_path / "few", [])
    result = run("check", str(tmp_path / "few"))
    assert result.exit_code == 0
    assert result.stdout == "4 subtasks, 48 rows that can be used, 0 faults, 0 warnings\n"
    result = run("check", str(make_sixteen(tmp_path / "sixteen")))
    assert result.exit_code == 0
    assert result.stdout == "16 subtasks, 1,152 rows that can be used, 0 faults, 0 warnings\n"


def test_check_warns_of_repeated_test_rows_and_succeeds(tmp_path: Path) -> None:
    make_directory(tmp_path, [(TEST, good(TEST, 0), "")])
    result = run("check", str(tmp_path))
    assert result.exit_code == 0
    assert f"warning: {tmp_path / TEST}, line 5: the same question and answer" in result.stdout
    assert result.stdout.endswith(" 0 faults, 1 warnings\n")


def test_check_warns_of_folders_that_nothing_reads_and_of_leaks_that_stop_a_run(tmp_path: Path) -> None:
    leaked = line(text="sc/mr/test.jsonl NUMBER 2", label="positive")
    make_directory(
        tmp_path, [(TRAIN, leaked, ""), (DEV, line(text=f"{TEST} number 1", aspect="a", label="neutral"), "")]
    )
    (tmp_path / "sc/mrr").mkdir()
    result = run("check", str(tmp_path))
    assert result.exit_code == 0
    assert result.stdout.splitlines() == [
        "warning: sc/mrr: no data set of the catalogue is called so; nothing reads this folder",
        "warning: mr: 1 train rows have a text of its own test part; a run stops there, or drops them with "
        "data.on_overlap: drop",
        "4 subtasks, 52 rows that can be used, 0 faults, 2 warnings",
    ]


def test_check_says_how_many_sound_rows_a_run_would_leave_out(tmp_path: Path) -> None:
    make_directory(tmp_path, [])
    result = run("check", str(tmp_path), "--set", "data.pool_rows=3")
    assert result.exit_code == 0
    assert result.stdout.splitlines() == [
        "left out: 12 rows beyond data.pool_rows",
        "4 subtasks, 36 rows that can be used, 0 faults, 0 warnings",
    ]


def test_check_lists_every_fault_however_many(tmp_path: Path) -> None:
    make_directory(tmp_path, [(TRAIN, line(text=f"row {i}", label="other"), "") for i in range(1100)])
    result = run("check", str(tmp_path))
    assert len(found(tmp_path, result.stdout)) == 1100
    assert " 1,100 faults" in result.stdout


def test_a_missing_file_is_a_fault_and_does_not_hide_the_others(tmp_path: Path) -> None:
    expected = make_directory(tmp_path, [PLANTED[0], PLANTED[13]])
    (tmp_path / "sc/asc_rest14/test.jsonl").unlink()
    result = run("check", str(tmp_path))
    assert result.exit_code == 1
    assert found(tmp_path, result.stdout).keys() == expected.keys()
    assert f"{tmp_path / 'sc/asc_rest14'} has no test rows" in result.stdout
    assert " 3 faults" in result.stdout


def test_a_path_without_data_is_refused(tmp_path: Path) -> None:
    for command in ("check", "stats"):
        for path in (tmp_path, tmp_path / "missing"):
            result = run(command, str(path))
            assert isinstance(result.exception, DataError)
            assert "expected a directory in SentiEval's layout" in str(result.exception)


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A configuration with a subtask of the user's own; one of its rows cannot be used."""
    words = ("urgent", "calm")
    rows = "".join(f"Ticket number {i} of the queue,{words[i % 2]}\n" for i in range(60))
    (tmp_path / "tickets.csv").write_text(f"body,tone\n{rows}Last ticket,angry\n")
    config = tmp_path / "own.yaml"
    custom = {
        "name": "tone",
        "group": "MAST",
        "instruction": "Say urgent or calm.",
        "labels": list(words),
        "data": {"path": str(tmp_path / "tickets.csv"), "columns": {"text": "body", "label": "tone"}},
    }
    config.write_text(yaml.safe_dump({"data": {"subtasks": ["sent2", "tone"], "custom": [custom]}}))
    return config


def test_check_reads_the_sources_of_a_configuration(own: Path) -> None:
    result = run("check", "--config", str(own))
    assert result.exit_code == 1
    assert found(own.parent, result.stdout).keys() == {("tickets.csv", 62)}
    assert "unknown label 'angry' for subtask 'tone'" in result.stdout
    assert run("check", "--set", "data.subtasks=[sent2]").exit_code == 0


def test_list_shows_the_catalogue_and_marks_what_is_the_users_own(own: Path) -> None:
    result = run("list")
    assert result.exit_code == 0
    rows = {row.split()[0]: row for row in result.stdout.splitlines() if row.split()[0] in SUBTASKS}
    assert list(rows) == list(SUBTASKS)
    for name, subtask in SUBTASKS.items():
        assert all(word in rows[name] for word in (subtask.group, subtask.metric, *subtask.datasets, *subtask.labels))
        assert ", ".join(subtask.tuple_fields) in rows[name]
    assert "in the run" not in result.stdout
    result = run("list", "--config", str(own))
    shown = {row.split()[0]: row.rstrip() for row in result.stdout.splitlines()}
    assert "in the run" in shown["name"]
    assert "your own" in shown["tone"]
    assert [name for name in shown if shown[name].endswith("yes")] == ["sent2", "tone"]
    assert isinstance(run("list", "--set", "data.subtasks=[sent4]").exception, ConfigError)


def test_stats_are_one_json_object_for_machines(tmp_path: Path) -> None:
    make_directory(tmp_path, [PLANTED[0], (TRAIN, line(text=f"{TEST} number 0!", label="negative"), "")])
    result = run("stats", str(tmp_path), "--json")
    assert result.exit_code == 0
    stats = json.loads(result.stdout)
    assert set(stats) == {"parts", "leakage", "constants", "left_out"}
    (train,) = (part for part in stats["parts"] if (part["dataset"], part["part"]) == ("mr", "train"))
    assert (train["rows"], train["labels"]) == (7, {"positive": 6, "negative": 1})
    assert stats["leakage"] == [
        {"dataset": "mr", "part": "train", "test_dataset": "uabsa_rest14", "equal": 1, "sharing": 0}
    ]
    assert {one["subtask"]: one["answer"] for one in stats["constants"]} == {
        "sent2": "positive",
        "asc": "neutral",
        "uabsa": "[('food', 'positive')]",
        "emotion": "anger",
    }
    assert stats["left_out"] == {"rows that cannot be used: unknown label": 1}


def test_stats_are_tables_for_people(tmp_path: Path) -> None:
    make_directory(tmp_path, [PLANTED[0], (TRAIN, line(text=f"{TEST} number 0!", label="negative"), "")])
    result = run("stats", str(tmp_path))
    assert result.exit_code == 0
    lines = [row.split() for row in result.stdout.splitlines()]
    assert ["sent2", "mr", "train", "7", "7", "0", "6", "positive,", "1", "negative"] in lines
    assert ["mr", "train", "uabsa_rest14", "1", "0"] in lines
    assert ["uabsa", "[('food',", "'positive')]", "1.000"] in lines
    assert "left out: 1 rows that cannot be used: unknown label" in result.stdout
