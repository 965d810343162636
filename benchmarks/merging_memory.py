"""What merging takes in memory, and the Core Space against its definition; `merging.py` is the command.

memory: a Llama of 1.1 billion random weights is written to a temporary directory once and loaded by `load_base` in a
fresh process for each method, with sixteen experts of rank 8 in all linear modules. Told of each, in MB resident
(VmRSS, VmHWM; the weights are read once, so that pages of a mapped file count): the base, the factors, the Merger, the
peak of two candidates, and how far that lies above the base. ties merges the first layer only, others as if at
coefficient zero: modules come one after another, so the rest would only repeat it.

spectral: tsv and iso_cts of sixteen experts in one module, in the Core Space (`first`: with finding the basis) and
dense, each task vector written out when it is read. Peaks are of resident memory above that before, the result
included.
"""

from __future__ import annotations

import ctypes
import gc
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from memmcl.adapters.format import Factors
from memmcl.backbone.forward import Backbone
from memmcl.backbone.load import BaseRef, load_base, quiet_transformers
from memmcl.merge.build import Merger
from memmcl.merge.deltas import WrittenOut
from memmcl.merge.genome import Recipe
from memmcl.merge.spectral import core_space
from memmcl.merge.table import run_method

EXPERTS, RANK, SCALE = 16, 8, 2.0
LIMIT_MB = 1536
SHAPES = ["576x576", "576x1536", "2048x2048", "2048x8192"]
ONCE = 2**21
"""Modules of more entries are merged densely only once: it takes minutes."""
LLAMA = {
    "hidden_size": 2048,
    "num_hidden_layers": 16,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32_000,
    "tie_word_embeddings": False,
}


def random_factors(d_out: int, d_in: int, rank: int, scale: float, generator: torch.Generator) -> Factors:
    """Return factors: A as PEFT starts it, B large enough for bfloat16 to show what they change."""
    a = torch.empty(rank, d_in).uniform_(-(d_in**-0.5), d_in**-0.5, generator=generator)
    return Factors(a, 0.05 * torch.randn(d_out, rank, generator=generator), scale)


def resident(what: str = "VmRSS") -> float:
    """Return a line of /proc/self/status, in MB."""
    found = re.search(rf"{what}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


def forget_peak() -> float:
    """Give back what is free, let VmHWM begin anew, and return what is resident, in MB."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return resident()


def measure_memory(methods: Sequence[str], dtypes: Sequence[str]) -> None:
    """Print a table of memory."""
    columns = ("base", "factors", "Merger", "peak of apply", "above base", "of it file pages", "apply, CPU s")
    print(f"\n| method | dtype | parameters | {' | '.join(columns)} |\n|---|---|{'---:|' * (len(columns) + 1)}")
    for dtype in dtypes:
        with tempfile.TemporaryDirectory(prefix="mmm") as folder:
            _in_process("make", dtype, folder)
            for method in methods:
                told = _in_process(method, dtype, folder)
                cells = [f"{told[column]:,.0f}" for column in columns]
                print(f"| {method} | {dtype} | {told['parameters'] / 1e9:.2f}e9 | {' | '.join(cells)} |", flush=True)


def _in_process(*arguments: str) -> dict[str, float]:
    command = [sys.executable, __file__, *arguments]
    ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return dict(json.loads(ended.stdout.splitlines()[-1]))


def make(dtype: str, folder: str) -> dict[str, float]:
    """Write the model."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    quiet_transformers()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**LLAMA), dtype=getattr(torch, dtype))
    model.to_empty(device="cpu")
    for weight in model.parameters():
        weight.data.uniform_(-0.03, 0.03)
    model.save_pretrained(folder)
    return {}


@torch.no_grad()
def merge(method: str, dtype: str, folder: str) -> dict[str, float]:
    """Return what is resident while candidates are merged, in MB."""
    backbone = Backbone(load_base(BaseRef("random", Path(folder), "", None), dtype), 0, 0)
    for weight in backbone.model.parameters():
        weight.sum()
    found = {"parameters": float(sum(weight.numel() for weight in backbone.model.parameters()))}
    found["base"] = forget_peak()
    generator = torch.Generator().manual_seed(0)
    linear = [
        (name, module)
        for name, module in backbone.model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith("model.layers.")
    ]
    experts = {
        f"e{index}": {
            name: random_factors(module.out_features, module.in_features, RANK, SCALE, generator)
            for name, module in linear
        }
        for index in range(EXPERTS)
    }
    found["factors"] = forget_peak() - found["base"]
    merger = Merger(backbone, experts, blocks=backbone.layers)
    found["Merger"] = resident("VmHWM") - found["base"] - found["factors"]
    started = time.process_time()
    for value in (0.3, 0.5):
        rest = 0.0 if method == "ties" else value
        merger.apply({name: (value, *[rest] * (backbone.layers - 1)) for name in experts}, Recipe(method))
    found["apply, CPU s"] = (time.process_time() - started) / 2
    found["peak of apply"] = resident("VmHWM")
    found["above base"] = found["peak of apply"] - found["base"]
    found["of it file pages"] = resident("RssFile")
    return found


def measure_spectral(methods: Sequence[str], shapes: Sequence[str], repeats: int) -> None:
    """Print a table of differences, seconds and memory."""
    columns = (
        "difference",
        "dense, CPU s",
        "Core Space, first",
        "later",
        "ratio, first",
        "ratio, later",
        "dense, peak MB",
        "Core Space, peak MB",
    )
    print(f"\n| module | method | {' | '.join(columns)} |\n|---|---|{'---:|' * len(columns)}", flush=True)
    for shape in shapes:
        d_out, d_in = map(int, shape.split("x"))
        generator = torch.Generator().manual_seed(0)
        factors = [random_factors(d_out, d_in, RANK, SCALE, generator) for _ in range(EXPERTS)]
        for method in methods:
            turns = [spectral_turn(method, factors, turn) for turn in range(repeats if d_out * d_in <= ONCE else 1)]
            cells = [spread([turn[column] for turn in turns]) for column in columns]
            print(f"| {shape} | {method} | {' | '.join(cells)} |", flush=True)
            worst = max(turn["difference"] for turn in turns)
            assert worst <= 1e-4, f"{method} in the Core Space is {worst:.1e} from its definition"


def spectral_turn(method: str, factors: Sequence[Factors], seed: int) -> dict[str, float]:
    """Return the numbers of one candidate: in the Core Space twice, then dense."""
    merge_of = partial(run_method, method)
    weights = torch.rand(len(factors), generator=torch.Generator().manual_seed(seed)) + 0.1
    cores: list[Any] = []

    def in_core() -> Tensor:
        if not cores:
            cores.append(core_space(factors))
        core = cores[0]
        merged: Tensor = core.left @ merge_of(core.matrices, weights) @ core.right
        return merged

    def dense() -> Tensor:
        return merge_of(WrittenOut(factors), weights)

    (found, first, core_peak), (_, later, _), (wanted, seconds, peak) = map(_watched, (in_core, in_core, dense))
    return {
        "difference": float((found - wanted).norm() / wanted.norm()),
        "dense, CPU s": seconds,
        "Core Space, first": first,
        "later": later,
        "ratio, first": seconds / first,
        "ratio, later": seconds / later,
        "dense, peak MB": peak,
        "Core Space, peak MB": core_peak,
    }


def _watched(call: Callable[[], Tensor]) -> tuple[Tensor, float, float]:
    """Return what it returns, its CPU seconds, and its peak above what was resident before, in MB."""
    before, started = forget_peak(), time.process_time()
    found = call()
    return found, time.process_time() - started, resident("VmHWM") - before


def spread(values: Sequence[float]) -> str:
    """Return the median, and the range where there are more."""
    middle = f"{statistics.median(values):.3g}"
    return f"{middle} [{min(values):.3g}, {max(values):.3g}]" if len(values) > 1 else middle


if __name__ == "__main__":
    torch.set_num_threads(1)
    what, *others = sys.argv[1:]
    print(json.dumps(make(*others) if what == "make" else merge(what, *others)))
