"""Adapters in PEFT's format: written, read, refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load, save
from tiny import backbone_of, plain_model, probe_logits, random_factors

from memmcl.adapters.format import CONFIG_FILE, WEIGHTS_FILE, Factors, from_files, to_files
from memmcl.errors import ModelError
from memmcl.merge.build import Merger

BASE_NAME = "org/tiny-base"


@pytest.fixture(scope="module")
def files(tiny_base: Path) -> dict[str, bytes]:
    return to_files(random_factors(tiny_base, layers=(2, 3), seed=0), base_name=BASE_NAME, rank=3, alpha=6.0)


def changed(files: dict[str, bytes], **options: Any) -> dict[str, bytes]:
    config = json.loads(files[CONFIG_FILE]) | options
    return {**files, CONFIG_FILE: json.dumps(config).encode()}


def read(files: dict[str, bytes]) -> dict[str, Any]:
    return from_files(files[WEIGHTS_FILE], files[CONFIG_FILE])


def test_round_trip_is_exact(tiny_base: Path, files: dict[str, bytes]) -> None:
    factors = random_factors(tiny_base, layers=(2, 3), seed=0)
    found = read(files)
    assert set(found) == set(factors)
    assert len(found) == 14
    for module, pair in factors.items():
        assert torch.equal(found[module].a, pair.a)
        assert torch.equal(found[module].b, pair.b)
        assert found[module].scale == pair.scale == 2.0
    assert to_files(found, base_name=BASE_NAME, rank=3, alpha=6.0) == files, "the bytes differ the second time"


def test_the_files_name_the_configured_base_and_no_path(files: dict[str, bytes]) -> None:
    config = json.loads(files[CONFIG_FILE])
    assert config["base_model_name_or_path"] == BASE_NAME
    assert (config["r"], config["lora_alpha"], config["bias"]) == (3, 6.0, "none")
    assert config["target_modules"] == sorted(config["target_modules"])
    assert all(module.startswith(("model.layers.2.", "model.layers.3.")) for module in config["target_modules"])
    assert b"/tmp" not in files[CONFIG_FILE]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"alpha_pattern": {"q_proj": 1.5, "layers.3.mlp.up_proj": 9}},
        {"rank_pattern": {"v_proj": 5}},
        {"rank_pattern": {"v_proj": 5}, "alpha_pattern": {r"model\.layers\.2\..*": 7.5}, "use_rslora": True},
    ],
    ids=["plain", "rslora", "alpha_pattern", "rank_pattern", "all"],
)
def test_adapters_that_peft_wrote_mean_the_same_here(tiny_base: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    """Scales are PEFT's: its model and our merge at coefficient 1 give the same logits."""
    config = LoraConfig(
        r=3, lora_alpha=6, target_modules=["q_proj", "v_proj", "up_proj"], layers_to_transform=[2, 3], **options
    )
    model = get_peft_model(plain_model(tiny_base), config).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    model.save_pretrained(tmp_path)
    adapter = from_files((tmp_path / WEIGHTS_FILE).read_bytes(), (tmp_path / CONFIG_FILE).read_bytes())
    backbone = backbone_of(tiny_base, 2)
    base = probe_logits(backbone.model)
    Merger(backbone, {"one": adapter}, blocks=1).apply({"one": (1.0,)})
    expected = probe_logits(model)
    assert (expected - base).abs().max() > 0.5
    torch.testing.assert_close(probe_logits(backbone.model), expected, rtol=0, atol=1e-4)


def test_scales(files: dict[str, bytes]) -> None:
    assert {pair.scale for pair in read(changed(files, lora_alpha=9)).values()} == {3.0}
    assert {pair.scale for pair in read(changed(files, use_rslora=True)).values()} == {6 / math.sqrt(3)}
    mixed = read(changed(files, alpha_pattern={"q_proj": 12.0, r"layers\.3\.mlp\.up_proj": 30}))
    expected = dict.fromkeys(mixed, 2.0)
    expected |= {module: 4.0 for module in mixed if module.endswith("q_proj")} | {"model.layers.3.mlp.up_proj": 10.0}
    assert {module: pair.scale for module, pair in mixed.items()} == expected


def uneven(factors: dict[str, Factors]) -> dict[str, Factors]:
    """Give one module another rank, one another scale, and one both."""
    changed = dict(factors)
    q, up, down = (f"model.layers.{part}_proj" for part in ("2.self_attn.q", "3.mlp.up", "2.mlp.down"))
    changed[q] = Factors(factors[q].a[:2].clone(), factors[q].b[:, :2].clone(), factors[q].scale)
    changed[up] = Factors(factors[up].a, factors[up].b, 0.7)
    changed[down] = Factors(factors[down].a[:1].clone(), factors[down].b[:, :1].clone(), 1.3)
    return changed


@pytest.mark.parametrize("rslora", [False, True], ids=["plain", "rslora"])
@pytest.mark.parametrize("even", [True, False], ids=["one shape", "several shapes"])
def test_peft_reads_what_we_write(tiny_base: Path, tmp_path: Path, rslora: bool, even: bool) -> None:
    """PEFT's model on the files has the scales of the factors, and our merge at coefficient 1 its logits."""
    scale = 6 / math.sqrt(3) if rslora else 2.0
    random = random_factors(tiny_base, layers=(2, 3), seed=0)
    factors = {name: Factors(pair.a, pair.b, scale) for name, pair in random.items()}
    if not even:
        factors = uneven(factors)
    files = to_files(factors, base_name=BASE_NAME, rank=3, alpha=6.0, rslora=rslora)
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    model = PeftModel.from_pretrained(plain_model(tiny_base), tmp_path).eval()
    found = read(files)
    for name, pair in factors.items():
        layer = model.base_model.model.get_submodule(name)
        assert layer.scaling["default"] == pytest.approx(pair.scale, rel=1e-15)
        assert found[name].scale == pytest.approx(pair.scale, rel=1e-15)
        assert torch.equal(found[name].a, pair.a)
    config = json.loads(files[CONFIG_FILE])
    assert config["use_rslora"] is rslora
    assert (len(config["rank_pattern"]), len(config["alpha_pattern"])) == ((0, 0) if even else (2, 3))
    backbone = backbone_of(tiny_base, 1)
    Merger(backbone, {"one": factors}, blocks=1).apply({"one": (1.0,)})
    torch.testing.assert_close(probe_logits(backbone.model), probe_logits(model), rtol=0, atol=1e-4)


def test_half_precision_factors_are_read_as_float32(files: dict[str, bytes]) -> None:
    halves = {name: tensor.bfloat16() for name, tensor in load(files[WEIGHTS_FILE]).items()}
    found = read({**files, WEIGHTS_FILE: save(halves)})
    assert {pair.a.dtype for pair in found.values()} | {pair.b.dtype for pair in found.values()} == {torch.float32}


@pytest.mark.parametrize("options", [{"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"peft_type": "IA3"}])
def test_other_adapters_are_refused(files: dict[str, bytes], options: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match="expected a plain LoRA adapter without modules_to_save and without DoRA"):
        read(changed(files, **options))


@pytest.mark.parametrize(
    "key",
    [
        "base_model.model.model.layers.2.self_attn.q_proj.lora_magnitude_vector",
        "base_model.model.model.embed_tokens.lora_embedding_A",
        "base_model.model.model.layers.2.self_attn.q_proj.bias",
        "base_model.model.lm_head.weight",
    ],
)
def test_weights_that_no_task_vector_holds_are_refused(files: dict[str, bytes], key: str) -> None:
    tensors = load(files[WEIGHTS_FILE]) | {key: torch.zeros(3)}
    with pytest.raises(ModelError, match="only lora_A and lora_B weights") as caught:
        read({**files, WEIGHTS_FILE: save(tensors)})
    assert key in str(caught.value)


def test_half_a_pair_is_refused(files: dict[str, bytes]) -> None:
    tensors = load(files[WEIGHTS_FILE])
    del tensors["base_model.model.model.layers.2.mlp.up_proj.lora_B.weight"]
    with pytest.raises(ModelError, match=r"incomplete: \['model\.layers\.2\.mlp\.up_proj'\]"):
        read({**files, WEIGHTS_FILE: save(tensors)})
    with pytest.raises(ModelError, match="incomplete: all"):
        read({**files, WEIGHTS_FILE: save({})})


@pytest.mark.parametrize(
    "broken",
    [
        {WEIGHTS_FILE: b"not safetensors"},
        {CONFIG_FILE: b"{"},
        {CONFIG_FILE: b"\xff\xfe"},
        {CONFIG_FILE: b"[]"},
        {CONFIG_FILE: b"3"},
    ],
    ids=["weights", "half json", "not text", "a list", "a number"],
)
def test_other_bytes_are_refused(files: dict[str, bytes], broken: dict[str, bytes]) -> None:
    with pytest.raises(ModelError, match=r"not a PEFT adapter|expected a plain LoRA adapter"):
        read(files | broken)
