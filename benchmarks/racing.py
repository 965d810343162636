"""Which race spends the fewest weak rows: thousands of searches on a model of real rows.

    python benchmarks/racing.py measure --data DIR --rows rows.npz [--variant plain]
    python benchmarks/racing.py simulate --rows rows.npz [--seeds 16]

measure: the likelihoods of 134 merges of three real experts on every weak row (minutes on one core). simulate: each
row's log-probability becomes a cubic function of the coefficients (ridge regression; its correlation with held-out
merges is told), and searches of 100 candidates run on that with races of many kinds, whole strategies as they are in
the product. Told of each, means over seeds: rows in all, fitness of the winner on all rows, and rows until 80, 90 and
95 % of what plain CMA-ES gains over its best seed are reached, as a share of what plain CMA-ES needs for that.
"""

from __future__ import annotations

import argparse
import tempfile
from itertools import combinations_with_replacement
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from memmcl.config import SearchConfig
from memmcl.evolve import LookAhead, build_strategy, seed_genomes
from memmcl.evolve.fitness import fitness, loglik_retention
from memmcl.evolve.racing import Race

Reals = npt.NDArray[np.float64]
LAMBDAS, BOUNDS = SearchConfig().lambdas, SearchConfig().bounds
SHARES = (0.8, 0.9, 0.95)
RACES: dict[str, dict[str, Any]] = {
    "no race": {},
    "random, no race": {"strategy": "random"},
    "genetic, no race": {"strategy": "genetic"},
    "bayesian, no race": {"strategy": "bayesian"},
    **{
        f"bayesian, {rungs}, keep {keep}": {"strategy": "bayesian", "rungs": rungs, "keep": keep}
        for rungs in ((0.25,), (0.15, 0.4))
        for keep in (0.5, 0.3)
    },
    **{
        f"{rungs}, keep {keep}, {order}": {"rungs": rungs, "keep": keep, "order": order}
        for rungs in ((0.25,), (0.15, 0.4), (0.25, 0.5))
        for keep in (0.5, 0.3, 0.2)
        for order in ("as drawn", "gap first", "gap last")
    },
}


def measure(asked: argparse.Namespace) -> None:
    """Put merges to rows."""
    from experts import Trial, parse
    from lab import Lab

    from memmcl.evaluate.teacher_forced import TeacherForced

    names = sorted(("sent2", "asc", "emotion"))
    with tempfile.TemporaryDirectory() as folder:
        keep = asked.keep or Path(folder)
        lab = Lab(asked.data, names, keep, train_rows=400, weak_rows=48, test_rows=8)
        warm, experts = Trial(lab, 0, 80, 8).experts(parse(asked.variant))
    draw = np.random.default_rng(0)
    spread, near = draw.uniform(*BOUNDS, (70, 3)), np.clip(draw.normal(0.75, 0.25, (60, 3)), *BOUNDS)
    genomes = np.concatenate([spread, near, np.eye(3), np.zeros((1, 3))])
    rows = {name: lab.parts[name]["weak"] for name in names}
    given = {
        name: TeacherForced(
            lab.backbone, lab.prompter, lab.subtasks[name], rows[name], [row.answer for row in rows[name]]
        )
        for name in names
    }
    found: dict[str, list[Reals]] = {name: [] for name in names}
    with lab.merger(experts, warm) as (merger, pinned):
        for genome in genomes:
            merger.apply({name: (float(value),) for name, value in zip(names, genome, strict=True)} | pinned)
            for name in names:
                (part,) = given[name].segments()
                found[name].append(part.logprobs)
    tokens = {f"tokens {name}": given[name].tokens for name in names}
    np.savez(asked.rows, genomes=genomes, names=names, **{n: np.array(v) for n, v in found.items()}, **tokens)


class Rows:
    """Every row's log-probability as a function of the genome."""

    def __init__(self, path: Path) -> None:
        data = np.load(path)
        self.names = [str(name) for name in data["names"]]
        genomes = data["genomes"]
        self.tokens = {name: data[f"tokens {name}"] for name in self.names}
        self.expert = {name: data[name][len(genomes) - 4 + place] for place, name in enumerate(self.names)}
        self.base = {name: data[name][-1] for name in self.names}
        features, held = cubic(genomes), np.arange(len(genomes)) % 5 == 0
        self._weights = {name: ridge(features, data[name]) for name in self.names}
        for name in self.names:
            told = features[held] @ ridge(features[~held], data[name][~held])
            both = [
                [self.retention(name, row, np.arange(row.size)) for row in rows] for rows in (told, data[name][held])
            ]
            print(f"{name}: correlation of retention with held-out merges {np.corrcoef(both)[0, 1]:.2f}")

    def of(self, genome: tuple[float, ...]) -> dict[str, Reals]:
        """Return the log-probabilities of all rows, by subtask."""
        features = cubic(np.array([genome]))[0]
        return {name: features @ self._weights[name] for name in self.names}

    def retention(self, name: str, logprobs: Reals, rows: npt.NDArray[np.int64]) -> float:
        """Return retention on some rows."""
        tokens = self.tokens[name][rows].sum()
        return loglik_retention(logprobs[rows].sum() / tokens, self.expert[name][rows].sum() / tokens)

    def order(self, name: str, kind: str) -> npt.NDArray[np.int64]:
        """Return the rows in the order of a race."""
        gaps = np.abs(self.expert[name] - self.base[name]) / self.tokens[name]
        orders = {"as drawn": np.arange(gaps.size), "gap first": np.argsort(-gaps), "gap last": np.argsort(gaps)}
        return orders[kind]


def cubic(genomes: Reals) -> Reals:
    """Return all monomials up to degree three."""
    columns = [np.ones(len(genomes))]
    for degree in (1, 2, 3):
        for genes in combinations_with_replacement(range(genomes.shape[1]), degree):
            columns.append(np.prod(genomes[:, genes], axis=1))
    return np.stack(columns, 1)


def ridge(features: Reals, values: Reals) -> Reals:
    """Return the weights of a ridge regression."""
    found: Reals = np.linalg.solve(features.T @ features + 1e-2 * np.eye(features.shape[1]), features.T @ values)
    return found


def search(
    rows: Rows,
    seed: int,
    *,
    rungs: tuple[float, ...] = (),
    keep: float = 0.3,
    order: str = "as drawn",
    strategy: str = "cmaes",
) -> list[tuple[int, float]]:
    """Return, after each candidate, the rows spent and the best fitness on all rows."""
    seeds = seed_genomes(rows.names, 1, BOUNDS, LAMBDAS)
    asked = build_strategy(
        strategy, genes=len(rows.names), bounds=BOUNDS, seeds=seeds, seed=seed, population=6, sigma=0.15
    )
    race = Race(rungs, keep)
    core = LookAhead(asked, budget=100, lookahead=4, race=race if rungs else None)
    orders = {name: rows.order(name, order) for name in rows.names}
    spent, best = 0, -np.inf
    trace = []
    while not core.finished:
        proposal = core.next()
        assert proposal is not None
        logprobs = rows.of(proposal.genome)
        record: dict[str, Any] = {"rungs": [], "stopped": False}
        ends = race.ends(len(next(iter(orders.values()))))
        before = 0
        for end, hurdle in zip(ends, [*core.hurdles(proposal.index), None], strict=True):
            score = fitness({name: rows.retention(name, logprobs[name], orders[name][:end]) for name in rows.names})
            spent, before = spent + len(rows.names) * (end - before), end
            record["fitness"] = score
            if end == ends[-1]:
                best = max(best, score)
                break
            record["rungs"].append(score)
            if hurdle is not None and score < hurdle.least:
                record |= {"stopped": True, "fitness": score + hurdle.offset}
                break
        core.done(proposal.index, record)
        trace.append((spent, best))
    return trace


def simulate(asked: argparse.Namespace) -> None:
    """Compare races."""
    rows = Rows(asked.rows)
    plain = [search(rows, seed) for seed in range(asked.seeds)]
    seeds = len(seed_genomes(rows.names, 1, BOUNDS, LAMBDAS))
    start = plain[0][seeds - 1][1]
    gain = np.mean([trace[-1][1] for trace in plain]) - start
    targets = [start + share * gain for share in SHARES]
    needed = [np.median([_reached(trace, target) for trace in plain]) for target in targets]
    print("| race | rows | fitness | " + " | ".join(f"rows to {share:.0%}" for share in SHARES) + " |")
    print("|---|---:|---:|" + "---:|" * len(SHARES))
    for name, settings in RACES.items():
        found = [search(rows, seed, **settings) for seed in range(asked.seeds)]
        spent, best = (np.mean([trace[-1][kind] for trace in found]) for kind in (0, 1))
        ratios = [
            np.median([_reached(trace, target) for trace in found]) / base
            for target, base in zip(targets, needed, strict=True)
        ]
        print(f"| {name} | {spent:,.0f} | {best:.4f} | " + " | ".join(f"{ratio:.2f}" for ratio in ratios) + " |")


def _reached(trace: list[tuple[int, float]], target: float) -> float:
    return next((spent for spent, best in trace if best >= target), np.inf)


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("measure", "simulate"))
    parser.add_argument("--data", help="directory in SentiEval's layout")
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--variant", default="plain", help="kind of experts, as in experts.py")
    parser.add_argument("--keep", type=Path, help="folder of trained adapters")
    parser.add_argument("--seeds", type=int, default=16)
    asked = parser.parse_args()
    {"measure": measure, "simulate": simulate}[asked.what](asked)


if __name__ == "__main__":
    main()
