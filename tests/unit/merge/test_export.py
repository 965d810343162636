"""The merged model as files that other libraries load."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from tiny import backbone_of, base_ref, plain_model, probe_logits, random_factors
from transformers import AutoModelForCausalLM, AutoTokenizer

from memmcl.adapters.format import CONFIG_FILE, Factors, from_files
from memmcl.merge.build import Merger, merged_factors
from memmcl.merge.export import adapter_files, write_merge

COEFFICIENTS = {"one": (0.8, 0.3), "two": (0.4, 1.2), "three": (0.0, 0.0)}


@pytest.fixture(scope="module")
def adapters(tiny_base: Path) -> dict[str, dict[str, Factors]]:
    return {
        "one": random_factors(tiny_base, layers=(2, 3), seed=1),
        "two": random_factors(tiny_base, layers=(2, 3), rank=2, alpha=5.0, seed=2),
        "three": random_factors(tiny_base, layers=(2, 3), rank=1, alpha=1.0, seed=3),
    }


@pytest.fixture(scope="module")
def merged(adapters: dict[str, dict[str, Factors]]) -> dict[str, Factors]:
    return merged_factors(adapters, COEFFICIENTS, lowest=2, layers=4)


@pytest.fixture(scope="module")
def expected(tiny_base: Path, adapters: dict[str, dict[str, Factors]]) -> torch.Tensor:
    """The logits of the merge that the search evaluated; far from the base's."""
    backbone = backbone_of(tiny_base, 2)
    base = probe_logits(backbone.model)
    Merger(backbone, adapters, blocks=2).apply(COEFFICIENTS)
    logits = probe_logits(backbone.model)
    assert (logits - base).abs().max() > 1
    return logits


def test_the_adapter_is_the_merge_in_peft(
    tiny_base: Path, tmp_path: Path, merged: dict[str, Factors], expected: torch.Tensor
) -> None:
    files = adapter_files(merged, base_name="org/tiny")
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    model = PeftModel.from_pretrained(plain_model(tiny_base), tmp_path).eval()
    torch.testing.assert_close(probe_logits(model), expected, rtol=0, atol=1e-4)
    config = json.loads(files[CONFIG_FILE])
    assert config["base_model_name_or_path"] == "org/tiny"
    assert config["r"] == config["lora_alpha"] == 3 + 2 + 1
    assert {pair.scale for pair in from_files(*files.values()).values()} == {1.0}


def test_the_adapter_can_be_merged_into_the_weights_by_peft(
    tiny_base: Path, tmp_path: Path, merged: dict[str, Factors], expected: torch.Tensor
) -> None:
    for name, data in adapter_files(merged, base_name="org/tiny").items():
        (tmp_path / name).write_bytes(data)
    model = PeftModel.from_pretrained(plain_model(tiny_base), tmp_path).merge_and_unload()
    torch.testing.assert_close(probe_logits(model), expected, rtol=0, atol=1e-4)


def test_modules_of_different_ranks(tiny_base: Path, tmp_path: Path, adapters: dict[str, dict[str, Factors]]) -> None:
    uneven = {**adapters, "three": random_factors(tiny_base, layers=(3,), rank=1, seed=3)}
    coefficients = {**COEFFICIENTS, "three": (0.0, 0.7)}
    files = adapter_files(merged_factors(uneven, coefficients, lowest=2, layers=4), base_name="org/tiny")
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    config = json.loads(files[CONFIG_FILE])
    assert config["r"] == 6
    assert set(config["rank_pattern"].values()) == {5}
    backbone = backbone_of(tiny_base, 2)
    Merger(backbone, uneven, blocks=2).apply(coefficients)
    model = PeftModel.from_pretrained(plain_model(tiny_base), tmp_path).eval()
    torch.testing.assert_close(probe_logits(model), probe_logits(backbone.model), rtol=0, atol=1e-4)


def test_the_full_directory_loads_by_itself(
    tiny_base: Path, tmp_path: Path, merged: dict[str, Factors], expected: torch.Tensor
) -> None:
    write_merge(tmp_path / "full", base_ref(tiny_base), {"one": merged}, {"one": (1.0,)}, dtype="float32", split=2)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "full", dtype=torch.float32).eval()
    torch.testing.assert_close(probe_logits(model), expected, rtol=0, atol=1e-4)
    ours, theirs = AutoTokenizer.from_pretrained(tmp_path / "full"), AutoTokenizer.from_pretrained(tiny_base)
    messages = [{"role": "user", "content": "Lovely soup, rude waiter!"}]
    assert ours.apply_chat_template(messages, tokenize=False) == theirs.apply_chat_template(messages, tokenize=False)
    assert ours.encode("Lovely soup, rude waiter!") == theirs.encode("Lovely soup, rude waiter!")
    assert base_ref(tmp_path / "full").digest != base_ref(tiny_base).digest


def test_full_weights_are_cast_once(tiny_base: Path, tmp_path: Path, merged: dict[str, Factors]) -> None:
    write_merge(tmp_path / "half", base_ref(tiny_base), {"one": merged}, {"one": (1.0,)}, dtype="bfloat16", split=2)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype="auto").state_dict()
    searched = backbone_of(tiny_base, 2, "bfloat16")
    Merger(searched, {"unified": merged}, blocks=1).apply({"unified": (1.0,)})
    assert {weight.dtype for weight in found.values()} == {torch.bfloat16}
    assert all(torch.equal(found[name], weight) for name, weight in searched.model.state_dict().items())
