"""Rows with one given answer each, put to any weights in parts: what the fitness of a candidate is measured on.

A race looks at some rows of every subtask, stops a candidate that is clearly worse there, and goes on otherwise. So the
rows lie in parts; those of a part are one batch or more, and the prompt's shared prefix is run once for all parts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from memmcl.backbone.forward import Backbone, Prepared, Row
from memmcl.errors import SearchError
from memmcl.suite.examples import Example
from memmcl.suite.prompts import Prompter, shared_prefix
from memmcl.suite.subtasks import Subtask

Reals = npt.NDArray[np.float64]
TOP = 128
"""Tokens whose probabilities are kept of a distribution; the rest counts as one more outcome."""


@dataclass(frozen=True)
class Distributions:
    """What a model expects at every token of given answers, row by row in the rows' order.

    ids: (tokens, k) int64, the k most probable tokens; logprobs: (tokens, k) float32, their natural logs.
    """

    ids: Tensor
    logprobs: Tensor


@dataclass(frozen=True)
class PartValues:
    """Values of the rows of one part, in the order that was asked for.

    logprobs: (rows,) float64, summed over each answer's tokens, end token included; tokens: (rows,) how many those are;
    agreement: (rows,) float64 in [0, 1], the mean over the tokens of 1 - Jensen-Shannon divergence (base 2) to the
    distributions that were given; None without such.
    """

    logprobs: Reals
    tokens: npt.NDArray[np.int64]
    agreement: Reals | None = None


class GivenAnswers:
    """Rows of one subtask, each with one answer.

    answers: one a row; order: indices of the rows as they are looked at; ends: after how many of them each part ends,
    rising, the last is all rows. expert: distributions at the answers' tokens, in the rows' own order.

    Raises:
        SearchError: answers, order, ends or distributions that do not fit the rows.
    """

    def __init__(
        self, backbone: Backbone, prompter: Prompter, subtask: Subtask, examples: Sequence[Example],
        answers: Sequence[str], *, order: Sequence[int] | None = None, ends: Sequence[int] | None = None,
        batch_size: int = 16, expert: Distributions | None = None,
    ) -> None:  # fmt: skip
        count = len(examples)
        order = range(count) if order is None else order
        ends = [count] if ends is None else ends
        if len(answers) != count or sorted(order) != list(range(count)):
            raise SearchError(f"expected an answer and a place for each of {count} rows, got {len(answers)}, {order}")
        if not count or list(ends) != sorted({*ends}) or ends[0] < 1 or ends[-1] != count:
            raise SearchError(f"parts of {count} rows must end at rising numbers of rows, the last at all; got {ends}")
        self._backbone = backbone
        prompts = [prompter.prompt(subtask, example) for example in examples]
        ids = [prompter.answer(answer, subtask) for answer in answers]
        self.tokens = np.array([len(one) for one in ids])
        prefix = shared_prefix(prompts)
        self._parts: list[tuple[list[int], Prepared]] = []
        for first, end in pairwise([0, *ends]):
            rows = [order[place] for place in range(first, end)]
            given = [Row(prompts[row], (ids[row],)) for row in rows]
            self._parts.append((rows, backbone.prepare(given, batch_size=batch_size, prefix=prefix)))
        self._starts = np.concatenate([[0], np.cumsum(self.tokens)])
        if expert is not None and len(expert.ids) != self._starts[-1]:
            raise SearchError(
                f"an expert's distributions are for {len(expert.ids)} tokens, the answers have {self._starts[-1]}; "
                "they were made for other rows or answers"
            )
        self._expert = expert

    @torch.no_grad()
    def parts(self) -> Iterator[PartValues]:
        """Yield the values of each part under the weights of now, which must not change until the last is taken."""
        prefix = None
        for number, (rows, prepared) in enumerate(self._parts):
            self._backbone.trunk(prepared)
            prefix = self._backbone.prefix_cache(prepared) if not number else prefix
            sums = np.zeros(len(rows))
            agreed = np.zeros(len(rows))
            for index, order in enumerate(prepared.order):
                logprobs, owners, targets = self._logprobs(prepared, index, prefix)
                found = logprobs.gather(1, targets[:, None])[:, 0].double().cpu().numpy()
                places = np.array(order)[owners]
                np.add.at(sums, places, found)
                if self._expert is not None:
                    np.add.at(agreed, places, self._agreement(self._expert, logprobs, [rows[at] for at in order]))
            tokens = self.tokens[rows]
            yield PartValues(sums, tokens, agreed / tokens if self._expert is not None else None)

    @torch.no_grad()
    def distributions(self, top: int = TOP) -> Distributions:
        """Return what the weights of now expect at every token of the answers, in the rows' own order."""
        width = min(top, self._backbone.output_weight.shape[0])
        ids = torch.zeros(int(self._starts[-1]), width, dtype=torch.long)
        kept = torch.zeros(int(self._starts[-1]), width)
        prefix = None
        for number, (rows, prepared) in enumerate(self._parts):
            self._backbone.trunk(prepared)
            prefix = self._backbone.prefix_cache(prepared) if not number else prefix
            for index, order in enumerate(prepared.order):
                logprobs, _, _ = self._logprobs(prepared, index, prefix)
                best = logprobs.topk(width, dim=1)
                at = self._tokens_of([rows[place] for place in order])
                ids[at], kept[at] = best.indices.cpu(), best.values.cpu()
        return Distributions(ids, kept)

    def _logprobs(self, prepared: Prepared, index: int, prefix: object) -> tuple[Tensor, npt.NDArray[np.int64], Tensor]:
        """Return (tokens, vocabulary) log-probabilities of a batch, the row of each in it, and the tokens (tokens,)."""
        batch = prepared.batches[index]
        outputs = self._backbone.outputs(prepared, index, prefix)
        logprobs = self._backbone.logits(outputs).log_softmax(-1)
        return logprobs[batch.picks], batch.owners[:, 0].numpy(), batch.targets

    def _tokens_of(self, rows: Sequence[int]) -> Tensor:
        """Return where the tokens of these rows lie in distributions, row by row."""
        return torch.cat([torch.arange(int(self._starts[row]), int(self._starts[row + 1])) for row in rows])

    def _agreement(self, expert: Distributions, logprobs: Tensor, rows: Sequence[int]) -> Reals:
        at = self._tokens_of(rows)
        found = logprobs.gather(1, expert.ids[at].to(logprobs.device)).double().cpu()
        return 1.0 - js_divergence(expert.logprobs[at].double(), found).numpy()


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
