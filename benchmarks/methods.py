"""Every merge method on real experts: what is kept of them on test rows, with the scale that weak rows choose.

    python benchmarks/methods.py --data DIR --out methods.jsonl plain anchored:every=4 [--methods ties tsv ...]

Experts as in experts.py: `steps` steps of `batch` rows each. Of each method a grid of scales (of the weights where it
has none of its own) is put to the weak rows, by likelihood as the search does; the best goes to the test rows, once.
regmean's second moments are those of the weak prompts under each expert. A line of JSON is appended for each variant
and method; `--table` prints such a file.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from experts import SIX, Trial, mean, parse
from lab import Lab

from memmcl.adapters.format import Adapter
from memmcl.evolve.fitness import loglik_retention
from memmcl.merge import METHODS
from memmcl.merge.genome import Recipe
from memmcl.merge.grams import input_moments

WEIGHTS = (0.4, 0.7, 1.0, 1.3)
SCALES = (0.5, 1.0, 1.5, 2.5, 4.0)
"""of methods that average"""
Coefficients = dict[str, tuple[float, ...]]


def candidates(method: str, experts: Sequence[str]) -> dict[float, tuple[Coefficients, Recipe]]:
    """Return, by scale, what is put to the weak rows."""
    if METHODS[method].normalises:
        ones = dict.fromkeys(experts, (1.0,))
        return {scale: (ones, Recipe(method, {"scale": scale})) for scale in SCALES}
    return {scale: (dict.fromkeys(experts, (scale,)), Recipe(method)) for scale in WEIGHTS}


def measure(trial: Trial, text: str, methods: Sequence[str], out: Path, told: Mapping[str, Any]) -> None:
    """Train or read the experts, then merge them by each method."""
    lab = trial.lab
    warm, experts = trial.experts(parse(text))
    base = {name: lab.score(name) for name in lab.subtasks}
    own, reference = {}, {}
    with lab.merger(experts, warm) as (merger, pinned):
        for name in experts:
            merger.apply({name: (1.0,)} | pinned)
            own[name] = lab.score(name)
            reference[name] = lab.probe(name, "weak").gold_logprob()
    for method in methods:
        started = time.perf_counter()
        grams = moments(lab, warm, experts) if METHODS[method].grams else None
        with lab.merger(experts, warm, grams) as (merger, pinned):
            seen: dict[float, float] = {}
            tried = candidates(method, list(experts))
            for scale, (coefficients, recipe) in tried.items():
                merger.apply(coefficients | pinned, recipe)
                found = lab.logprobs()
                seen[scale] = float(np.mean([loglik_retention(found[name], reference[name]) for name in found]))
            best = max(seen, key=lambda scale: seen[scale])
            coefficients, recipe = tried[best]
            merger.apply(coefficients | pinned, recipe)
            merged = {name: lab.score(name) for name in lab.subtasks}
        line = {
            **told,
            "variant": text,
            "method": method,
            "scale": best,
            "seen": seen,
            "base": base,
            "own": own,
            "merged": merged,
            "seconds": time.perf_counter() - started,
        }
        with out.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(row_of(line), flush=True)


def moments(lab: Lab, warm: Adapter | None, experts: Mapping[str, Adapter]) -> dict[str, dict[str, Any]]:
    """Return the second moments of each expert's inputs over its own weak prompts, under that expert."""
    found = {}
    with lab.merger(experts, warm) as (merger, pinned):
        for name, adapter in experts.items():
            merger.apply({name: (1.0,)} | pinned)
            prompts = [lab.prompter.prompt(lab.subtasks[name], row) for row in lab.parts[name]["weak"]]
            found[name] = input_moments(lab.backbone.model, list(adapter), prompts)
    return found


def row_of(line: Mapping[str, Any]) -> str:
    """Return one row of the table."""
    base, own, merged = (mean(line[key], "score") for key in ("base", "own", "merged"))
    error = float(np.sqrt(np.mean([found["se"] ** 2 for found in line["merged"].values()]) / len(line["merged"])))
    numbers = (f"{merged:.3f} ± {error:.3f}", f"{merged / own:.2f}", f"{(merged - base) / (own - base):.2f}")
    return f"| {line['variant']} | {line['method']} | {line['scale']:g} | {' | '.join(numbers)} |"


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variants", nargs="*", default=["plain", "anchored:every=4"])
    parser.add_argument("--data", help="directory in SentiEval's layout")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--keep", type=Path, default=Path("experts-kept"), help="folder of trained adapters")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--train-rows", type=int, default=400)
    parser.add_argument("--test-rows", type=int, default=100)
    parser.add_argument("--table", action="store_true", help="print --out as a table and stop")
    asked = parser.parse_args()
    head = "| experts | method | scale | test score | merged / own | NAI |\n|---|---|---:|---:|---:|---:|"
    print(head)
    if asked.table:
        print("\n".join(row_of(json.loads(line)) for line in asked.out.read_text().splitlines()))
        return
    lab = Lab(asked.data, SIX, asked.keep, train_rows=asked.train_rows, weak_rows=48, test_rows=asked.test_rows)
    trial = Trial(lab, asked.seed, asked.steps, asked.batch)
    told = {key: getattr(asked, key) for key in ("seed", "steps", "batch", "train_rows", "test_rows")}
    for text in asked.variants:
        measure(trial, text, asked.methods, asked.out, told)


if __name__ == "__main__":
    main()
