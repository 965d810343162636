"""`memmcl experts anchor` as a user runs it: what it makes, what it says, and what it refuses in one line."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load, save_file
from tiny import base_ref, corpus, make_tiny_base, plain_model, probe_logits, random_factors

from memmcl.adapters.format import CONFIG_FILE, WEIGHTS_FILE, to_files
from memmcl.experts.after import RECORD

COMMAND = Path(sys.executable).with_name("memmcl")
QUICK = ("--steps", 6, "--batch-size", 4, "--rows", 4, "--dtype", "float32", "--others", "asc,uabsa")
TEXTS = [example.text for name in ("sent2", "emotion") for example in corpus(name, 30)]
Call = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    """The folder of an adapter of the tiny base; to read, not to change."""
    folder = tmp_path_factory.mktemp("brought") / "adapter"
    folder.mkdir()
    factors = random_factors(tiny_base, layers=(2, 3), modules=("q_proj", "v_proj", "down_proj"), seed=0)
    for name, data in to_files(factors, base_name="someone/else", rank=3, alpha=6.0).items():
        (folder / name).write_bytes(data)
    return folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("brought") / "texts.txt"
    path.write_text("\n".join(TEXTS))
    return path


@pytest.fixture
def call(command_line: Call) -> Call:
    """Run the command in this process, in an empty directory; what it leaves there is checked by the test."""
    return partial(command_line, "experts", "anchor")


@pytest.fixture
def given(tiny_base: Path, adapter: Path, texts: Path) -> dict[str, Any]:
    """The options of a call that would be right."""
    return {"base": tiny_base, "adapter": adapter, "texts": texts, "out": "anchored", "subtask": "sent2"}


def options(given: dict[str, Any], **changed: Any) -> list[Any]:
    """Return options as arguments; None leaves one out."""
    chosen = {name: value for name, value in (given | changed).items() if value is not None}
    return [part for name, value in chosen.items() for part in (f"--{name}", value)]


def refused(call: Call, code: int, arguments: list[Any], *expected: str) -> None:
    """One line, the exit code, nothing said beside it but what was about to begin, nothing left behind."""
    before = sorted(Path.cwd().rglob("*"))
    ended, out, err = call(*arguments)
    assert ended == code, err
    assert out == "" or (out.startswith("texts          16 for its own prompts") and out.count("\n") == 1)
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    for part in expected:
        assert part in err
    assert sorted(Path.cwd().rglob("*")) == before


def test_the_whole_command_in_a_process_of_its_own(tmp_path: Path, given: dict[str, Any], tiny_base: Path) -> None:
    environment = os.environ | {"COLUMNS": "160", "OMP_NUM_THREADS": "1", "MEMMCL_CACHE_DIR": str(tmp_path / "cache")}
    arguments = [COMMAND, "experts", "anchor", *options(given, steps=40), *QUICK[2:], "--learning-rate", "5e-3"]
    done = subprocess.run(
        list(map(str, arguments)), capture_output=True, text=True, cwd=tmp_path, env=environment, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    first, *lines = done.stdout.splitlines()
    assert first == "texts          16 for its own prompts, 4 for each of 2 other subtasks, 7 held out"
    assert lines[0].split() == ["prompts", "of", "KL", "before", "after"]
    assert [line.split()[0].strip(",") for line in lines[1:6]] == ["sent2", "sent2", "asc", "uabsa", "others"]
    assert lines[-2:] == ["KL in nats per answer token, on 7 texts that were held out", "adapter        anchored"]
    out = tmp_path / "anchored"
    record = json.loads((out / RECORD).read_text())
    before, after = record["kl"]["before"], record["kl"]["after"]
    assert before["itself"] == 0
    assert after["itself"] < 0.5 * before["own"]
    for name in ("asc", "uabsa"):
        assert after["others"][name] < 0.6 * before["others"][name]
    assert f"{after['own']:.4f}" in lines[2]
    assert record["made_from"]["base"] == {"name": str(tiny_base), "digest": base_ref(tiny_base).digest}
    config = json.loads((out / CONFIG_FILE).read_text())
    assert config["base_model_name_or_path"] == str(tiny_base)
    assert config["r"] == 3
    loaded = PeftModel.from_pretrained(plain_model(tiny_base), out).eval()
    assert (probe_logits(loaded) - probe_logits(plain_model(tiny_base))).abs().max() > 0.1
    assert [path.name for path in tmp_path.iterdir() if path.name != "cache"] == ["anchored"]


def test_again_it_is_there_already_and_elsewhere_it_is_the_same(call: Call, given: dict[str, Any]) -> None:
    first = call(*options(given), *QUICK)
    assert first[0] == 0
    made = {path.name: (path.stat().st_ino, path.read_bytes()) for path in Path("anchored").iterdir()}
    code, out, err = call(*options(given), *QUICK)
    assert (code, err) == (0, "")
    _, table = first[1].split("\n", 1)
    assert out == f"anchored is there already, made with the same arguments; it was:\n{table}"
    assert {path.name: (path.stat().st_ino, path.read_bytes()) for path in Path("anchored").iterdir()} == made
    Path("empty").mkdir()
    assert call(*options(given, out="empty", others="uabsa, asc"), *QUICK[:-2])[0] == 0
    assert {path.name: path.read_bytes() for path in Path("empty").iterdir()} == {
        name: content for name, (_, content) in made.items()
    }
    refused(call, 2, [*options(given, seed=1), *QUICK], "anchored holds what other arguments made; name a new or empty")
    (Path("anchored") / WEIGHTS_FILE).write_bytes(b"torn")
    refused(call, 2, [*options(given), *QUICK], "anchored holds other files, or some that changed since")


def test_a_template_of_ones_own_and_rows_of_a_table(call: Call, given: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text("<|im_start|>user\nMood? {text}<|im_end|>\n<|im_start|>assistant\n")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS) + "{broken\n")
    code, out, err = call(*options(given, subtask=None, template=tmp_path / "prompt.txt", texts=rows), *QUICK)
    assert (code, err) == (0, "")
    assert f"left out: 1 texts that cannot be used, first {rows}, line 61: broken JSON" in out
    assert "its own" in out
    record = json.loads((Path("anchored") / RECORD).read_text())
    assert record["made_from"]["own"] is None
    assert record["made_from"]["texts"]["count"] == len(TEXTS)


def test_mixed_ranks_stay_as_they_are(call: Call, given: dict[str, Any], adapter: Path, tmp_path: Path) -> None:
    brought = shutil.copytree(adapter, tmp_path / "mixed")
    tensors = load((adapter / WEIGHTS_FILE).read_bytes())
    config = json.loads((adapter / CONFIG_FILE).read_text()) | {"rank_pattern": {"v_proj": 2}, "use_rslora": True}
    cut = {name: tensor[:2] if "lora_A" in name else tensor[:, :2] for name, tensor in tensors.items() if "v_p" in name}
    save_file({name: tensor.contiguous() for name, tensor in (tensors | cut).items()}, brought / WEIGHTS_FILE)
    (brought / CONFIG_FILE).write_text(json.dumps(config))
    code, _, err = call(*options(given, adapter=brought), *QUICK)
    assert (code, err) == (0, "")
    found = load((Path("anchored") / WEIGHTS_FILE).read_bytes())
    assert {name: tensor.shape for name, tensor in found.items()} == {
        name: tensor.shape for name, tensor in (tensors | cut).items()
    }
    assert not any(torch.equal(tensor, (tensors | cut)[name]) for name, tensor in found.items())
    written = json.loads((Path("anchored") / CONFIG_FILE).read_text())
    assert (written["r"], written["lora_alpha"], written["use_rslora"]) == (3, 6.0, True)
    assert written["rank_pattern"] == {f"model.layers.{i}.self_attn.v_proj": 2 for i in (2, 3)}
    assert written["alpha_pattern"] == {}


# --- mistakes


@pytest.mark.parametrize(
    ("changed", "code", "expected"),
    [
        ({"subtask": None}, 2, ["expected one of --subtask and --template, got neither; name the adapter's subtask"]),
        ({"template": "any"}, 2, ["expected one of --subtask and --template, got both"]),
        ({"subtask": "sent9"}, 2, ["--subtask: unknown subtask 'sent9'; known ones: doc2, doc5"]),
        ({"others": "asc,mood"}, 2, ["--others: unknown subtask 'mood'; known ones: doc2"]),
        ({"others": "asc,sent2"}, 2, ["--others names sent2, which is the adapter's own subtask; leave it out"]),
        ({"others": " ,"}, 2, ["--others names no subtask; give some as sent2,asc,uabsa, or all"]),
        ({"weight": 0}, 2, ["--weight must be a number above 0, got 0"]),
        ({"learning-rate": "nan"}, 2, ["--learning-rate must be a number above 0, got nan"]),
        (
            {"adapter": "none"},
            1,
            ["--adapter: none has no adapter_config.json; give a folder that PEFT", "save_pretrained"],
        ),
        ({"texts": "none.txt"}, 1, ["there is no none.txt; correct the path"]),
        ({"others": "all"}, 1, ["expected at least 86 distinct texts to anchor against 15 other subtasks, got 60"]),
        ({"base": "/no/such/model"}, 1, ["--base: '/no/such/model' is neither a directory here nor a hub model"]),
        ({"max-prompt-tokens": 16}, 2, ["--max-prompt-tokens is 16, but the instruction of sent2 alone takes"]),
        ({"learning-rate": 1e30}, 1, ["became", "at step", "of 6; lower --learning-rate"]),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, dict) else "",
)
def test_options_that_are_wrong(
    call: Call, given: dict[str, Any], changed: dict[str, Any], code: int, expected: list[str]
) -> None:
    quick = QUICK[:-2] if "others" in changed else QUICK
    refused(call, code, [*quick, *options(given, **changed)], *expected)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(call: Call, given: dict[str, Any]) -> None:
    refused(call, 1, [*options(given, device="cuda"), *QUICK], "--device: expected a GPU, this process sees none")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("{}", "--adapter: expected a plain LoRA adapter without modules_to_save and without DoRA"),
        ("{", "--adapter: not a PEFT adapter"),
        ('{"peft_type": "LORA", "use_dora": true}', "--adapter: expected a plain LoRA adapter"),
    ],
)
def test_adapters_that_are_none(
    call: Call, given: dict[str, Any], adapter: Path, tmp_path: Path, content: str, expected: str
) -> None:
    brought = shutil.copytree(adapter, tmp_path / "brought")
    (brought / CONFIG_FILE).write_text(content)
    refused(call, 1, [*options(given, adapter=brought), *QUICK], expected)


def test_adapters_of_another_base(call: Call, given: dict[str, Any], tmp_path: Path) -> None:
    smaller = make_tiny_base(tmp_path / "smaller", layers=2)
    expected = "--adapter: it changes layer 2, this base has 2 layers; was it trained on another?"
    refused(call, 1, [*options(given, base=smaller), *QUICK], expected)
    wide = random_factors(given["base"], layers=(3,), seed=0)["model.layers.3.mlp.down_proj"]
    (tmp_path / "other").mkdir()
    made = to_files({"model.layers.3.mlp.up_proj": wide}, base_name="b", rank=3, alpha=6.0)
    for name, data in made.items():
        (tmp_path / "other" / name).write_bytes(data)
    expected = "the adapter changes model.layers.3.mlp.up_proj of 64 x 128, this base has 128 x 64; was it trained on"
    refused(call, 1, [*options(given, adapter=tmp_path / "other"), *QUICK], expected)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "--template: cannot read {path} (No such file or directory); give a text file"),
        (b"Mood of {txt}?", "--template: expected {{text}} in it, found none; write it where the text goes"),
        (b"\xff{text}", "--template: {path} is not UTF-8; convert it"),
        (b"word " * 300 + b"{text}", "the template alone takes 303 tokens, and --max-prompt-tokens is 192; raise it"),
    ],
    ids=["missing", "no place", "encoding", "long"],
)
def test_templates_that_cannot_be_used(
    call: Call, given: dict[str, Any], tmp_path: Path, content: bytes | None, expected: str
) -> None:
    path = tmp_path / "prompt.txt"
    if content is not None:
        path.write_bytes(content)
    refused(call, 2, [*options(given, subtask=None, template=path), *QUICK], expected.format(path=path))


def test_texts_that_are_none_or_too_few(call: Call, given: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "few.txt"
    path.write_text("\n \n")
    refused(call, 1, [*options(given, texts=path), *QUICK], f"expected texts in {path}, one a line or a column 'text'")
    path.write_text("\n".join(TEXTS[:9]))
    expected = "expected at least 28 distinct texts to anchor against 2 other subtasks, got 9; add texts, or name fewer"
    refused(call, 1, [*options(given, texts=path), *QUICK], expected)


def test_places_that_hold_something_else(call: Call, given: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    refused(call, 2, [*options(given, out=tmp_path / "mine"), *QUICK], "mine holds other files", "new or empty folder")
    refused(call, 2, [*options(given, out=tmp_path / "mine" / "notes.txt"), *QUICK], "is a file, not a folder")
    below = tmp_path / "mine" / "notes.txt" / "out"
    refused(call, 1, [*options(given, out=below), *QUICK], f"cannot write {below} (Not a directory)")
    assert (tmp_path / "mine" / "notes.txt").read_text() == "mine"
