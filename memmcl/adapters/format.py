"""LoRA adapters in PEFT's format <-> the factors of their task vectors."""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from memmcl.adapters.options import by_pattern, read_options
from memmcl.backbone.tensors import TensorInfo, read_header
from memmcl.errors import ModelError, shown
from memmcl.files.untrusted import JSON_BYTES

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
WEIGHTS_BYTES = 8 << 30
"""Bytes of an adapter's weights; rank 64 on all linear layers of a model of 405 billion parameters takes half."""

_KEY = re.compile(r"^base_model\.model\.(?P<module>.+)\.lora_(?P<factor>[AB])\.weight$")
_NAMED = "base_model.model.{}.lora_{}.weight"
_FLOATS = {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"}


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

    Modules of another rank or scale (training may start from such an adapter) get a pattern. `base_name` is the
    configured id of the base model, never a path of this machine's cache.
    """

    def divisor(of: int) -> float:
        return math.sqrt(of) if rslora else of

    tensors = {
        _NAMED.format(module, letter): matrix.contiguous()
        for module, pair in factors.items()
        for letter, matrix in (("A", pair.a), ("B", pair.b))
    }
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


def read_file(name: str, file: BinaryIO) -> bytes:
    """Return the content of one of the two files of an adapter, which is open at its beginning.

    Raises:
        OSError: it cannot be read.
        ModelError: it is larger than any adapter, or not what its header describes; then it is not read to its end.
    """
    try:
        if name == CONFIG_FILE:
            config = file.read(JSON_BYTES + 1)
            if len(config) > JSON_BYTES:
                raise ValueError(f"it has more than {JSON_BYTES:,} bytes")
            return config
        header = read_header(file)
        if header.size > WEIGHTS_BYTES:
            raise ValueError(f"its header describes {header.size:,} bytes, and memmcl reads {WEIGHTS_BYTES:,} at most")
        weights = header.raw + file.read(header.size - len(header.raw) + 1)
    except ValueError as error:
        raise ModelError(f"not a PEFT adapter: {name}: {error}; get it anew") from error
    if len(weights) != header.size:
        raise ModelError(f"not a PEFT adapter: {name}: its header and its size do not fit together; get it anew")
    return weights


def from_files(weights: bytes, config: bytes) -> dict[str, Factors]:
    """Read a PEFT LoRA adapter.

    Raises:
        ModelError: not a LoRA adapter, or one that is no sum of task vectors.
    """
    options = read_options(config)
    if options.peft_type != "LORA" or options.modules_to_save or options.use_dora:
        raise ModelError("expected a plain LoRA adapter without modules_to_save and without DoRA; retrain it as one")
    try:
        ranks = _ranks(read_header(io.BytesIO(weights)).tensors)
        alphas = by_pattern("alpha_pattern", options.alpha_pattern or {}, ranks, options.lora_alpha)
        tensors = load(weights)
    except (ValueError, SafetensorError) as error:
        raise ModelError(f"not a PEFT adapter: {error}") from error
    return {
        module: Factors(
            tensors[_NAMED.format(module, "A")].float(),
            tensors[_NAMED.format(module, "B")].float(),
            alphas[module] / (math.sqrt(rank) if options.use_rslora else rank),
        )
        for module, rank in sorted(ranks.items())
    }


def _ranks(tensors: Mapping[str, TensorInfo]) -> dict[str, int]:
    """Return the rank of each module; raise ModelError where the tensors are not two matrices of one rank each."""
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    for key, info in tensors.items():
        match = _KEY.match(key)
        if match is None:
            raise ModelError(
                f"expected only lora_A and lora_B weights of linear layers in the adapter; found {shown(key)}"
            )
        if info.dtype not in _FLOATS or len(info.shape) != 2 or not info.elements:
            raise ModelError(
                f"expected matrices of floating-point numbers in the adapter, got {shown(key)} of type "
                f"{shown(info.dtype)} and shape {shown(list(info.shape))}; get the adapter anew"
            )
        shapes.setdefault(match["module"], {})[match["factor"]] = info.shape
    broken = sorted(module for module, pair in shapes.items() if set(pair) != {"A", "B"})
    if broken or not shapes:
        raise ModelError(
            f"expected a lora_A and a lora_B for each module; incomplete: {shown(broken) if broken else 'all'}"
        )
    for module, pair in shapes.items():
        if pair["A"][0] != pair["B"][1]:
            raise ModelError(
                f"expected matrices of one rank, got {module} with a lora_A of {pair['A'][0]} and a lora_B of "
                f"{pair['B'][1]}; get the adapter anew"
            )
    return {module: pair["A"][0] for module, pair in shapes.items()}


def files_like(config: bytes, factors: Adapter, base_name: str) -> dict[str, bytes]:
    """Return the two files of an adapter with the rank, alpha and rsLoRA of `config`, and patterns where it differs."""
    options = read_options(config)
    return to_files(
        factors, base_name=base_name, rank=options.r, alpha=options.lora_alpha, rslora=bool(options.use_rslora)
    )
