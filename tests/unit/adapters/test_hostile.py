"""Hostile adapters: each is refused with one short line, soon, and without being read whole."""

from __future__ import annotations

import json
import math
import os
import re
import sys
from functools import partial
from pathlib import Path
from typing import Any

import hostile
import pytest
import torch
from hostile import PLANTED
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key
from safetensors.torch import save
from tiny import random_factors

from flows.cli import root as cli
from memmcl.adapters import options as peft_options
from memmcl.adapters.format import CONFIG_FILE, WEIGHTS_FILE, from_files, to_files
from memmcl.adapters.load import read_user_adapter
from memmcl.adapters.options import ALPHA, by_pattern, read_options
from memmcl.errors import MESSAGE, VALUE, ModelError

pytestmark = pytest.mark.timeout(30)

GOOD = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
refused = partial(hostile.refused, ModelError, most=260 * hostile.MIB)


def header(entries: dict[str, Any] | bytes, data: bytes = b"") -> bytes:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text + data


def pair(a: tuple[int, ...], b: tuple[int, ...], dtype: torch.dtype = torch.float32) -> bytes:
    return save({GOOD.format("A"): torch.zeros(a, dtype=dtype), GOOD.format("B"): torch.zeros(b, dtype=dtype)})


def config(**fields: Any) -> bytes:
    return json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4} | fields).encode()


def empty(count: int) -> dict[str, Any]:
    entry = {"dtype": "F32", "shape": [0, 0], "data_offsets": [0, 0]}
    return {f"base_model.model.m{i}.lora_{'AB'[i % 2]}.weight": entry for i in range(count)}


def one(shape: Any, *, dtype: Any = "F32", offsets: Any = (0, 16), name: str = GOOD.format("A")) -> bytes:
    return header({name: {"dtype": dtype, "shape": shape, "data_offsets": offsets}}, bytes(16))


SOUND = pair((2, 8), (8, 2))
ENTRY = {"dtype": "F32", "shape": [1 << 32, 4], "data_offsets": [0, 1 << 36]}

WEIGHTS: dict[str, tuple[bytes, str]] = {
    "rank 0": (pair((0, 8), (8, 0)), "expected matrices of floating-point numbers"),
    "0-d": (pair((), ()), "expected matrices of floating-point numbers"),
    "1-d": (pair((8,), (8,)), "expected matrices of floating-point numbers"),
    "3-d": (pair((2, 8, 1), (8, 2, 1)), "expected matrices of floating-point numbers"),
    "integers": (pair((2, 8), (8, 2), torch.int64), "of type 'I64'"),
    "two ranks": (pair((2, 8), (8, 3)), "expected matrices of one rank"),
    "half a million empty tensors": (header(empty(500_000)), "a safetensors header of at most 16,777,216 bytes"),
    "many empty tensors": (header(empty(100_001)), "it holds 100,001 tensors"),
    "one empty tensor": (header(empty(1)), "expected matrices of floating-point numbers"),
    "nothing": (b"", "does not begin with a safetensors header"),
    "empty header": (header({}), "incomplete: all"),
    "header of 2**63 bytes": ((1 << 63).to_bytes(8, "little") + b"{}", "does not begin with a safetensors header"),
    "cut off in the header": (header({})[:9], "ends within its header"),
    "cut off": (SOUND[:-1], "it is cut off, or damaged"),
    "more than the header says": (SOUND + b"\0", "it is cut off, or damaged"),
    "deep header": (header(b"[" * 100_000), "nested too deep"),
    "header is a list": (header(b"[]"), "no JSON object"),
    "header is not UTF-8": (header(b'{"\xff": 1}'), "not UTF-8"),
    "a tensor twice": (header(b'{"a": 1, "a": 2}'), "the key 'a' twice"),
    "a long name": (one([2, 2], name=PLANTED), "a name of 280,000 characters"),
    "another name": (one([2, 2], name="x" * 200), "expected only lora_A and lora_B"),
    "negative sizes": (one([-2, -2]), "no type, shape and place"),
    "sizes that are no numbers": (one(["2", True]), "no type, shape and place"),
    "sizes that overflow": (one([1 << 62, 1 << 62]), "incomplete"),
    "sizes of 2**70": (one([1 << 70, 1]), "no type, shape and place"),
    "offsets backwards": (one([2, 2], offsets=[16, 0]), "no type, shape and place"),
    "offsets beyond the end": (one([2, 2], offsets=[0, 1 << 40]), "it is cut off, or damaged"),
    "a type that is a list": (one([2, 2], dtype=["F32"]), "no type, shape and place"),
    "a type without end": (one([2, 2], dtype=PLANTED), "of type 'planted"),
    "a pickle": (b"\x80\x04\x95\x1a\x00\x00\x00\x00" + b"cos\nsystem\n", "does not begin with a safetensors header"),
    "two tensors in one place": (
        header(
            {
                GOOD.format("A"): {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
                GOOD.format("B"): {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
            },
            bytes(16),
        ),
        "not a PEFT adapter",
    ),
}

CONFIGS: dict[str, tuple[bytes, str]] = {
    "catastrophic alpha_pattern": (config(alpha_pattern={r"(.+)+(\d|.)*\1": 1}), "no pattern that memmcl matches"),
    "lookaround": (config(alpha_pattern={"(?!x)q_proj": 1}), "no pattern that memmcl matches"),
    "invalid pattern": (config(alpha_pattern={"(": 1}), "no pattern that memmcl matches"),
    "half a surrogate pair": (config(alpha_pattern={"\ud800": 1}), "no pattern that memmcl matches"),
    "huge repetition": (config(alpha_pattern={"((a{900}){900}){900}": 1}), "no pattern that memmcl matches"),
    "large classes": (config(alpha_pattern={r"(\pL{1000})*x": 1}), "no pattern that memmcl matches"),
    "long pattern": (config(alpha_pattern={"q" * 2_000: 1}), "a key of 2,000 characters"),
    "deep": (b'{"a":' * 100_000, "nested too deep"),
    "large": (b" " * (1 << 24) + b"{}", "more than 16,777,216 bytes"),
    "a list of pairs": (b'[["peft_type", "LORA"]]', "expected a JSON object"),
    "not UTF-8": (b'{"peft_type": "\xff"}', "not UTF-8"),
    "a key twice": (b'{"peft_type": "LORA", "lora_alpha": 1, "lora_alpha": 64}', "the key 'lora_alpha' twice"),
    "rslora is a word": (config(use_rslora="no"), "use_rslora: input should be a valid boolean, got 'no'"),
    "rslora is a number": (config(use_rslora=0), "use_rslora: input should be a valid boolean, got 0"),
    "alpha is null": (config(lora_alpha=None), "lora_alpha: input should be a valid number, got None"),
    "alpha is a word": (config(lora_alpha="16"), "lora_alpha: input should be a valid number, got '16'"),
    "alpha is true": (config(lora_alpha=True), "lora_alpha: input should be a valid number, got True"),
    "alpha is infinite": (b'{"peft_type": "LORA", "lora_alpha": Infinity}', "Infinity is no JSON number"),
    "alpha overflows": (b'{"peft_type": "LORA", "lora_alpha": 1e999}', "lora_alpha: input should be"),
    "alpha is 1e308": (config(lora_alpha=1e308), "lora_alpha: input should be less than or equal to 1000000"),
    "alpha of 4000 digits": (b'{"peft_type": "LORA", "lora_alpha": ' + b"9" * 4_000 + b"}", "lora_alpha: "),
    "alpha of 5000 digits": (b'{"peft_type": "LORA", "lora_alpha": ' + b"9" * 5_000 + b"}", "cannot be read"),
    "alpha is not a number": (b'{"peft_type": "LORA", "lora_alpha": NaN}', "NaN is no JSON number"),
    "alpha_pattern overflows": (b'{"peft_type": "LORA", "alpha_pattern": {"q_proj": 1e999}}', "alpha_pattern.q_proj"),
    "alpha_pattern is a list": (config(alpha_pattern=[["q_proj", 1]]), "alpha_pattern: input should be a valid dict"),
    "alpha_pattern holds words": (config(alpha_pattern={"q_proj": "1"}), "alpha_pattern.q_proj: input should be"),
    "r is 0": (config(r=0), "r: input should be greater than or equal to 1"),
    "r is huge": (config(r=1 << 40), "r: input should be less than or equal to 65536"),
    "r is a fraction": (config(r=2.5), "r: input should be a valid integer"),
    "type is a list": (config(peft_type=["LORA"]), "peft_type: input should be a valid string"),
    "base is a list": (config(base_model_name_or_path=["a"]), "base_model_name_or_path: input should be a valid str"),
    "base is a number": (config(base_model_name_or_path=7), "base_model_name_or_path: input should be a valid str"),
    "modules_to_save is true": (config(modules_to_save=True), "modules_to_save: input should be a valid list"),
    "dora is a list": (config(use_dora=[1]), "use_dora: input should be a valid boolean"),
    "long value": (config(r=PLANTED), "r: input should be a valid integer, got 'planted"),
    "long list": (config(r=[PLANTED] * 9), "r: input should be a valid integer"),
    "deep value": (config(r=json.loads("[" * 500 + "]" * 500)), "r: input should be a valid integer"),
    "other kind": (config(init_lora_weights=[PLANTED]), "expected plain LoRA, got init_lora_weights"),
    "long other kind": (config(layer_replication=[[0, 1]] * 5_000), "expected plain LoRA, got layer_replication"),
}


def folder(path: Path, weights: bytes = SOUND, options: bytes = config()) -> Path:
    path.mkdir(exist_ok=True)
    (path / WEIGHTS_FILE).write_bytes(weights)
    (path / CONFIG_FILE).write_bytes(options)
    return path


@pytest.mark.parametrize("name", WEIGHTS)
def test_hostile_weights(tmp_path: Path, name: str) -> None:
    weights, expected = WEIGHTS[name]
    place = folder(tmp_path / "adapter", weights)
    del weights
    refused(lambda: read_user_adapter("mine", str(place)), expected)


@pytest.mark.parametrize("name", CONFIGS)
def test_hostile_configs(tmp_path: Path, name: str) -> None:
    options, expected = CONFIGS[name]
    place = folder(tmp_path / "adapter", options=options)
    refused(lambda: read_user_adapter("mine", str(place)), expected)


@pytest.mark.parametrize("url", [False, True], ids=["path", "URL"])
@pytest.mark.parametrize("claimed", [False, True], ids=["slack", "claimed"])
def test_a_sparse_file_of_60_gigabytes_is_not_read(tmp_path: Path, url: bool, claimed: bool) -> None:
    size = 60 * 10**9
    entry = {"dtype": "F32", "shape": [size // 16, 4], "data_offsets": [0, size]}
    start = header({GOOD.format("A"): entry}) if claimed else SOUND
    place = folder(tmp_path / "adapter", start)
    os.truncate(place / WEIGHTS_FILE, size + len(start) if claimed else size)
    expected = "memmcl reads 8,589,934,592 at most" if claimed else "it is cut off, or damaged"
    refused(lambda: read_user_adapter("mine", f"file://{place}" if url else str(place)), expected, most=64 << 20)


def test_the_command_line_says_it_in_one_line(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {
        "sparse": (header({GOOD.format("A"): ENTRY}), config()),
        "regex": (SOUND, config(alpha_pattern={r"(.+)+\1": 1})),
        "long": (SOUND, config(r=PLANTED)),
    }
    for name, (weights, options) in places.items():
        place = folder(tmp_path / name, weights, options)
        if name == "sparse":
            os.truncate(place / WEIGHTS_FILE, len(weights) + (1 << 36))
        command = ["merge", "--base", str(tiny_base), "--expert", f"a={place}", "--out", str(tmp_path / "out")]
        monkeypatch.setattr(sys, "argv", ["memmcl", *command])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        assert (ended.value.code, out, err.count("\n")) == (1, "", 1)
        assert err.startswith("error: expert a: ")
        assert len(err) <= MESSAGE + len("error: \n")
        assert PLANTED[: VALUE + 1] not in err


def test_a_pipe_is_no_file(tmp_path: Path) -> None:
    place = folder(tmp_path / "adapter")
    (place / WEIGHTS_FILE).unlink()
    os.mkfifo(place / WEIGHTS_FILE)
    refused(lambda: read_user_adapter("mine", str(place)), f"has no {WEIGHTS_FILE}")


# --- what is sound stays sound


def test_a_catastrophic_key_that_re2_knows_is_matched_in_no_time() -> None:
    module = "model.layers.0." + "a" * 180
    values = by_pattern("alpha_pattern", {"(a+)+b": 1.0, "((a*)*)*c": 2.0, "(a|aa|a?)+": 3.0}, [module], 9.0)
    assert values == {module: 3.0}


def test_keys_that_take_too_long_together_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peft_options, "PATTERN_SECONDS", 0.05)
    modules = [f"model.layers.{i}.{'a' * 150}" for i in range(2_000)]
    refused(lambda: by_pattern("alpha_pattern", {f"(.?){{500}}b{i}": 1.0 for i in range(400)}, modules, 1.0), "0.05 s")


MODULES = [f"model.layers.{i}.{part}.{name}_proj" for i in (1, 11) for part in ("self_attn", "mlp") for name in "qu"]
KEYS = st.lists(
    st.sampled_from(
        [
            "q_proj",
            "u_proj",
            "mlp.u_proj",
            r"layers\.1\..*",
            "layers.1.mlp.q_proj",
            ".*",
            r".*\.(q|u)_proj",
            "proj",
            r"layers\.\d+\.mlp.*",
            "model",
            "x|q_proj",
            "q_proj$",
            "^model.*",
            r"[a-z]+_proj",
            "self_attn",
            "",
            "a)|(.*mlp.*",
        ]
    ),
    unique=True,
    max_size=5,
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(KEYS)
def test_keys_mean_what_peft_means(keys: list[str]) -> None:
    patterns = {key: number for number, key in enumerate(keys)}
    wanted = {name: patterns.get(get_pattern_key(keys, name), -1) for name in MODULES}
    assert by_pattern("alpha_pattern", patterns, MODULES, -1) == wanted


def test_absent_fields_are_pefts() -> None:
    """PEFT's alpha is 8 where none is written, whatever the rank."""
    found = from_files(pair((2, 8), (8, 2)), b'{"peft_type": "LORA"}')
    assert [pair.scale for pair in found.values()] == [4.0]
    assert (read_options(b"{}").r, read_options(b"{}").lora_alpha) == (8, 8)
    found = from_files(pair((2, 8), (8, 2)), config(use_rslora=True, alpha_pattern=None, rank_pattern=None))
    assert [pair.scale for pair in found.values()] == [4 / math.sqrt(2)]
    found = from_files(pair((2, 8), (8, 2)), config(lora_alpha=-ALPHA))
    assert [pair.scale for pair in found.values()] == [-ALPHA / 2]


def test_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    place = folder(tmp_path / "adapter", options=b"\xef\xbb\xbf" + config())
    assert read_user_adapter("mine", str(place)).rank == 2


@pytest.mark.timeout(120)
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_torn_adapter_is_read_or_refused(tiny_base: Path, data: st.DataObject) -> None:
    """Bytes changed at random: the reader answers with factors or with one line, and with nothing else."""
    files = to_files(random_factors(tiny_base, layers=(3,), seed=0), base_name="b", rank=3, alpha=6.0)
    torn = {name: bytearray(content) for name, content in files.items()}
    which = data.draw(st.sampled_from(sorted(torn)))
    start = 0 if which == CONFIG_FILE else data.draw(st.sampled_from([0, 0, 8, 8, 8, len(torn[which]) - 40]))
    for _ in range(data.draw(st.integers(1, 4))):
        at = min(start + data.draw(st.integers(0, 400)), len(torn[which]) - 1)
        torn[which][at] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        del torn[which][data.draw(st.integers(0, len(torn[which]))) :]
    message = ""
    try:
        from_files(bytes(torn[WEIGHTS_FILE]), bytes(torn[CONFIG_FILE]))
    except ModelError as error:
        message = str(error)
    assert len(message) <= MESSAGE
    assert not re.search(r"[\n\r]", message)
