"""Second moments of what modules see: what regmean needs to know of each expert, from unlabelled rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor, nn

from memmcl.errors import DataError


@torch.no_grad()
def input_moments(model: nn.Module, modules: Iterable[str], rows: Iterable[Sequence[int]]) -> dict[str, Tensor]:
    """Return, by module, X^T X of its inputs X: (tokens, d_in), over all tokens of all rows; (d_in, d_in) float32.

    model: a causal language model of transformers, with the weights to be looked at. rows: token ids; each is run by
    itself, so that nothing is padded. Modules that are given the same tensor (queries, keys and values; gate and up)
    share one moment in memory, the very same tensor. On the CPU.

    Raises:
        DataError: no row with a token.
    """
    names = list(modules)
    leaders: dict[str, str] = {}
    moments: dict[str, Tensor] = {}
    seen: list[tuple[Tensor, str]] = []  # inputs of the first row, held while their identity is compared

    def first(name: str, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        leaders[name] = next((leader for tensor, leader in seen if tensor is inputs[0]), name)
        if leaders[name] == name:
            seen.append((inputs[0], name))

    def add(name: str, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        features = inputs[0].reshape(-1, inputs[0].shape[-1]).float()
        moments[name] = moments.get(name, torch.zeros((), device=features.device)) + features.T @ features

    device = next(model.parameters()).device
    for row in rows:
        tokens = torch.tensor([list(row)], device=device)
        if not tokens.numel():
            continue
        if not leaders:
            _run(model, tokens, names, first)
            seen.clear()
        _run(model, tokens, [name for name in names if leaders[name] == name], add)
    if not leaders:
        raise DataError("second moments need texts with at least one token, got none")
    kept = {name: moment.cpu() for name, moment in moments.items()}
    return {name: kept[leaders[name]] for name in names}


def _run(model: nn.Module, tokens: Tensor, names: Iterable[str], hook: Callable[..., None]) -> None:
    with ExitStack() as stack:
        for name in names:
            stack.callback(model.get_submodule(name).register_forward_pre_hook(partial(hook, name)).remove)
        model(input_ids=tokens, use_cache=False, logits_to_keep=1)
