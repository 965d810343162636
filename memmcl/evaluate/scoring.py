"""A probe: the rows of one subtask in one context, ready to be scored under any weights of one backbone.

Labels are scored whole, end token included, from one pass over the prompt; tuple answers are generated greedily, or
scored by the log-likelihood of their gold answer. What does not depend on the adapted weights (token ids, batches,
the trunk's activations) is computed once and kept, so that the next candidate costs only the layers above the trunk.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from memmcl.backbone.batches import TokenizedRow
from memmcl.backbone.decode import greedy
from memmcl.backbone.forward import Backbone, Prepared
from memmcl.errors import DataError
from memmcl.suite.examples import Example
from memmcl.suite.prompts import Demonstration, Prompter, shared_prefix
from memmcl.suite.subtasks import Subtask


class Probe:
    """Rows of one subtask behind the same demonstrations.

    batch_size: rows run at once; max_new_tokens: where a generated tuple answer is cut off.
    """

    def __init__(
        self,
        backbone: Backbone,
        prompter: Prompter,
        subtask: Subtask,
        examples: Sequence[Example],
        *,
        demonstrations: Sequence[Demonstration] = (),
        batch_size: int = 16,
        max_new_tokens: int = 64,
    ) -> None:
        self.subtask = subtask
        self._backbone = backbone
        self._prompter = prompter
        self._batch_size = batch_size
        self._max_new_tokens = max_new_tokens
        self._prompts = [prompter.prompt(subtask, example, demonstrations) for example in examples]
        self._golds = [prompter.answer(example.answer, subtask) for example in examples]
        self._gold_labels = [example.gold for example in examples]
        self._scored: Prepared | None = None
        self._generated: Prepared | None = None
        self.prefix_tokens = shared_prefix(self._prompts)

    def label_scores(self) -> np.ndarray:
        """Return (rows, labels) float64: the log-probability of each whole label with its end token."""
        sums, labels = self._sums(), range(len(self.subtask.labels))
        return np.array([[sums[row, label] for label in labels] for row in range(len(self._prompts))])

    def gold_logprob(self) -> float:
        """Return the mean log-probability per token of the gold answers, end tokens included."""
        sums, labels = self._sums(), self.subtask.labels
        golds = [0 if self.subtask.is_tuple else labels.index(str(gold)) for gold in self._gold_labels]
        return float(sum(sums[row, gold] for row, gold in enumerate(golds)) / sum(map(len, self._golds)))

    def answer_logprobs(self, answers: Sequence[str]) -> np.ndarray:
        """Return (rows,) float64: the mean log-probability per token of one answer a row, end token included."""
        ids = [self._prompter.answer(answer) for answer in answers]
        sums = continuation_sums(self._backbone, self._prepared([(answer,) for answer in ids]))
        return np.array([sums[row, 0] / len(answer) for row, answer in enumerate(ids)])

    def answers(self, offsets: np.ndarray | None = None) -> list[str]:
        """Return each row's answer: the best label (scores minus `offsets`, if given), or the generated text."""
        if self.subtask.is_tuple:
            return self._generate()
        return self.best_labels(self.label_scores(), offsets)

    def best_labels(self, scores: np.ndarray, offsets: np.ndarray | None = None) -> list[str]:
        """Return each row's best label by `scores` (rows, labels), less `offsets` (labels,) if given.

        Raises:
            DataError: scores that are no numbers.
        """
        if np.isnan(scores).any():
            raise DataError(f"label scores of {self.subtask.name} are no numbers; look whether the model's weights are")
        best = (scores if offsets is None else scores - offsets).argmax(axis=1)
        return [self.subtask.labels[index] for index in best]

    def _prepared(self, continuations: Sequence[tuple[tuple[int, ...], ...]]) -> Prepared:
        """Return the prompts as batches, with the continuations of each."""
        rows = [TokenizedRow(prompt, ids) for prompt, ids in zip(self._prompts, continuations, strict=True)]
        return self._backbone.prepare(rows, batch_size=self._batch_size, prefix=self.prefix_tokens)

    def _sums(self) -> dict[tuple[int, int], float]:
        """Return the summed log-probability of every continuation, by (row, continuation)."""
        if self._scored is None:
            labels = tuple(self._prompter.answer(label) for label in self.subtask.labels)
            self._scored = self._prepared([(gold,) if self.subtask.is_tuple else labels for gold in self._golds])
        return continuation_sums(self._backbone, self._scored)

    def _generate(self) -> list[str]:
        if self._generated is None:
            self._generated = self._prepared([()] * len(self._prompts))
        (end,) = self._prompter.answer("")[-1:]
        decoded = greedy(self._backbone, self._generated, end=end, max_new_tokens=self._max_new_tokens)
        return [self._prompter.decode(ids) for ids in decoded]


@torch.no_grad()
def continuation_sums(backbone: Backbone, prepared: Prepared) -> dict[tuple[int, int], float]:
    """Return the summed log-probability (natural log) of each continuation, by (row, continuation)."""
    backbone.trunk(prepared)
    prefix = backbone.prefix_cache(prepared)
    sums: dict[tuple[int, int], float] = {}
    for index, order in enumerate(prepared.order):
        batch = prepared.batches[index]
        logits = backbone.logits(backbone.outputs(prepared, index, prefix))
        logprobs = logits.log_softmax(-1)[batch.picks, batch.targets].double().cpu()
        for (row, continuation), value in zip(batch.owners.tolist(), logprobs.tolist(), strict=True):
            key = (order[row], continuation)
            sums[key] = sums.get(key, 0.0) + value
    return sums
