"""Rows of token ids as the tensors of a batch: padded side by side, or packed into one sequence.

All continuations of a prompt lie behind it in one row under a tree-shaped mask: each sees the prompt and itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from memmcl.backbone.packed import Segments

ROUND = 32  # lengths are padded to multiples of this, because each new shape costs a kernel, in time and memory


@dataclass(frozen=True)
class TokenizedRow:
    """A prompt and the continuations to score behind it, as token ids. None for generation."""

    prompt: tuple[int, ...]
    continuations: tuple[tuple[int, ...], ...] = ()

    def __len__(self) -> int:
        return len(self.prompt) + sum(len(ids) - 1 for ids in self.continuations)


@dataclass(frozen=True)
class Batch:
    """Right-padded rows. `prefix` counts the tokens of a shared prefix that precede each row.

    tokens, positions: (rows, length) int64; mask: (rows, 1, length, prefix + length) bool, True = may attend;
    queries: (u, 2) int64 of (row, position) whose outputs predict tokens of continuations; picks: (n,) int64, the
    query of each such token (all continuations of a row share its first query); targets: (n,) int64, the tokens;
    owners: (n, 2) int64 of (row, continuation); lengths: (rows,) prompt lengths. segments: of a packed row only.
    """

    tokens: Tensor
    positions: Tensor
    mask: Tensor
    queries: Tensor
    picks: Tensor
    targets: Tensor
    owners: Tensor
    lengths: Tensor
    prefix: int = 0
    segments: Segments | None = None


def collate(rows: Sequence[TokenizedRow], pad: int, prefix: int = 0, device: str | torch.device = "cpu") -> Batch:
    """Return rows, each with its continuations behind it, padded to one length, and their tree-shaped mask."""
    tokens: list[list[int]] = [list(row.prompt) for row in rows]
    positions = [list(range(prefix, prefix + len(row.prompt))) for row in rows]
    segments = [[0] * len(row.prompt) for row in rows]  # 0 the prompt, 1.. continuations, -1 padding
    queries: list[tuple[int, int]] = []
    picks: list[int] = []
    targets: list[int] = []
    owners: list[tuple[int, int]] = []
    for r, row in enumerate(rows):
        start, first = len(row.prompt), len(queries)
        queries += [(r, start - 1)] if row.continuations else []
        for c, ids in enumerate(row.continuations):
            inner, at = len(ids) - 1, len(tokens[r])
            picks += [first, *range(len(queries), len(queries) + inner)]
            queries += [(r, at + j) for j in range(inner)]
            targets += ids
            owners += [(r, c)] * len(ids)
            tokens[r] += ids[:-1]
            positions[r] += range(prefix + start, prefix + start + inner)
            segments[r] += [c + 1] * inner
    segment = _padded(segments, -1)
    same = segment[:, :, None] == segment[:, None, :]
    prompt = (segment[:, None, :] == 0) & (segment[:, :, None] >= 0)
    mask = nn.functional.pad((same | prompt).tril(), (prefix, 0), value=True)[:, None]
    return Batch(
        tokens=_padded(tokens, pad).to(device),
        positions=_padded(positions, 0).to(device),
        mask=mask.to(device),
        queries=torch.tensor(queries, dtype=torch.long, device=device).reshape(-1, 2),
        picks=torch.tensor(picks, dtype=torch.long, device=device),
        targets=torch.tensor(targets, dtype=torch.long, device=device),
        owners=torch.tensor(owners, dtype=torch.long).reshape(-1, 2),
        lengths=torch.tensor([len(row.prompt) for row in rows], device=device),
        prefix=prefix,
    )


def _padded(rows: list[list[int]], value: int) -> Tensor:
    return nn.utils.rnn.pad_sequence(
        [torch.tensor(row, dtype=torch.long) for row in rows], batch_first=True, padding_value=value
    )


def pack(rows: Sequence[TokenizedRow], prefixes: Sequence[int], pad: int, device: str | torch.device = "cpu") -> Batch:
    """Pack all rows into one sequence, each shared prefix once; only its end is padded, to a multiple of `ROUND`.

    Row i has one continuation; its first `prefixes[i]` prompt tokens are a prefix, stored once for all rows with the
    same one. Each row attends to its prefix and itself, as if it were alone. Returns a batch of one long row with the
    queries and targets of all rows in their order; `owners` has the row of each.
    """
    starts: dict[tuple[int, ...], int] = {}
    tokens: list[int] = []
    positions: list[int] = []
    segments: list[int] = []
    parents: list[int] = []  # by segment: the prefix's segment, itself for a prefix
    queries: list[tuple[int, int]] = []
    targets: list[int] = []
    owners: list[tuple[int, int]] = []

    def append(ids: Sequence[int], start: int, parent: int) -> None:
        segments.extend([len(parents)] * len(ids))
        parents.append(parent)
        tokens.extend(ids)
        positions.extend(range(start, start + len(ids)))

    for i, (row, length) in enumerate(zip(rows, prefixes, strict=True)):
        shared = row.prompt[:length]
        if shared not in starts:
            starts[shared] = len(parents)
            append(shared, start=0, parent=len(parents))
        (answer,) = row.continuations
        append((*row.prompt[length:], *answer[:-1]), start=length, parent=starts[shared])
        queries += [(0, len(tokens) - len(answer) + j) for j in range(len(answer))]
        targets += answer
        owners += [(i, 0)] * len(answer)
    used = len(tokens)
    append([pad] * (-used % ROUND), start=0, parent=len(parents))
    segment = torch.tensor(segments)
    parent = torch.tensor(parents)[segment]
    mask = ((segment[:, None] == segment[None]) | (parent[:, None] == segment[None])).tril()
    return Batch(
        tokens=torch.tensor([tokens], device=device),
        positions=torch.tensor([positions], device=device),
        mask=mask[None, None].to(device),
        queries=torch.tensor(queries, device=device),
        picks=torch.arange(len(targets), device=device),
        targets=torch.tensor(targets, device=device),
        owners=torch.tensor(owners),
        lengths=torch.tensor([used], device=device),
        # on a GPU one kernel with a dense mask is faster than many small ones
        segments=Segments.of(segments, parents) if torch.device(device).type == "cpu" else None,
    )
