"""What share of the probability of all labels one label has, from a pass over that label alone.

A model that answers with labels alone chooses among the tokens that labels begin with, then among those that continue
the labels with this beginning, and so on. The logits at the answer's tokens give the probabilities of these choices: no
other label is run. Where no two labels begin with the same token, there is one choice, and the share is that of the
first token.

[ours] The share stands for that of the whole label: what its later tokens lose to tokens of no label is left out. The
first choice is calibrated by each option's median over rows, which are not normalised first as in `calibration.fit`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from memmcl.errors import SearchError
from memmcl.suite.metrics import Floats

Label = tuple[int, ...]


@dataclass(frozen=True)
class Choices:
    """The choices of some rows, each of which has a label as its answer.

    first: (rows, options) float64, the log-probability of each token that labels begin with, among all tokens;
    taken: (rows,) int64, the option that the row's label begins with; rest: (rows,) float64, the summed log-probability
    of the label's further choices, each among its options.
    """

    first: Floats
    taken: npt.NDArray[np.int64]
    rest: Floats

    def logshares(self, calibrated: bool) -> Floats:
        """Return (rows,) float64: the natural log of what each row's label has of the probability of all labels."""
        scores = self.first - np.median(self.first, axis=0) if calibrated else self.first
        whole = np.logaddexp.reduce(scores, axis=1)
        shares: Floats = scores[np.arange(len(scores)), self.taken] - whole + self.rest
        return shares

    def head(self, count: int) -> Choices:
        """Return the choices of the first rows."""
        return Choices(self.first[:count], self.taken[:count], self.rest[:count])

    @classmethod
    def joined(cls, several: Sequence[Choices]) -> Choices:
        """Return the choices of the rows of several, one behind the other."""
        return cls(*(np.concatenate([getattr(one, name) for one in several]) for name in ("first", "taken", "rest")))


class Branches:
    """Where the tokens of labels are choices, and among which tokens.

    labels: the ids of every label, end token included; answers: of each row, one of them, in the order of the tokens.

    Raises:
        SearchError: an answer that is no label.
    """

    def __init__(self, labels: Sequence[Label], answers: Sequence[Label]) -> None:
        unknown = sum(answer not in labels for answer in answers)
        if unknown:
            raise SearchError(f"{unknown} of {len(answers)} answers are none of the subtask's {len(labels)} labels")
        self.options = sorted({label[0] for label in labels})
        self._taken = np.array([self.options.index(answer[0]) for answer in answers])
        lengths = np.array([len(answer) for answer in answers])
        self._firsts = torch.from_numpy(np.cumsum(lengths) - lengths)
        places: list[int] = []
        ids: list[int] = []
        starts: list[int] = []  # of each branch, among ids
        rows: list[int] = []
        targets: list[int] = []
        for row, answer in enumerate(answers):
            for at in range(1, len(answer)):
                allowed = sorted({label[at] for label in labels if label[:at] == answer[:at] and len(label) > at})
                if len(allowed) > 1:
                    starts.append(len(ids))
                    rows.append(row)
                    targets.append(len(ids) + allowed.index(answer[at]))
                    places += [int(self._firsts[row]) + at] * len(allowed)
                    ids += allowed
        self._places, self._ids = torch.tensor(places, dtype=torch.long), torch.tensor(ids, dtype=torch.long)
        self._starts, self._rows, self._targets = np.array(starts, int), np.array(rows, int), np.array(targets, int)

    def of(self, logprobs: Tensor) -> Choices:
        """Return the rows' choices. logprobs: (tokens, vocabulary) float32, at every token of the answers."""
        options = torch.tensor(self.options, device=logprobs.device)
        first = logprobs[self._firsts.to(logprobs.device)][:, options].double().cpu().numpy()
        rest = np.zeros(len(first))
        if len(self._starts):
            among = logprobs[self._places.to(logprobs.device), self._ids.to(logprobs.device)].double().cpu().numpy()
            np.add.at(rest, self._rows, among[self._targets] - np.logaddexp.reduceat(among, self._starts))
        return Choices(first, self._taken, rest)
