"""Teacher-forced answers: one fixed answer per row, scored under any weights, segment by segment.

A race scores the first rows of every subtask, stops a candidate that is clearly worse there, and goes on otherwise. So
the rows are cut into segments. The rows of a segment are packed into one sequence, or a few, without padding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from memmcl.backbone.batches import Batch, TokenizedRow, pack
from memmcl.backbone.forward import Backbone
from memmcl.backbone.recording import Recordings
from memmcl.errors import SearchError
from memmcl.evaluate.choice import Branches, Choices
from memmcl.suite.examples import Example
from memmcl.suite.metrics import Floats
from memmcl.suite.prompts import Prompter, shared_prefix
from memmcl.suite.subtasks import Subtask

PACK = 2048
"""Tokens that are run at once, unless one row has more."""
TOP = 128
"""Tokens whose probabilities are kept of a distribution; the rest counts as one more outcome."""


@dataclass(frozen=True)
class Distributions:
    """A model's next-token distributions at every token of the answers, row by row.

    ids: (tokens, k) int64, the k most probable tokens; logprobs: (tokens, k) float32, their natural logs.
    """

    ids: Tensor
    logprobs: Tensor


@dataclass(frozen=True)
class SegmentValues:
    """Values of the rows of one segment.

    logprobs: (rows,) float64, summed over each answer's tokens, end token included; tokens: (rows,) how many those are;
    agreement: (rows,) float64 in [0, 1], the mean over the tokens of 1 - Jensen-Shannon divergence (base 2) to the
    expert's distributions; None without these. choices: of the labels' shares of probability; None where answers are no
    labels.
    """

    logprobs: Floats
    tokens: npt.NDArray[np.int64]
    agreement: Floats | None = None
    choices: Choices | None = None


@dataclass(frozen=True)
class _Pack:
    """Rows in one sequence, and the trunk's activations of it."""

    rows: range
    batch: Batch
    hidden: Tensor
    branches: Branches | None


class TeacherForced:
    """Rows of one subtask, each with one fixed answer, packed without padding behind the prefix that all prompts share.

    answers: one a row; ends: after how many rows each segment ends, rising; the last is all rows. expert: the
    expert's distributions at the answers' tokens.

    Raises:
        SearchError: answers, ends or distributions that do not fit the rows.
    """

    def __init__(
        self,
        backbone: Backbone,
        prompter: Prompter,
        subtask: Subtask,
        examples: Sequence[Example],
        answers: Sequence[str],
        *,
        ends: Sequence[int] | None = None,
        expert: Distributions | None = None,
    ) -> None:
        count = len(examples)
        ends = [count] if ends is None else ends
        if len(answers) != count:
            raise SearchError(f"expected an answer for each of {count} rows, got {len(answers)}")
        if not count or list(ends) != sorted({*ends}) or ends[0] < 1 or ends[-1] != count:
            raise SearchError(f"segments of {count} rows must end at rising counts, the last at all rows; got {ends}")
        self._backbone = backbone
        prompts = [prompter.prompt(subtask, example) for example in examples]
        ids = [prompter.answer(answer, subtask) for answer in answers]
        self.tokens = np.array([len(one) for one in ids])
        self._rows = [TokenizedRow(prompt, (answer,)) for prompt, answer in zip(prompts, ids, strict=True)]
        self._labels = [prompter.answer(label, subtask) for label in subtask.labels]
        self._prefix = shared_prefix(prompts)
        self._segments = [range(first, end) for first, end in pairwise([0, *ends])]
        self._packs: dict[int, list[_Pack]] = {}
        self._starts = np.concatenate([[0], np.cumsum(self.tokens)])
        if expert is not None and len(expert.ids) != self._starts[-1]:
            raise SearchError(
                f"the expert's distributions are for {len(expert.ids)} tokens, the answers have {self._starts[-1]}; "
                "they belong to other rows or answers"
            )
        self._expert = expert
        self._recordings = Recordings(backbone)

    @torch.no_grad()
    def segments(self) -> Iterator[SegmentValues]:
        """Yield the values of each segment under the current weights, which must not change until the last is taken."""
        for number, rows in enumerate(self._segments):
            sums, agreed = np.zeros(len(rows)), np.zeros(len(rows))
            choices = []
            for one in self._packed(number):
                logprobs = self._logprobs(one)
                of_targets = logprobs.gather(1, one.batch.targets[:, None])[:, 0].double().cpu().numpy()
                places = one.rows.start - rows.start + one.batch.owners[:, 0].numpy()
                np.add.at(sums, places, of_targets)
                choices += [one.branches.of(logprobs)] if one.branches else []
                if self._expert is not None:
                    np.add.at(agreed, places, self._agreement(self._expert, logprobs, one.rows))
            tokens = self.tokens[rows.start : rows.stop]
            yield SegmentValues(
                sums,
                tokens,
                agreed / tokens if self._expert is not None else None,
                Choices.joined(choices) if choices else None,
            )

    @torch.no_grad()
    def distributions(self, top: int = TOP) -> Distributions:
        """Return the current weights' next-token distributions at every token of the answers."""
        width = min(top, self._backbone.output_weight.shape[0])
        ids = torch.zeros(int(self._starts[-1]), width, dtype=torch.long)
        kept = torch.zeros(int(self._starts[-1]), width)
        for number in range(len(self._segments)):
            for one in self._packed(number):
                best = self._logprobs(one).topk(width, dim=1)
                at = self._tokens_of(one.rows)
                ids[at], kept[at] = best.indices.cpu(), best.values.cpu()
        return Distributions(ids, kept)

    def _packed(self, number: int) -> list[_Pack]:
        """Return a segment's rows in packs, with the trunk's activations; computed when it is first asked for."""
        if number not in self._packs:
            self._packs[number] = [self._pack(rows) for rows in self._chunks(self._segments[number])]
        return self._packs[number]

    def _chunks(self, rows: range) -> Iterator[range]:
        first, used = rows.start, self._prefix
        for row in rows:
            length = len(self._rows[row]) - self._prefix
            if row > first and used + length > PACK:
                yield range(first, row)
                first, used = row, self._prefix
            used += length
        yield range(first, rows.stop)

    def _pack(self, rows: range) -> _Pack:
        backbone = self._backbone
        batch = pack([self._rows[row] for row in rows], [self._prefix] * len(rows), backbone.pad, backbone.device)
        answers = [self._rows[row].continuations[0] for row in rows]
        branches = Branches(self._labels, answers) if self._labels else None
        return _Pack(rows, batch, backbone.trunk_of(batch), branches)

    def _logprobs(self, one: _Pack) -> Tensor:
        """Return log-probabilities at every token of a pack's answers, (tokens, vocabulary) float32."""
        outputs = self._recordings.run(one.rows, partial(self._backbone.top, one.hidden, one.batch))
        return self._backbone.logits(outputs).log_softmax(-1)

    def _tokens_of(self, rows: range) -> slice:
        """Return where the tokens of these rows lie in distributions."""
        return slice(int(self._starts[rows.start]), int(self._starts[rows.stop]))

    def _agreement(self, expert: Distributions, logprobs: Tensor, rows: range) -> Floats:
        at = self._tokens_of(rows)
        candidate = logprobs.gather(1, expert.ids[at].to(logprobs.device)).double().cpu()
        return 1.0 - js_divergence(expert.logprobs[at].double(), candidate).numpy()


def js_divergence(first: Tensor, second: Tensor) -> Tensor:
    """Return the Jensen-Shannon divergence in bits, (n,) in [0, 1], of distributions known at the same k outcomes.

    first, second: (n, k) natural logs of probabilities; what they leave of 1 is one more outcome. Merging outcomes can
    only lower the divergence, so this is a lower bound of that between the whole distributions.

    Reference: Lin, Divergence Measures Based on the Shannon Entropy, IEEE Trans. Inf. Theory 37(1), 1991, eq. 4.1.
    """
    p, q = _closed(first), _closed(second)
    m = (p + q) / 2
    bits: Tensor = (_entropy(m) - (_entropy(p) + _entropy(q)) / 2) / math.log(2.0)  # JS = H(m) - (H(p) + H(q)) / 2
    return bits.clamp(0.0, 1.0)


def _closed(logprobs: Tensor) -> Tensor:
    """Return probabilities (n, k + 1) with the rest as the last outcome."""
    known = logprobs.exp()
    rest = (1.0 - known.sum(1, keepdim=True)).clamp_min(0.0)
    whole = torch.cat([known, rest], dim=1)
    return whole / whole.sum(1, keepdim=True)


def _entropy(p: Tensor) -> Tensor:
    entropy: Tensor = -torch.special.xlogy(p, p).sum(1)
    return entropy
