"""Hostile models: GGUF files and directories that say what they do not hold are refused with one short line, soon."""

from __future__ import annotations

import json
import os
import shutil
import struct
import sys
from functools import partial
from pathlib import Path
from typing import Any

import hostile
import pytest
from hostile import PLANTED
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import base_ref, make_tiny_gguf

from flows.cli import root as cli
from memmcl.backbone.gguf_header import read_gguf_header
from memmcl.backbone.load import load_base, load_tokenizer, read_layers, resolve_base
from memmcl.backbone.shapes import read_shapes
from memmcl.errors import MESSAGE, ModelError

pytestmark = pytest.mark.timeout(60)

refused = partial(hostile.refused, ModelError)


@pytest.fixture(scope="module")
def gguf(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return make_tiny_gguf(tmp_path_factory.mktemp("gguf") / "tiny-F32.gguf", tiny_base).read_bytes()


@pytest.fixture
def copy(tiny_base: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_base, tmp_path / "copy"))


# --- GGUF


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def start(tensors: int = 0, pairs: int = 0, rest: bytes = b"", *, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, pairs) + rest


def pair(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def tensor(name: str, shape: tuple[int, ...], kind: int = 0, place: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, place)


GGUF: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "cannot convert"),
    "no GGUF": (b"ELF" * 99, "does not begin with GGUF"),
    "the other byte order": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "in little-endian order"),
    "version 1": (start(version=1), "expected version 2 or 3"),
    "cut off at once": (start()[:20], "it is cut off"),
    "2**63 tensors": (start(tensors=1 << 63), "9,223,372,036,854,775,808 tensors"),
    "2**63 pairs": (start(pairs=1 << 63), "pairs of key and value"),
    "a key of 2**63 bytes": (start(pairs=1, rest=struct.pack("<Q", 1 << 63)), "a text of 9,223"),
    "a key beyond the end": (start(pairs=1, rest=struct.pack("<Q", 1_000)), "it is cut off"),
    "an unknown type": (start(pairs=1, rest=pair(PLANTED[:9_000], 99, b"")), "unknown type 99"),
    "a list of 2**63 items": (start(pairs=1, rest=pair("k", 9, struct.pack("<IQ", 8, 1 << 63))), "more than 2,000,000"),
    "a list beyond the end": (start(pairs=1, rest=pair("k", 9, struct.pack("<IQ", 0, 1_999_999))), "it is cut off"),
    "texts beyond the end": (start(pairs=1, rest=pair("k", 9, struct.pack("<IQ", 8, 1_999_999))), "it is cut off"),
    "a list of lists": (start(pairs=1, rest=pair("k", 9, struct.pack("<IQ", 9, 1))), "a list of the unknown type 9"),
    "many lists": (
        start(pairs=9, rest=pair("k", 9, struct.pack("<IQ", 7, 400_000) + bytes(400_000)) * 9),
        "more than 2,000,000 items",
    ),
    "no dimensions": (start(1, rest=tensor("t", ())), "has 0 dimensions"),
    "many dimensions": (start(1, rest=text("t") + struct.pack("<I", 1 << 31)), "has 2147483648 dimensions"),
    "a shape that overflows": (start(1, rest=tensor("t", (1 << 63, 1 << 63))), "does not lie in the file"),
    "a shape of none": (start(1, rest=tensor("t", (0, 8))), "does not lie in the file"),
    "an unknown type of numbers": (start(1, rest=tensor("t", (8,), kind=999)), "unknown type 999"),
    "a place beyond the end": (start(1, rest=tensor("t", (8,), place=1 << 62)), "does not lie in the file"),
    "many tensors in one place": (
        start(50, rest=b"".join(tensor(f"t{i}", (1_000,)) for i in range(50)) + bytes(4_000)),
        "its tensors take 200,000 bytes",
    ),
    "a long name": (start(1, rest=tensor(PLANTED[:9_000], (8,))), "too long a name"),
    "alignment 0": (
        start(pairs=1, rest=pair("general.alignment", 4, struct.pack("<I", 0))),
        "a power of two as general.alignment",
    ),
    "alignment is a text": (start(pairs=1, rest=pair("general.alignment", 8, text(PLANTED))), "general.alignment, got"),
    "nothing in it": (start(), "cannot convert"),
}


@pytest.mark.parametrize("name", GGUF)
def test_a_hostile_gguf_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("MEMMCL_CACHE_DIR", str(tmp_path / "cache"))
    content, expected = GGUF[name]
    (tmp_path / "model.gguf").write_bytes(content)
    refused(lambda: resolve_base(str(tmp_path / "model.gguf")), expected)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("llama.block_count", (1 << 31) - 1, "'llama.block_count' is 2147483647, and the file holds 38 tensors"),
        ("llama.block_count", 38, "its configuration describes"),
        ("llama.block_count", 5, "it lacks model.layers.4."),
        ("llama.embedding_length", 1 << 24, "cannot convert"),
        ("llama.feed_forward_length", 1 << 30, "cannot convert"),
        ("llama.attention.head_count", 0, "cannot convert"),
        ("llama.rope.dimension_count", 1 << 20, "cannot convert"),
    ],
)
def test_a_model_that_is_larger_than_its_file(
    gguf: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, value: int, expected: str
) -> None:
    monkeypatch.setenv("MEMMCL_CACHE_DIR", str(tmp_path / "cache"))
    at = gguf.index(text(key)) + len(text(key)) + 4
    (tmp_path / "model.gguf").write_bytes(gguf[:at] + struct.pack("<I", value) + gguf[at + 4 :])
    refused(lambda: resolve_base(str(tmp_path / "model.gguf")), expected)
    assert list((tmp_path / "cache").rglob("*.safetensors")) == []


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_torn_gguf_header_is_read_or_refused(gguf: bytes, tmp_path: Path, data: st.DataObject) -> None:
    torn = bytearray(gguf)
    for _ in range(data.draw(st.integers(0, 6))):
        torn[data.draw(st.one_of(st.integers(0, 600), st.integers(0, len(torn) - 1)))] = data.draw(st.integers(0, 255))
    path = tmp_path / "torn.gguf"
    path.write_bytes(torn[: data.draw(st.one_of(st.just(len(torn)), st.integers(0, len(torn))))])
    message = ""
    try:
        read_gguf_header(path)
    except ValueError as error:
        message = str(error)
    assert len(message) <= MESSAGE


# --- directories


def changed(directory: Path, **fields: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


CONFIGS: dict[str, tuple[bytes | dict[str, Any], str]] = {
    "10**9 layers": ({"num_hidden_layers": 10**9}, "'num_hidden_layers' is 1000000000"),
    "10**9 layers below": ({"text_config": {"n_layers": 10**9}}, "'n_layers' is 1000000000"),
    "infinitely many layers": (b'{"num_hidden_layers": Infinity}', "'num_hidden_layers' is inf"),
    "10**9 experts": ({"num_local_experts": 10**9}, "'num_local_experts' is 1000000000"),
    "deep": (b'{"a":' * 100_000, "nested too deep"),
    "a key twice": (b'{"num_hidden_layers": 4, "num_hidden_layers": 5}', "'num_hidden_layers' twice"),
    "large": (b" " * (1 << 24) + b"{}", "more than 16,777,216 bytes"),
    "a list": (b"[]", "expected a JSON object"),
    "not UTF-8": (b'{"a": "\xff"}', "not UTF-8"),
    "a number of 5,000 digits": (b'{"a": ' + b"9" * 5_000 + b"}", "Exceeds the limit"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_hostile_config(copy: Path, name: str) -> None:
    content, expected = CONFIGS[name]
    if isinstance(content, dict):
        changed(copy, **content)
    else:
        (copy / "config.json").write_bytes(content)
    refused(lambda: resolve_base(str(copy)), expected)
    refused(lambda: read_shapes(str(copy)), expected)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"num_hidden_layers": 900}, "its configuration describes 900 layers, its weights are"),
        ({"num_hidden_layers": 20}, "its configuration describes"),
        ({"hidden_size": 1 << 16}, "its configuration describes"),
        ({"vocab_size": 1 << 40}, "its configuration describes"),
        ({"vocab_size": 1 << 62}, "cannot load"),
        ({"vocab_size": -1}, "cannot load"),
        ({"num_attention_heads": 0}, "cannot load"),
        ({"hidden_size": "64"}, "cannot load"),
        ({"rope_scaling": [PLANTED]}, "cannot load"),
        ({"model_type": PLANTED}, "cannot load"),
        ({"model_type": "unknown", "auto_map": {"AutoConfig": "evil.Config"}}, "cannot load"),
    ],
    ids=[
        "layers",
        "more layers",
        "hidden",
        "vocabulary",
        "2**62",
        "negative",
        "heads",
        "text",
        "list",
        "kind",
        "remote code",
    ],
)
def test_a_model_that_its_weights_do_not_hold(
    copy: Path, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any], expected: str
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked whether to run foreign code"))
    (copy / "evil.py").write_text("raise SystemExit('foreign code ran')\n")
    changed(copy, **fields)
    refused(lambda: load_base(base_ref(copy), "float32"), expected)


def test_layers_are_a_number(copy: Path) -> None:
    for value in (True, "4", 4.0, [4], -1, None):
        changed(copy, num_hidden_layers=value)
        refused(lambda: read_layers(base_ref(copy)), "names no num_hidden_layers")


@pytest.mark.parametrize("place", ["../other/model.safetensors", "/etc/passwd", "missing.safetensors", ["a"], PLANTED])
def test_an_index_that_leads_elsewhere(copy: Path, place: Any) -> None:
    shutil.copytree(copy, copy.parent / "other")
    index = {"metadata": {}, "weight_map": {"model.norm.weight": place}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(lambda: resolve_base(str(copy)), "and no such file lies beside it")


@pytest.mark.parametrize("named", ["../other/model.safetensors", [], {}])
def test_weights_that_lie_elsewhere(copy: Path, named: Any) -> None:
    changed(copy, transformers_weights=named)
    refused(lambda: resolve_base(str(copy)), "and no such file lies beside it")


def test_an_adapter_in_the_base_is_not_followed(copy: Path) -> None:
    """Transformers would load the model that the adapter names, and no digest of ours would know."""
    (copy / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "/other"}')
    refused(lambda: resolve_base(str(copy)), "it holds an adapter")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
def test_a_tokenizer_without_end(copy: Path, name: str) -> None:
    os.truncate(copy / name, 1 << 40)
    refused(lambda: resolve_base(str(copy)), f"{name} is damaged (it has more than 134,217,728 bytes)")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", [b"[" * 100_000, b"{}", b"\xff", b'{"model": {"type": "?"}}'])
def test_a_tokenizer_that_is_none(copy: Path, name: str, content: bytes) -> None:
    (copy / name).write_bytes(content)
    if (name, content) != ("tokenizer_config.json", b"{}"):
        message = ""
        try:
            load_tokenizer(base_ref(copy))
        except ModelError as error:
            message = str(error)
        assert len(message) <= MESSAGE
        assert "\n" not in message


def test_weights_without_end(copy: Path) -> None:
    os.truncate(copy / "model.safetensors", 60 * 10**9)
    refused(lambda: resolve_base(str(copy)), "and it has 60,000,000,000; it is cut off, or damaged")


def test_the_command_line_says_it_in_one_line(
    copy: Path, gguf: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    changed(copy, num_hidden_layers=10**9)
    at = gguf.index(text("llama.block_count")) + len(text("llama.block_count")) + 4
    (tmp_path / "model.gguf").write_bytes(gguf[:at] + struct.pack("<I", (1 << 31) - 1) + gguf[at + 4 :])
    for base in (copy, tmp_path / "model.gguf"):
        setting = f"model.name_or_path={base}"
        (tmp_path / "run.yaml").write_text("data: {subtasks: [sent2], train_rows: 8, weak_rows: 4, test_rows: 4}\n")
        monkeypatch.setattr(sys, "argv", ["memmcl", "run", str(tmp_path / "run.yaml"), "--set", setting])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        assert (ended.value.code, out, err.count("\n")) == (1, "", 1)
        assert "layers" in err or "block_count" in err
