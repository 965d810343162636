"""Greedy decoding of batches: on a CPU, rows that have ended are dropped; on a GPU, steps are recorded and replayed."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from memmcl.backbone.forward import Backbone, Prepared, repeated

if TYPE_CHECKING:
    from transformers.cache_utils import DynamicCache

ROUND_ROWS = 8  # a batch that loses ended rows shrinks to a multiple of this many rows
CHECK_EVERY = 8  # steps between two checks whether all rows have ended: each check waits for the GPU


def greedy(backbone: Backbone, prepared: Prepared, *, end: int, max_new_tokens: int) -> list[list[int]]:
    """Decode rows without continuations until `end` or `max_new_tokens`; returns their ids without the end token."""
    backbone.trunk(prepared, keep_cache=True)
    prefix = backbone.prefix_cache(prepared)
    decode = in_place if backbone.device.type == "cuda" else dropping
    answers: list[list[int]] = [[]] * prepared.rows
    for index, order in enumerate(prepared.order):
        decoded = decode(backbone, prepared, index, prefix, end=end, max_new_tokens=max_new_tokens)
        for row, ids in zip(order, decoded, strict=True):
            answers[row] = ids
    return answers


@torch.no_grad()
def dropping(
    backbone: Backbone, prepared: Prepared, index: int, prefix: DynamicCache | None, *, end: int, max_new_tokens: int
) -> list[list[int]]:
    """Decode a batch after `trunk(keep_cache=True)`; rows that have ended leave it, as each takes time on a CPU."""
    batch = prepared.batches[index]
    rows = len(batch.tokens)
    cache = copy.deepcopy(prepared.caches[index])
    if (above := repeated(prefix, rows)) is not None:
        cache.layers += above.layers[len(cache.layers) :]
    hidden = backbone.run_top(prepared.hidden[index], batch.positions, batch.mask, cache)
    token = backbone.logits(_last(hidden, batch.lengths)).argmax(-1)
    mask = _prompt_mask(batch.tokens.shape[1], batch.lengths, batch.prefix)
    positions = batch.prefix + batch.lengths
    answers: list[list[int]] = [[] for _ in range(rows)]
    owners = list(range(rows))  # of the rows that are still run
    live = torch.ones(rows, dtype=torch.bool, device=backbone.device)
    for step in range(max_new_tokens):
        live &= token != end
        for at in live.nonzero().flatten().tolist():
            answers[owners[at]].append(int(token[at]))
        if not live.any() or step == max_new_tokens - 1:
            break
        chosen = _fewer(live)
        if len(chosen) < len(live):
            cache.batch_select_indices(chosen)
            owners = [owners[at] for at in chosen.tolist()]
            live, token, mask, positions = (tensor[chosen] for tensor in (live, token, mask, positions))
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        token = _next(backbone, token, positions + step, mask, cache)
    return answers


@torch.no_grad()
def in_place(
    backbone: Backbone, prepared: Prepared, index: int, prefix: DynamicCache | None, *, end: int, max_new_tokens: int
) -> list[list[int]]:
    """Decode a batch after `trunk(keep_cache=True)`, all rows to the end, in fixed buffers: always the same kernels."""
    key = (index, max_new_tokens)
    if key not in prepared.decodings:
        prepared.decodings[key] = _InPlace(backbone, prepared, index, max_new_tokens)
    decoding: _InPlace = prepared.decodings[key]
    run = prepared.recordings.run
    run(("prompt", *key), lambda: decoding.prompt(prefix))
    for step in range(1, max_new_tokens):
        if step % CHECK_EVERY == 0 and (decoding.answers[:, :step] == end).any(1).all():
            break
        run(("step", *key), decoding.step)
    answers = decoding.answers.tolist()
    return [ids[: ids.index(end)] if end in ids else ids for ids in answers]


class _InPlace:
    """The buffers of one batch that is decoded in place.

    answers: (rows, max_new_tokens) int64; seen: (rows, columns) bool, the attention mask; cache: keys and values of
    prefix, prompt and answer, filled at once for the trunk's layers up to the answer.
    """

    def __init__(self, backbone: Backbone, prepared: Prepared, index: int, max_new_tokens: int) -> None:
        from transformers.cache_utils import Cache, StaticLayer

        self._backbone, self._batch, self._hidden = backbone, prepared.batches[index], prepared.hidden[index]
        rows, length = self._batch.tokens.shape
        self._start = self._batch.prefix + length
        columns = self._start + max_new_tokens
        self._cache = Cache(layers=[StaticLayer(max_cache_len=columns) for _ in range(backbone.layers)])
        for layer, trunk in zip(self._cache.layers, prepared.caches[index].layers, strict=False):
            layer.lazy_initialization(trunk.keys, trunk.values)
            layer.keys[:, :, : self._start] = trunk.keys
            layer.values[:, :, : self._start] = trunk.values
        prompt = _prompt_mask(length, self._batch.lengths, self._batch.prefix)
        self._prompt_seen = nn.functional.pad(prompt, (0, max_new_tokens))
        self._mask = nn.functional.pad(self._batch.mask, (0, max_new_tokens))
        self._seen = self._prompt_seen.clone()
        self._positions = self._batch.prefix + self._batch.lengths
        self._done, self._token = (self._positions.new_zeros(count) for count in (1, rows))
        self.answers = self._positions.new_zeros(rows, max_new_tokens)

    def prompt(self, prefix: DynamicCache | None) -> None:
        """Run the prompts under the present weights, and take the first token."""
        for number, layer in enumerate(self._cache.layers):
            if layer.is_initialized:  # masked places must be finite too, and the last candidate may have left NaN
                layer.keys[:, :, self._start :] = 0.0
                layer.values[:, :, self._start :] = 0.0
            if number < self._backbone.split:
                continue
            if prefix is not None:
                keys, values = prefix.layers[number].keys, prefix.layers[number].values
                if not layer.is_initialized:
                    shape = (len(self._token), -1, -1, -1)
                    layer.lazy_initialization(keys.expand(shape), values.expand(shape))
                layer.keys[:, :, : self._batch.prefix] = keys
                layer.values[:, :, : self._batch.prefix] = values
            if layer.is_initialized:
                layer.cumulative_length.fill_(self._batch.prefix)
        hidden = self._backbone.run_top(self._hidden, self._batch.positions, self._mask, self._cache)
        for layer in self._cache.layers:
            layer.cumulative_length.fill_(self._start)
        self._seen.copy_(self._prompt_seen)
        self._done.zero_()
        self._take(self._backbone.logits(_last(hidden, self._batch.lengths)).argmax(-1))

    def step(self) -> None:
        """Run the last token, and take the next."""
        self._seen.index_fill_(1, self._start + self._done - 1, True)
        positions = self._positions + self._done - 1
        self._take(_next(self._backbone, self._token, positions, self._seen, self._cache))

    def _take(self, token: Tensor) -> None:
        self._token.copy_(token)
        self.answers.index_copy_(1, self._done, token[:, None])
        self._done += 1


def _next(backbone: Backbone, token: Tensor, positions: Tensor, mask: Tensor, cache: Any) -> Tensor:
    """Run one token of each row, (rows,), and return the most probable next ones."""
    out = backbone.decoder(
        input_ids=token[:, None],
        position_ids=positions[:, None],
        attention_mask=mask[:, None, None, :],
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state
    return backbone.logits(out[:, -1]).argmax(-1)


def _last(hidden: Tensor, lengths: Tensor) -> Tensor:
    """Return the outputs at the last token of each prompt, (rows, d)."""
    return hidden[torch.arange(len(hidden), device=hidden.device), lengths - 1]


def _prompt_mask(length: int, lengths: Tensor, prefix: int) -> Tensor:
    """Return (rows, prefix + length) bool: where prefix and prompt are, and no padding."""
    keys = torch.arange(length, device=lengths.device)[None] < lengths[:, None]
    return nn.functional.pad(keys, (prefix, 0), value=True)


def _fewer(live: Tensor) -> Tensor:
    """Return the indices of rows to go on with: the live ones, and ended ones up to a multiple of `ROUND_ROWS`.

    live: (rows,) bool; returns int64, ascending. Each new size costs a kernel of its own, as in `batches.ROUND`.
    """
    alive = int(live.sum())
    return live.argsort(descending=True, stable=True)[: alive + -alive % ROUND_ROWS].sort().values
