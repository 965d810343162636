"""Which fitness foretells the metric: label scores of many merges on weak rows and on held-out training rows.

    python benchmarks/foretell.py measure --data DIR --rows scores.npz [--variant plain] [--subtasks sent2 asc emotion]
    python benchmarks/foretell.py tell --rows scores.npz [--draws 20] [--weak-rows 24 48 96]

measure: the log-probability of every label, on every row, under merges of real experts (half an hour on one core for
three subtasks). No row is a test row: weak and held-out rows are both drawn from the training part, disjoint from
those of the experts. tell: each label score becomes a cubic function of the coefficients (ridge regression, see
racing.py), weak sets of several sizes are drawn, and each kind of fitness is maximised on them, over a dense grid of
genomes, and over the single lambdas alone. Told of each: the mean metric of its winner on the held-out rows, less that
of the single lambda that the same rows choose by likelihood, with the standard error over weak sets.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt
from racing import BOUNDS, cubic, ridge

from memmcl.evolve.fitness import CLIP
from memmcl.suite.subtasks import SUBTASKS

Reals = npt.NDArray[np.float64]
KNOWN = [name for name, subtask in SUBTASKS.items() if subtask.metric in ("accuracy", "macro_f1")]


def measure(asked: argparse.Namespace) -> None:
    """Put merges to rows."""
    from experts import Trial, parse
    from lab import Lab

    names = sorted(asked.subtasks)
    with tempfile.TemporaryDirectory() as folder:
        keep = asked.keep or Path(folder)
        lab = Lab(asked.data, names, keep, train_rows=400, weak_rows=asked.pool, test_rows=8)
        warm, experts = Trial(lab, asked.seed, 80, 8).experts(parse(asked.variant))
    draw = np.random.default_rng(0)
    count = len(names)
    spread = draw.uniform(*BOUNDS, (asked.merges // 2, count))
    near = np.clip(draw.normal(0.6, 0.3, (asked.merges - len(spread), count)), *BOUNDS)
    lambdas = np.repeat(np.arange(0.0, 1.51, 0.1)[:, None], count, 1)
    genomes = np.concatenate([spread, near, lambdas, np.eye(count)])
    found: dict[str, list[np.ndarray]] = {name: [] for name in names}
    golds = {}
    for name in names:
        labels = lab.subtasks[name].labels
        golds[f"gold {name}"] = np.array([labels.index(str(row.gold)) for row in lab.parts[name]["weak"]])
        golds[f"tokens {name}"] = np.array([len(lab.prompter.answer(label)) for label in labels])
    started = time.perf_counter()
    with lab.merger(experts, warm) as (merger, pinned):
        for number, genome in enumerate(genomes):
            merger.apply({name: (float(value),) for name, value in zip(names, genome, strict=True)} | pinned)
            for name in names:
                found[name].append(lab.probe(name, "weak").label_scores())
            if number % 10 == 0:
                print(f"{number} of {len(genomes)}, {time.perf_counter() - started:.0f} s", flush=True)
    np.savez(asked.rows, genomes=genomes, names=names, **{n: np.array(v) for n, v in found.items()}, **golds)


class Scores:
    """The score of every label, on every row, as a function of the genome; on a dense grid of genomes.

    scores: by subtask (genomes, rows, labels); expert: (rows, labels), those of its own expert.
    """

    def __init__(self, path: Path, step: float) -> None:
        data = np.load(path)
        self.names = [str(name) for name in data["names"]]
        genomes, count = data["genomes"], len(self.names)
        ticks = np.arange(BOUNDS[0], BOUNDS[1] + 1e-9, step)
        self.grid = np.stack(np.meshgrid(*[ticks] * count, indexing="ij"), -1).reshape(-1, count)
        self.lambdas = np.flatnonzero((self.grid == self.grid[:, :1]).all(1))
        self.gold = {name: data[f"gold {name}"] for name in self.names}
        self.tokens = {name: data[f"tokens {name}"] for name in self.names}
        features, dense, held = cubic(genomes), cubic(self.grid), np.arange(len(genomes)) % 5 == 0
        self.scores, self.expert = {}, {}
        for place, name in enumerate(self.names):
            known = data[name]
            flat = known.reshape(len(known), -1)
            told = (features[held] @ ridge(features[~held], flat[~held])).reshape(-1, *known.shape[1:])
            same = (told.argmax(-1) == known[held].argmax(-1)).mean()
            both = [logloss(one, self.gold[name]).mean(-1) for one in (told, known[held])]
            print(f"{name}: of held-out merges {same:.3f} of the labels, loss correlates {np.corrcoef(both)[0, 1]:.3f}")
            self.scores[name] = (dense @ ridge(features, flat)).reshape(-1, *known.shape[1:]).astype(np.float32)
            self.expert[name] = known[len(genomes) - count + place]


def logloss(scores: Reals, gold: npt.NDArray[np.int64]) -> Reals:
    """Return the negative log of the gold label's share among all labels, (..., rows)."""
    top = scores - scores.max(-1, keepdims=True)
    shares = top - np.log(np.exp(top).sum(-1, keepdims=True))
    return -np.take_along_axis(shares, np.broadcast_to(gold[:, None], (*shares.shape[:-1], 1)), -1)[..., 0]


def metric(name: str, scores: Reals, gold: npt.NDArray[np.int64]) -> Reals:
    """Return accuracy, or macro-F1 where that is the subtask's metric, (...,)."""
    best = scores.argmax(-1)
    if SUBTASKS[name].metric == "accuracy":
        return (best == gold).mean(-1)
    found = []
    for label in range(scores.shape[-1]):
        both, either = ((best == label) & (gold == label)).sum(-1), (best == label).sum(-1) + (gold == label).sum()
        found.append(2 * both / (either + 1e-7))
    return np.mean(found, axis=0)


def fitnesses(data: Scores, name: str, rows: npt.NDArray[np.int64]) -> dict[str, Reals]:
    """Return every kind of fitness of every genome on some rows of a subtask, (genomes,)."""
    scores, expert, gold = data.scores[name][:, rows], data.expert[name][rows], data.gold[name][rows]
    tokens = data.tokens[name][gold].sum()
    centred, own = scores - np.median(scores, 1, keepdims=True), expert - np.median(expert, 0)
    likelihood = np.take_along_axis(scores, np.broadcast_to(gold[None, :, None], (len(scores), len(rows), 1)), 2)
    known = np.take_along_axis(expert, gold[:, None], 1).sum()

    def kept(loss: Reals, reference: float) -> Reals:
        return np.minimum(np.exp(reference - loss), CLIP)

    p, q = (np.exp(one - one.max(-1, keepdims=True)) for one in (centred, own))
    p, q = p / p.sum(-1, keepdims=True), np.broadcast_to(q / q.sum(-1, keepdims=True), p.shape)
    middle = (p + q) / 2
    js = sum((one * np.log2(np.maximum(one, 1e-12) / middle)).sum(-1) for one in (p, q)) / 2
    return {
        "likelihood": np.minimum(np.exp((likelihood.sum((1, 2)) - known) / tokens), CLIP),
        "choice": kept(logloss(scores, gold).mean(-1), logloss(expert, gold).mean()),
        "choice, calibrated": kept(logloss(centred, gold).mean(-1), logloss(own, gold).mean()),
        "metric": np.minimum(metric(name, centred, gold) / max(metric(name, own, gold), 0.05), CLIP),
        "agree, labels calibrated": 1 - js.mean(-1),
    }


def tell(asked: argparse.Namespace) -> None:
    """Compare kinds of fitness."""
    data = Scores(asked.rows, asked.step)
    draw = np.random.default_rng(1)
    print("| weak rows | fitness | over | metric of the winner | less lambda by likelihood | genes |")
    print("|---:|---|---|---:|---:|---|")
    for count in asked.weak_rows:
        found: dict[tuple[str, str], list[tuple[float, Reals]]] = {}
        for _ in range(asked.draws):
            order = {name: draw.permutation(len(data.gold[name])) for name in data.names}
            parts = [fitnesses(data, name, order[name][:count]) for name in data.names]
            kinds = {kind: np.mean([part[kind] for part in parts], axis=0) for kind in parts[0]}
            kinds["metric and choice"] = kinds["metric"] + kinds["choice, calibrated"]
            kinds["metric and likelihood"] = kinds["metric"] + kinds["likelihood"]
            for ridge_of in (0.1, 0.3):
                kinds[f"likelihood, spread {ridge_of}"] = kinds["likelihood"] - ridge_of * data.grid.var(1)
            held = {}
            truth = np.mean([_held(data, name, order[name], count) for name in data.names], axis=0)
            kinds["held-out rows themselves"] = truth
            for kind, values in kinds.items():
                held[kind, "all"] = int(values.argmax())
                held[kind, "lambda"] = int(data.lambdas[values[data.lambdas].argmax()])
            for key, place in held.items():
                found.setdefault(key, []).append((float(truth[place]), data.grid[place]))
        start = np.array([value for value, _ in found["likelihood", "lambda"]])
        for (kind, over), values in found.items():
            scores = np.array([value for value, _ in values])
            gap = scores - start
            error = gap.std(ddof=1) / len(gap) ** 0.5
            genes = ", ".join(f"{one:.2f}" for one in np.mean([genes for _, genes in values], axis=0))
            print(f"| {count} | {kind} | {over} | {scores.mean():.3f} | {gap.mean():+.3f} ± {error:.3f} | {genes} |")


def _held(data: Scores, name: str, order: npt.NDArray[np.int64], count: int) -> Reals:
    """Return the metric of every genome on the rows that are not weak, label scores less their weak median."""
    scores = data.scores[name]
    centred = scores[:, order[count:]] - np.median(scores[:, order[:count]], 1, keepdims=True)
    return metric(name, centred, data.gold[name][order[count:]])


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("measure", "tell"))
    parser.add_argument("--data", help="directory in SentiEval's layout")
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--variant", default="plain", help="kind of experts, as in experts.py")
    parser.add_argument("--subtasks", nargs="+", choices=KNOWN, default=["sent2", "asc", "emotion"])
    parser.add_argument("--keep", type=Path, help="folder of trained adapters")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pool", type=int, default=300, help="weak and held-out rows, together")
    parser.add_argument("--merges", type=int, default=60)
    parser.add_argument("--weak-rows", type=int, nargs="+", default=[24, 48, 96])
    parser.add_argument("--draws", type=int, default=20)
    parser.add_argument("--step", type=float, default=0.1, help="of the grid of genomes")
    asked = parser.parse_args()
    {"measure": measure, "tell": tell}[asked.what](asked)


if __name__ == "__main__":
    main()
