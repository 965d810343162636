"""Hostile configurations: each is refused with one short line, soon, and before anything is built of it."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import hostile
import pytest
from hostile import PLANTED
from hypothesis import given, settings
from hypothesis import strategies as st

from flows.cli import root as cli
from memmcl.config import load_config, parse_config
from memmcl.errors import MESSAGE, VALUE, ConfigError, MemmclError, bounded, shown
from memmcl.files.untrusted import YAML_NODES, parse_json, parse_yaml

pytestmark = pytest.mark.timeout(20)

refused = partial(hostile.refused, MemmclError)


def alias_bomb(levels: int) -> str:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, levels)]
    return "\n".join(lines)


CASES: dict[str, tuple[str | bytes, str]] = {
    "alias bomb": (alias_bomb(9), "more than 100,000 values, what its aliases repeat included"),
    "alias bomb by merge keys": (
        "a0: &a0 {x: 1, y: 2}\n"
        + "\n".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}" for i in range(1, 9)),
        "more than 100,000 values",
    ),
    "alias within itself": ("name: &a [*a]", "the alias *a names nothing that is complete before it"),
    "deep": ("name: " + "[" * 100_000, "nested deeper than 64"),
    "deep by lines": ("\n".join(" " * depth + "a:" for depth in range(200)), "nested deeper than 64"),
    "large": ("name: " + "x" * 2_000_000, "more than 1,048,576 bytes"),
    "many values": ("[" + "1," * 100_001 + "]", "more than 100,000 values"),
    "long number": ("seed: " + "9" * 100_000, "a number of 100,000 characters"),
    "number to the base 60": ("seed: " + "1:" * 200_000 + "1", "a number of 400,001 characters"),
    "no such day": ("name: 2001-99-99", "month must be in 1..12"),
    "not UTF-8": (b"name: \xff", "is not YAML"),
    "NUL": ("name: a\0b", "is not YAML"),
    "long key": (f"? {'k' * 900}\n: 1", "unknown key 'kkk"),
    "long value": (f"seed: '{PLANTED}'", "seed: input should be a valid integer"),
    "long list": (f"seed: [{', '.join(['word'] * 10_000)}]", "seed: input should be a valid integer"),
    "many mistakes": ("data: {custom: [" + ", ".join(["{name: UP}"] * 500) + "]}", "more"),
    "many subtasks and sources": (
        "data:\n  subtasks: ["
        + ", ".join(f"s{i}" for i in range(8_000))
        + "]\n  sources:\n"
        + "\n".join(f"    n{i}: {{path: a}}" for i in range(8_000)),
        "data.sources names 'n0', which is not in data.subtasks",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_hostile_file(tmp_path: Path, name: str) -> None:
    content, expected = CASES[name]
    path = tmp_path / "run.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(lambda: load_config(path), expected)


def test_a_file_without_end() -> None:
    refused(lambda: load_config(Path("/dev/zero")), "more than 1,048,576 bytes")


SETTINGS = {
    "long value": (f"experts.steps={PLANTED}", "experts.steps: input should be a valid integer"),
    "long key": (f"{'a b' * 40_000}=1", "unknown key"),
    "deep key": (f"{'a.' * 60_000}a=1", "unknown key"),
    "no value": (PLANTED, "--set expects key=value"),
    "deep value": ("seed=" + "[" * 100_000, "nested deeper than 64"),
    "long number": ("seed=" + "9" * 100_000, "a number of 100,000 characters"),
    "alias bomb": ("seed=" + alias_bomb(9), "not a YAML value"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_hostile_setting(name: str) -> None:
    override, expected = SETTINGS[name]
    refused(lambda: load_config(None, [override]), expected)


def test_anchors_and_aliases_of_honest_files_still_work(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        "data:\n  subtasks: [sent2, irony]\n  sources:\n    sent2: &rows {path: rows.csv, columns: {text: tweet}}\n"
        "    irony: {<<: *rows, path: other.csv}\n"
    )
    sources = load_config(path).data.sources
    assert (sources["irony"].path, sources["irony"].columns) == ("other.csv", {"text": "tweet"})


def test_aliases_are_counted_as_often_as_they_are_written() -> None:
    parse_yaml("a: &a [" + "1, " * 900 + "1]\nb: [" + "*a, " * 100 + "*a]")
    with pytest.raises(ValueError, match=f"more than {YAML_NODES:,} values"):
        parse_yaml("a: &a [" + "1, " * 900 + "1]\nb: [" + "*a, " * 120 + "*a]")


JSON = {
    "a key twice": (b'{"a": 1, "b": {"c": 1, "c": 2}}', "the key 'c' twice"),
    "NaN": (b"[NaN]", "NaN is no JSON number"),
    "infinity": (b"-Infinity", "-Infinity is no JSON number"),
    "deep list": (b"[" * 100_000, "nested too deep"),
    "deep object": (b'{"a":' * 100_000, "nested too deep"),
    "not UTF-8": (b'"\xff"', "not UTF-8"),
    "long number": (b"9" * 100_000, "Exceeds the limit"),
    "long": (b" " * 101, "more than 100 bytes"),
    "cut off": (b"{", "Expecting"),
}


@pytest.mark.parametrize("name", JSON)
def test_hostile_json(name: str) -> None:
    data, expected = JSON[name]
    with pytest.raises(ValueError, match=expected):
        parse_json(data, 100 if name == "long" else 1 << 20)


def test_a_byte_order_mark_is_read() -> None:
    assert parse_json(b'\xef\xbb\xbf{"a": 1}') == {"a": 1}


# --- messages


@pytest.mark.timeout(60)
@settings(max_examples=50, deadline=None)
@given(
    st.recursive(
        st.one_of(st.text(max_size=30), st.integers(), st.floats(), st.binary(max_size=9), st.none()).map(
            lambda value: value * 2_000 if isinstance(value, str | bytes) else value
        ),
        lambda inner: st.lists(inner, max_size=40) | st.dictionaries(st.text(max_size=4), inner, max_size=40),
        max_leaves=60,
    )
)
def test_a_shown_value_is_short_and_printable(value: object) -> None:
    text = shown(value)
    assert len(text) <= VALUE
    assert text.isprintable()


def test_integers_that_python_does_not_write() -> None:
    huge = 1 << 100_000
    for value in (huge, -huge, [huge], (1, (huge,))):
        assert "too long to be shown" in shown(value)


def test_values_that_hold_themselves() -> None:
    nested: list[object] = []
    for _ in range(100_000):
        nested = [nested]
    assert len(shown(nested)) <= VALUE
    loop: list[object] = []
    loop.append(loop)
    assert len(shown(loop)) <= VALUE


@pytest.mark.parametrize("value", ["plain", "it's", 'a "b"', "naïve", "tab\t", ["a", 1], {"b": 1}, None, 1.5])
def test_a_short_value_is_as_python_writes_it(value: object) -> None:
    assert shown(value) in {repr(value), ascii(value)}


@given(st.text(alphabet="ab ", max_size=3).map(lambda text: text * 3_000) | st.text())
def test_a_message_is_bounded(text: str) -> None:
    message = str(ConfigError(text))
    assert len(message) <= MESSAGE
    assert all(len(word) <= VALUE for word in message.split())
    assert bounded(message) == message
    if len(text) <= VALUE:
        assert message == text


def test_the_beginning_and_the_end_of_a_long_message_stay() -> None:
    message = bounded(f"cannot read {'x' * 5_000}: {'word ' * 1_000}; correct the file")
    assert message.startswith("cannot read xxx")
    assert message.endswith("; correct the file")


COMMANDS = [
    ["run", PLANTED],
    ["run", "x.yaml", "--set", PLANTED],
    ["merge", "--base", "b", "--expert", PLANTED, "--out", "o"],
    ["merge", "--base", "b", "--expert", "a=b", "--out", "o", "--weights", PLANTED],
    ["merge", "--base", "b", "--expert", "a=b", "--out", "o", "--method", PLANTED],
    ["merge", "--base", "b", "--expert", "a=b", "--out", "o", "--param", f"density={PLANTED}"],
    ["merge", "--base", "b", "--expert", f"a={PLANTED}", "--out", "o"],
    ["experts", "anchor", "--base", "b", "--adapter", "a", "--texts", "t", "--out", "o", "--subtask", PLANTED],
    ["experts", "anchor", "--base", "b", "--adapter", PLANTED, "--texts", "t", "--out", "o", "--subtask", "sent2"],
    ["merge", "--base", PLANTED, "--expert", "a=memory://nowhere", "--out", "o"],
    ["merge", "--base", "b", "--expert", "a=~nobody-of-this-name/x", "--out", "o"],
    ["data", "stats", PLANTED],
    ["data", "fetch", PLANTED, "--to", "d"],
    ["predict", "a text", "--run", PLANTED, "--store", "memory://s"],
    ["store", "ls", PLANTED, "--store", "memory://s"],
    ["store", "show", PLANTED, "--store", "memory://s"],
    ["store", "ls", "--store", PLANTED + "://s"],
    ["search", "show", PLANTED, "--store", "memory://s"],
]


@pytest.mark.timeout(120)
@pytest.mark.parametrize("number", range(len(COMMANDS)))
def test_what_the_command_line_was_given_is_shown_in_short(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["memmcl", *COMMANDS[number]])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    out, err = capsys.readouterr()
    assert ended.value.code in (1, 2)
    assert (err.startswith("error: "), err.count("\n")) == (True, 1), err[:3_000]
    assert "defect" not in err
    assert len(err) <= MESSAGE + len("error: \n")
    assert PLANTED[: VALUE + 1] not in out + err


def test_many_mistakes_are_counted() -> None:
    with pytest.raises(ConfigError, match=r"and 5 more$"):
        parse_config({f"unknown{i}": 1 for i in range(25)})
