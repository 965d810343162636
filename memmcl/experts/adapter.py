"""LoRA adapters in PEFT's format <-> the factors of their task vectors."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from memmcl.errors import ModelError

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
_KEY = re.compile(r"^base_model\.model\.(?P<module>.+)\.lora_(?P<factor>[AB])\.weight$")


@dataclass(frozen=True)
class Factors:
    """One module's task vector in factors: T = scale * b @ a. a: (r, d_in) float32; b: (d_out, r) float32."""

    a: Tensor
    b: Tensor
    scale: float

    def to(self, device: str | torch.device) -> Factors:
        """Return the factors on a device; themselves where they are there."""
        return Factors(self.a.to(device), self.b.to(device), self.scale)


Adapter = Mapping[str, Factors]
"""Factors by module name as in the base model, for example `model.layers.20.self_attn.q_proj`."""


def to_files(factors: Adapter, *, base_name: str, rank: int, alpha: float, rslora: bool = False) -> dict[str, bytes]:
    """Return the two files of a PEFT adapter folder: scale = alpha / rank, or alpha / sqrt(rank) with `rslora`.

    Modules of another rank or scale, as an adapter that training started from may have, are named in the patterns.
    `base_name` is the configured id of the base model, never a path of this machine's cache.
    """
    from safetensors.torch import save

    def divisor(of: int) -> float:
        return math.sqrt(of) if rslora else of

    tensors: dict[str, Tensor] = {}
    for module, pair in factors.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = pair.a.contiguous()
        tensors[f"base_model.model.{module}.lora_B.weight"] = pair.b.contiguous()
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        # Whole names: PEFT matches them exactly, so that layers left out stay untouched.
        "target_modules": sorted(factors),
        "use_rslora": rslora,
        "rank_pattern": {name: len(pair.a) for name, pair in sorted(factors.items()) if len(pair.a) != rank},
        "alpha_pattern": {
            name: pair.scale * divisor(len(pair.a))
            for name, pair in sorted(factors.items())
            if pair.scale != alpha / divisor(len(pair.a))
        },
    }
    return {
        WEIGHTS_FILE: save(tensors, metadata={"format": "pt"}),
        CONFIG_FILE: (json.dumps(config, indent=2, sort_keys=True) + "\n").encode(),
    }


def from_files(weights: bytes, config: bytes) -> dict[str, Factors]:
    """Read a PEFT LoRA adapter.

    Raises:
        ModelError: not a LoRA adapter, or one with parts that a merge of task vectors cannot hold.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        options: dict[str, Any] = dict(json.loads(config))
        tensors = load(weights)
    except (ValueError, TypeError, SafetensorError) as error:
        raise ModelError(f"not a PEFT adapter: {error}") from error
    if options.get("peft_type") != "LORA" or options.get("modules_to_save") or options.get("use_dora"):
        raise ModelError("expected a plain LoRA adapter without modules_to_save and without DoRA; retrain it as one")
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = _KEY.match(key)
        if match is None:
            raise ModelError(f"expected only lora_A and lora_B weights of linear layers in the adapter; found {key!r}")
        pairs.setdefault(match["module"], {})[match["factor"]] = tensor.float()
    broken = sorted(module for module, pair in pairs.items() if set(pair) != {"A", "B"})
    if broken or not pairs:
        raise ModelError(f"expected a lora_A and a lora_B for each module; incomplete: {broken or 'all'}")
    return {
        module: Factors(pair["A"], pair["B"], _scale(options, module, len(pair["A"])))
        for module, pair in sorted(pairs.items())
    }


def _scale(options: Mapping[str, Any], module: str, rank: int) -> float:
    alpha = _pattern(options.get("alpha_pattern"), module, options.get("lora_alpha", rank))
    return float(alpha / math.sqrt(rank) if options.get("use_rslora") else alpha / rank)


def _pattern(patterns: Mapping[str, float] | None, module: str, default: float) -> float:
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default
