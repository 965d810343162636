"""The merged model as files: an exact PEFT adapter, or a plain Hugging Face directory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from memmcl.backbone.forward import Backbone
from memmcl.backbone.load import BaseRef, load_base, load_tokenizer
from memmcl.errors import ModelError
from memmcl.experts.adapter import Adapter, Factors, to_files
from memmcl.merge.build import Merger


def adapter_files(factors: Mapping[str, Factors], *, base_name: str) -> dict[str, bytes]:
    """Return the files of a PEFT adapter folder for merged factors; every module must have the same rank."""
    ranks = {len(pair.a) for pair in factors.values()}
    if len(ranks) != 1:
        raise ModelError(f"an exact adapter needs one rank in all modules; got {sorted(ranks)}: export full weights")
    rank = ranks.pop()
    return to_files(factors, base_name=base_name, rank=rank, alpha=rank)


def write_full(directory: Path, base: BaseRef, adapter: Adapter, *, dtype: str, split: int) -> None:
    """Write a Hugging Face model directory: the adapter merged into the weights, and the tokenizer.

    Deltas are summed in float32 and cast once to `dtype`.
    """
    model = load_base(base, dtype)
    Merger(Backbone(model, 0, split), {"unified": adapter}, blocks=1).apply({"unified": (1.0,)})
    model.save_pretrained(directory)
    load_tokenizer(base).save_pretrained(directory)
