"""The base's weights: read again from its files where these hold them, copied where they do not."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import backbone_of, random_factors

from memmcl.backbone.forward import Backbone
from memmcl.errors import ModelError
from memmcl.merge.build import Merger
from memmcl.merge.pristine import Pristine

MODULE = "model.layers.2.mlp.up_proj"
OTHER = "model.layers.3.self_attn.q_proj"


def weights_of(backbone: Backbone) -> dict[str, torch.Tensor]:
    return {name: backbone.model.get_submodule(name).weight for name in (MODULE, OTHER)}


@pytest.fixture
def base(tiny_base: Path, tmp_path: Path) -> Path:
    """A copy of the tiny base that a test may change."""
    return shutil.copytree(tiny_base, tmp_path / "base")


def copies(pristine: Pristine) -> set[str]:
    return set(pristine._copies)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_that_files_hold_are_not_copied(base: Path, dtype: str) -> None:
    weights = weights_of(backbone_of(base, 1, dtype))
    pristine = Pristine(weights, base)
    before = {name: weight.clone() for name, weight in weights.items()}
    assert copies(pristine) == set()
    for name, weight in weights.items():
        weight.zero_()
        assert torch.equal(dict(pristine)[name], before[name])
        assert dict(pristine)[name].dtype == weight.dtype


def test_weights_that_files_do_not_hold_are_copied(base: Path) -> None:
    weights = weights_of(backbone_of(base, 1))
    weights[MODULE][0, 0] += 1  # as where something was folded into them
    pristine = Pristine(weights, base)
    kept = weights[MODULE].clone()
    assert copies(pristine) == {MODULE}
    weights[MODULE].zero_()
    assert torch.equal(dict(pristine)[MODULE], kept)


@pytest.mark.parametrize("damage", ["gone", "unreadable", "elsewhere"])
def test_without_files_everything_is_copied(base: Path, damage: str) -> None:
    weights = weights_of(backbone_of(base, 1))
    (file,) = base.glob("*.safetensors")
    if damage == "gone":
        shutil.rmtree(base)
    elif damage == "unreadable":
        file.unlink()  # the model may have it mapped
        file.write_bytes(b"no safetensors")
    else:
        base = base / "elsewhere"
    pristine = Pristine(weights, base)
    assert copies(pristine) == {MODULE, OTHER}
    assert torch.equal(dict(pristine)[OTHER], weights[OTHER])


def test_sharded_files(base: Path) -> None:
    weights = weights_of(backbone_of(base, 1))
    (file,) = base.glob("*.safetensors")
    tensors = load_file(file)
    file.unlink()
    for number, name in enumerate(tensors):
        save_file({name: tensors[name]}, base / f"model-{number:05}-of-{len(tensors):05}.safetensors")
    pristine = Pristine(weights, base)
    assert copies(pristine) == set()
    assert torch.equal(dict(pristine)[OTHER], weights[OTHER])


@pytest.mark.parametrize(
    ("damage", "said"),
    [("changed", "was changed while it was in use; start again"), ("gone", "cannot be read any more")],
)
def test_files_that_change_under_a_merge(base: Path, damage: str, said: str) -> None:
    backbone = backbone_of(base, 1)
    merger = Merger(backbone, {"one": random_factors(base, layers=(2, 3), seed=1)}, blocks=1)
    (file,) = base.glob("*.safetensors")
    if damage == "changed":
        tensors = load_file(file)
        file.unlink()
        save_file({name: tensor + 1 for name, tensor in tensors.items()}, file)
    else:
        file.unlink()
    with pytest.raises(ModelError, match=said):
        merger.apply({"one": (1.0,)})
