"""Forward passes that compute nothing twice: a frozen trunk, adapted layers on top, one prefix, all labels at once.

The layers below the lowest adapted one give the same activations for the base, every expert and every candidate:
`Backbone.trunk` computes them once, `Backbone.top` runs the rest. A prompt prefix that all rows share is run once
and its keys and values are reused. All continuations of a prompt (say, all labels with their end token) lie in one
row (`memmcl.backbone.batches`), so that one pass scores every label exactly as one pass per label would.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from memmcl.backbone.batches import ROUND, Batch, TokenizedRow, collate
from memmcl.backbone.packed import Segments, packed_attention
from memmcl.backbone.recording import Recordings
from memmcl.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.cache_utils import DynamicCache


@dataclass
class Prepared:
    """Rows in fixed batches behind one shared prefix, with the trunk's activations once they were computed.

    `order[i]`: the indices of the original rows in batch i. recordings: the calls that are repeated for each candidate;
    decodings: the buffers of batches that are decoded in place.
    """

    prefix: tuple[int, ...]
    batches: list[Batch]
    order: list[list[int]]
    rows: int
    recordings: Recordings
    prefix_hidden: Tensor | None = None
    prefix_cache: Any = None
    hidden: list[Tensor] = field(default_factory=list)
    caches: list[Any] = field(default_factory=list)
    decodings: dict[tuple[int, int], Any] = field(default_factory=dict)


class _Entry(nn.Module):
    """Replaces the trunk's layers: passes the trunk's output to the first layer above."""

    hidden: Tensor | None = None

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden_states if self.hidden is None else self.hidden


class _AtQueries(nn.Module):
    """Replaces the last layer's MLP: runs it at the queries alone, and adds nothing elsewhere."""

    queries: Tensor | None = None

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp = mlp

    def forward(self, hidden: Tensor) -> Tensor:
        """Return (rows, length, d): the MLP's outputs at the queries, zeros elsewhere."""
        assert self.queries is not None
        at = self.queries.unbind(1)
        chosen = hidden[at]
        count = len(chosen)
        out = self.mlp(nn.functional.pad(chosen, (0, 0, 0, -count % ROUND))[None])[0, :count]
        return torch.zeros_like(hidden).index_put(at, out)


class Backbone:
    """A causal language model split at layer `split`: layers [0, split) are the trunk, the rest is the top.

    Raises:
        ModelError: the model has no `model.layers` list, or `split` is not one of its layers.
    """

    def __init__(self, model: PreTrainedModel, pad: int, split: int) -> None:
        decoder = getattr(model, "model", None)
        layers = getattr(decoder, "layers", None)
        if decoder is None or not isinstance(layers, nn.ModuleList) or not hasattr(decoder, "norm"):
            raise ModelError(
                f"{type(model).__name__} has no `model.layers` and `model.norm`; "
                "memmcl needs a decoder like Llama, Qwen or Mistral"
            )
        if not 0 <= split < len(layers):
            raise ModelError(f"the model has layers 0 to {len(layers) - 1}; it cannot be split at layer {split}")
        self.model = model
        self.split = split
        self.pad = pad
        self.decoder: nn.Module = decoder
        self.device = next(model.parameters()).device
        self.dtype = next(model.parameters()).dtype
        self._entry = _Entry()
        self._recomputing = False
        self.pool = torch.cuda.graph_pool_handle() if self.device.type == "cuda" else None
        self._bottom = _view(decoder, layers=layers[:split], norm=nn.Identity())
        above = [self._entry] * split + list(layers[split:])
        self._above = _view(decoder, layers=nn.ModuleList(above))
        self._last: _AtQueries | None = None
        mlp = getattr(layers[-1], "mlp", None)
        if isinstance(mlp, nn.Module) and hasattr(mlp, "down_proj"):
            # No layer comes after the last: its MLP's outputs at other tokens are never read.
            self._last = _AtQueries(mlp)
            last = _view(layers[-1], mlp=self._last)
            self._at_queries = _view(decoder, layers=nn.ModuleList([*above[:-1], last]))

    @property
    def layers(self) -> int:
        """The number of layers of the whole model."""
        return len(self.decoder.layers)  # type: ignore[arg-type]

    def prepare(self, rows: Sequence[TokenizedRow], *, batch_size: int, prefix: int = 0) -> Prepared:
        """Put rows into length-sorted batches; the first `prefix` prompt tokens must be the same in all rows."""
        by_length = sorted(range(len(rows)), key=lambda i: (len(rows[i]), i))
        order = [by_length[at : at + batch_size] for at in range(0, len(by_length), batch_size)]
        behind = [TokenizedRow(row.prompt[prefix:], row.continuations) for row in rows]
        batches = [collate([behind[i] for i in indices], self.pad, prefix, self.device) for indices in order]
        shared = rows[0].prompt[:prefix] if rows else ()
        return Prepared(shared, batches, order, len(rows), Recordings(self))

    @torch.no_grad()
    def trunk(self, prepared: Prepared, *, keep_cache: bool = False) -> None:
        """Compute the trunk's activations of all batches, once; with `keep_cache` its keys and values too."""
        if len(prepared.hidden) == len(prepared.batches) and (not keep_cache or prepared.caches):
            return
        from transformers.cache_utils import DynamicCache

        prepared.hidden, prepared.caches = [], []
        prepared.recordings.clear()
        if prepared.prefix:
            tokens = torch.tensor([prepared.prefix], device=self.device)
            prepared.prefix_cache = DynamicCache()
            prepared.prefix_hidden = self._run_trunk(tokens, None, None, prepared.prefix_cache)
        for batch in prepared.batches:
            cache = repeated(prepared.prefix_cache, len(batch.tokens))
            if keep_cache and cache is None:
                cache = DynamicCache()
            prepared.hidden.append(self._run_trunk(batch.tokens, batch.positions, batch.mask, cache))
            if keep_cache:
                prepared.caches.append(cache)

    @torch.no_grad()
    def trunk_of(self, batch: Batch) -> Tensor:
        """Return the trunk's activations of one batch that has no prefix before it, (rows, length, d)."""
        return self._run_trunk(batch.tokens, batch.positions, batch.mask, None)

    @torch.no_grad()
    def prefix_cache(self, prepared: Prepared) -> DynamicCache | None:
        """Return keys and values of the shared prefix, those above the trunk under the present weights."""
        if not prepared.prefix:
            return None

        def run() -> DynamicCache:
            cache: DynamicCache = copy.deepcopy(prepared.prefix_cache)
            assert prepared.prefix_hidden is not None
            self.run_top(prepared.prefix_hidden, None, None, cache)
            return cache

        return prepared.recordings.run("prefix", run, own_memory=True)

    def top(
        self, hidden: Tensor, batch: Batch, cache: DynamicCache | None = None, *, every_token: bool = False
    ) -> Tensor:
        """Run the layers above the trunk. hidden: (rows, length, d); returns (n, d): outputs at `batch.queries`.

        The last layer's MLP runs at the queries alone, unless `every_token` is set.
        """
        # Layers that run again in backward, after this call, would not know the segments.
        segments = None if self._recomputing else batch.segments
        queries = None if every_token else batch.queries
        out = self.run_top(hidden, batch.positions, batch.mask, cache, segments, queries)
        return out[batch.queries[:, 0], batch.queries[:, 1]]

    @contextmanager
    def recomputing(self) -> Iterator[None]:
        """Within the block, layers above the trunk keep no activations for backward, but run again there.

        The last layer keeps its activations: in `top` it is a view, and most of it runs at the queries alone.
        """
        layers = list(self.decoder.layers)[self.split :]  # type: ignore[arg-type]
        before = [dict(layer.__dict__) for layer in layers]
        for layer in layers:
            # transformers recomputes a layer in training mode; its submodules stay in eval mode
            layer.training = layer.gradient_checkpointing = True
            layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
        self._recomputing = True
        try:
            yield
        finally:
            self._recomputing = False
            for layer, attributes in zip(layers, before, strict=True):
                layer.__dict__.clear()
                layer.__dict__.update(attributes)

    @property
    def output_weight(self) -> Tensor:
        """The matrix of the output layer, (vocabulary, d)."""
        return cast(Tensor, self.model.lm_head.weight)

    def logits(self, outputs: Tensor) -> Tensor:
        """Project outputs (n, d) to the vocabulary: (n, vocabulary) float32."""
        count = len(outputs)
        fill = -count % ROUND if count > ROUND else 0
        projected: Tensor = self.model.lm_head(nn.functional.pad(outputs, (0, 0, 0, fill)))
        return projected[:count].float()

    @torch.no_grad()
    def sequence_hidden(self, tokens: Sequence[int]) -> Tensor:
        """Return the trunk's activations (length, d) of one sequence, run alone so that no batch changes a bit."""
        length = len(tokens) + -len(tokens) % ROUND
        ids = torch.tensor([[*tokens, *[self.pad] * (length - len(tokens))]], device=self.device)
        causal = torch.ones(length, length, dtype=torch.bool, device=self.device).tril()
        hidden = self._run_trunk(ids, torch.arange(length, device=self.device)[None], causal[None, None], None)
        return hidden[0, : len(tokens)].clone()

    @torch.no_grad()
    def outputs(self, prepared: Prepared, batch_index: int, prefix: DynamicCache | None) -> Tensor:
        """Return the top's outputs at the queries of one batch, (n, d), under the present weights.

        Read them before the next batch is run: on a GPU that may overwrite them.
        """

        def run() -> Tensor:
            batch = prepared.batches[batch_index]
            return self.top(prepared.hidden[batch_index], batch, repeated(prefix, len(batch.tokens)))

        return prepared.recordings.run(("outputs", batch_index), run)

    def _run_trunk(self, tokens: Tensor, positions: Tensor | None, mask: Tensor | None, cache: Any) -> Tensor:
        if self.split == 0:
            return cast(Tensor, self.model.get_input_embeddings()(tokens))
        return _hidden_states(self._bottom, positions, mask, cache, input_ids=tokens)

    def run_top(
        self,
        hidden: Tensor,
        positions: Tensor | None,
        mask: Tensor | None,
        cache: Any,
        segments: Segments | None = None,
        queries: Tensor | None = None,
    ) -> Tensor:
        """Run the layers above the trunk, and return all their outputs, (rows, length, d); `cache` is added to."""
        if positions is None:
            positions = torch.arange(hidden.shape[1], device=hidden.device)[None]
        if mask is None:
            mask = hidden.new_ones(hidden.shape[1], hidden.shape[1], dtype=torch.bool).tril()[None, None]
        self._entry.hidden = hidden
        decoder = self._above
        if self._last is not None and queries is not None:
            decoder, self._last.queries = self._at_queries, queries
        try:
            with packed_attention(self.model.config, segments):
                return _hidden_states(decoder, positions, mask, cache, inputs_embeds=hidden)
        finally:
            self._entry.hidden = None
            if self._last is not None:
                self._last.queries = None


def _hidden_states(
    decoder: nn.Module, positions: Tensor | None, mask: Tensor | None, cache: Any, **inputs: Tensor
) -> Tensor:
    states: Tensor = decoder(
        **inputs, position_ids=positions, attention_mask=mask, past_key_values=cache, use_cache=cache is not None
    ).last_hidden_state
    return states


def _view(module: nn.Module, **replaced: nn.Module) -> nn.Module:
    """Return a view of `module` that shares all its modules but the replaced ones."""
    view = copy.copy(module)
    view._modules = {**module._modules, **replaced}
    return view


def repeated(cache: DynamicCache | None, rows: int) -> DynamicCache | None:
    """Copy a one-row cache for a batch; caches are changed by use."""
    cache = copy.deepcopy(cache)
    if cache is not None:
        cache.batch_repeat_interleave(rows)
    return cache
