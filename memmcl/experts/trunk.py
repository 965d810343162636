"""Rows packed for training, with cached trunk activations, and the outputs of rows under the present weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from memmcl.backbone.activations import Activations
from memmcl.backbone.batches import Batch, TokenizedRow, pack
from memmcl.backbone.forward import Backbone
from memmcl.suite.prompts import shared_prefix

PACKED = 8  # rows that are packed together where outputs are only read


class Trunk:
    """Packs rows of groups, one group a subtask: the prefix that a group's rows share stands once in a pack."""

    def __init__(self, backbone: Backbone, activations: Activations, groups: Iterable[Sequence[TokenizedRow]]) -> None:
        self._backbone = backbone
        self._activations = activations
        self._prefix: dict[TokenizedRow, int] = {}
        for group in groups:
            self._prefix |= dict.fromkeys(group, shared_prefix([row.prompt for row in group]))

    def packed(self, rows: Sequence[TokenizedRow]) -> tuple[Tensor, Batch]:
        """Return the activations (1, length, d) and the batch of `rows` packed into one sequence."""
        prefixes = [self._prefix[row] for row in rows]
        batch = pack(rows, prefixes, self._backbone.pad, self._backbone.device)
        pieces: list[Tensor] = []
        seen: set[tuple[int, ...]] = set()
        for row, length in zip(rows, prefixes, strict=True):
            shared = row.prompt[:length]
            if shared not in seen:
                seen.add(shared)
                pieces.append(self._activations.of(shared))
            (answer,) = row.continuations
            pieces.append(self._activations.of((*row.prompt, *answer[:-1]))[length:])
        hidden = torch.cat(pieces)
        padded = nn.functional.pad(hidden, (0, 0, 0, batch.tokens.shape[1] - len(hidden)))
        return padded[None], batch

    @torch.no_grad()
    def outputs(self, groups: Mapping[str, Sequence[TokenizedRow]]) -> dict[TokenizedRow, Tensor]:
        """Return each row's outputs (answer tokens, d) under the present weights, whatever else is in `groups`.

        Groups are packed one by one, so that a group's outputs do not depend on the other groups.
        """
        outputs: dict[TokenizedRow, Tensor] = {}
        for rows in groups.values():
            for start in range(0, len(rows), PACKED):
                chunk = list(dict.fromkeys(rows[start : start + PACKED]))
                hidden, batch = self.packed(chunk)
                lengths = [len(row.continuations[0]) for row in chunk]
                outputs |= zip(chunk, torch.split(self._backbone.top(hidden, batch), lengths), strict=True)
        return outputs
