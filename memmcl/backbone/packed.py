"""Attention inside a packed sequence, segment by segment: scores that a dense mask would discard are not computed.

A segment is a shared prefix, the body of a row behind such a prefix, or the padding at the end. A body attends to its
prefix and, causally, to itself; a prefix to itself alone. For bodies of length b behind a prefix of length p that is
sum p^2 + b (p + b) in place of the square of the whole sequence. Products and softmax are written out: on a CPU in
bfloat16, torch's fused attention takes two to three times as long in backward.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor, nn

NAME = "memmcl_packed"


@dataclass(frozen=True)
class Segments:
    """lengths: tokens of each segment, in the sequence's order; parents: the prefix of each, itself for a prefix."""

    lengths: tuple[int, ...]
    parents: tuple[int, ...]

    @classmethod
    def of(cls, segments: Sequence[int], parents: Sequence[int]) -> Segments:
        """Return the segments of a sequence. segments: the segment of each token, ascending; empty ones are dropped."""
        lengths = Counter(segments)
        place = {segment: at for at, segment in enumerate(lengths)}
        return cls(tuple(lengths.values()), tuple(place.get(parents[segment], at) for segment, at in place.items()))


@contextmanager
def packed_attention(config: Any, segments: Segments | None) -> Iterator[None]:
    """Within the block, a model of this transformers configuration attends inside `segments`; None changes nothing.

    A model with another attention than torch's scaled dot product (some cap its scores, say) is left as it is.
    """
    if segments is None or config._attn_implementation != "sdpa":
        yield
        return
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(NAME, _attend)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, sdpa_mask)
    before, _current.segments, _current.biases = config._attn_implementation, segments, {}
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation, _current.segments, _current.biases = before, None, {}


_current: Any = SimpleNamespace(segments=None, biases={})  # of the model that runs now, the same in all its layers


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """Attention as transformers calls it. query: (1, heads, L, d); key, value: (1, kv heads, L, d)."""
    segments: Segments = _current.segments
    group = query.shape[1] // key.shape[1]
    # split, whose backward is one concatenation; a slice's would be a zero-filled sequence each
    queries, keys, values = (torch.split(tensor[0], list(segments.lengths), dim=1) for tensor in (query, key, value))
    outputs = []
    for at, parent in enumerate(segments.parents):
        k, v = keys[at], values[at]
        if parent != at:
            k, v = torch.cat([keys[parent], k], dim=1), torch.cat([values[parent], v], dim=1)
        # heads that share keys lie behind one another, as if they were more queries: (kv heads, group * length, d)
        q = queries[at].reshape(len(k), group * segments.lengths[at], -1)
        scores = torch.baddbmm(_bias(segments.lengths[at], k, group), q, k.mT, alpha=scaling)
        outputs.append((scores.softmax(-1) @ v).view(queries[at].shape))
    return torch.cat(outputs, dim=1).transpose(0, 1)[None], None


def _bias(length: int, keys: Tensor, group: int) -> Tensor:
    """Return (group * length, keys): 0 where a token may attend, -inf at later ones; the last keys are the tokens'."""
    shape = (length, keys.shape[1], group)
    if shape not in _current.biases:
        behind = torch.ones(length, shape[1], dtype=torch.bool, device=keys.device).triu(shape[1] - length + 1)
        bias = torch.zeros(behind.shape, dtype=keys.dtype, device=keys.device).masked_fill(behind, -torch.inf)
        _current.biases[shape] = bias.repeat(group, 1)
    return cast(Tensor, _current.biases[shape])
