"""Sixteen random experts, and everyone who merges them: ours, mergekit, PEFT. `merging.py` is the command."""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lab import MODULES, Lab
from merging_memory import random_factors
from torch import Tensor

from memmcl.adapters.format import Factors, to_files
from memmcl.backbone.forward import Backbone
from memmcl.backbone.load import load_base, resolve_base
from memmcl.experts.lora import adapted
from memmcl.experts.settings import LoraShape
from memmcl.merge.build import Merger, merged_factors
from memmcl.merge.genome import Recipe

SIX = ("sent2", "asc", "uabsa", "aste", "irony", "emotion")
EXPERTS, RANK, ALPHA = 16, 8, 16.0


class Setting:
    """Random experts of one depth and dtype: in the resident model, in a PeftModel, and in files for mergekit."""

    def __init__(self, asked: argparse.Namespace, top: int, dtype: str, folder: Path) -> None:
        self.lab = Lab(
            asked.data, SIX, folder, train_rows=8, weak_rows=48, test_rows=8, top=top, dtype=dtype, model=asked.model
        )
        backbone = self.lab.backbone
        self.name = f"{backbone.layers - backbone.split} layers, {dtype}"
        self.dtype, self.folder = dtype, folder
        self.base = resolve_base(asked.model)
        self.draw = random.Random(0)
        self.ids = torch.tensor([next(iter(self.lab.rows.values()))[0].prompt])
        self.experts = random_experts(backbone)
        widths = {pair.a.shape[1] for expert in self.experts.values() for pair in expert.values()}
        grams = {name: {width: _gram(width) for width in widths} for name in self.experts}
        self.merger = Merger(
            backbone,
            self.experts,
            1,
            grams={
                name: {module: grams[name][pair.a.shape[1]] for module, pair in expert.items()}
                for name, expert in self.experts.items()
            },
        )
        write_experts(folder, self.experts, self.base.directory)
        self._peft: Any = None

    def weights(self) -> dict[str, float]:
        """Return a candidate: positive, since mergekit's ties divides by the weights that agree."""
        return {name: self.draw.uniform(0.1, 1.0) for name in self.experts}

    @torch.no_grad()
    def logits(self, model: Any) -> Tensor:
        """Return what a model says to the prompt, (length, vocabulary)."""
        found: Tensor = model(self.ids).logits[0].float()
        return found

    def defined(self, weights: Mapping[str, float]) -> tuple[Tensor, Tensor]:
        """Return the logits of a linear merge, one expert added after the other in float32, and those of the base."""
        model = load_base(self.base, "float32")
        plain = self.logits(model)
        for name, value in weights.items():
            for module, pair in self.experts[name].items():
                model.get_submodule(module).weight.addmm_(pair.b, pair.a, alpha=value * pair.scale)
        return self.logits(model), plain

    def ours(self, weights: Mapping[str, float], recipe: Recipe) -> None:
        """Put a merge into the resident weights."""
        self.merger.apply({name: (value,) for name, value in weights.items()}, recipe)

    @contextmanager
    def adapter(self, weights: Mapping[str, float]) -> Iterator[None]:
        """Run the linear merge as one adapter beside the resident weights."""
        backbone = self.lab.backbone
        coefficients = {name: (value,) for name, value in weights.items()}
        found = merged_factors(self.experts, coefficients, lowest=backbone.split, layers=backbone.layers)
        rank = max(len(pair.a) for pair in found.values())
        with adapted(backbone, LoraShape((), rank, float(rank)), found), torch.no_grad():
            yield

    def mergekit(self, weights: Mapping[str, float], recipe: Recipe) -> Any:
        """Merge to disk and load."""
        method = {"linear": "task_arithmetic"}.get(recipe.method, recipe.method)
        return by_mergekit(self.base.directory, self.folder, weights, self.dtype, method, recipe.parameters)

    @property
    def peft(self) -> Any:
        """A PeftModel of a base of its own that holds all experts."""
        if self._peft is None:
            from peft import PeftModel

            first, *others = self.experts
            base = load_base(self.base, self.dtype)
            self._peft = PeftModel.from_pretrained(base, self.folder / first, adapter_name=first)
            for name in others:
                self._peft.load_adapter(self.folder / name, adapter_name=name)
        return self._peft.eval()

    def cat(self, weights: Mapping[str, float]) -> None:
        """Put a linear merge into the PeftModel as one adapter, and drop the former one."""
        if "merged" in self.peft.peft_config:
            self.peft.delete_adapter("merged")
        self.peft.add_weighted_adapter(list(weights), list(weights.values()), "merged", combination_type="cat")
        self.peft.set_adapter("merged")


def write_experts(folder: Path, experts: Mapping[str, Mapping[str, Factors]], base: Path) -> None:
    """Write experts of rank `RANK` as PEFT's folders."""
    for name, factors in experts.items():
        (folder / name).mkdir()
        for file, data in to_files(factors, base_name=str(base), rank=RANK, alpha=ALPHA).items():
            (folder / name / file).write_bytes(data)


def by_mergekit(
    base: Path,
    folder: Path,
    weights: Mapping[str, float],
    dtype: str,
    method: str = "task_arithmetic",
    parameters: Mapping[str, Any] | None = None,
    device: str = "cpu",
) -> Any:
    """Have mergekit merge the experts in `folder` to disk, and return what transformers loads of that."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions
    from transformers import AutoModelForCausalLM

    config = {
        "merge_method": method,
        "base_model": str(base),
        "dtype": dtype,
        "models": [
            {"model": f"{base}+{folder / name}", "parameters": {"weight": value, **(parameters or {})}}
            for name, value in weights.items()
        ],
    }
    options = MergeOptions(
        lora_merge_cache=str(folder / "cache"),
        lora_merge_dtype=dtype,
        copy_tokenizer=False,
        write_model_card=False,
        quiet=True,
        cuda=device == "cuda",
    )
    run_merge(MergeConfiguration.model_validate(config), str(folder / "merged"), options)
    return AutoModelForCausalLM.from_pretrained(folder / "merged", dtype=getattr(torch, dtype)).eval().to(device)


def random_experts(backbone: Backbone) -> dict[str, dict[str, Factors]]:
    """Return experts whose sum changes logits about as much as that of trained ones, which agree more than these."""
    generator = torch.Generator().manual_seed(0)
    linear = [
        (name, module)
        for name, module in backbone.model.named_modules()
        if name.startswith("model.layers.")
        and name.rpartition(".")[2] in MODULES
        and int(name.split(".")[2]) >= backbone.split
    ]
    return {
        f"e{index}": {
            name: random_factors(module.out_features, module.in_features, RANK, ALPHA / RANK, generator)
            for name, module in linear
        }
        for index in range(EXPERTS)
    }


def _gram(width: int) -> Tensor:
    inputs = torch.randn(512, width)
    return inputs.T @ inputs
