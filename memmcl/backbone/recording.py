"""Repeated calls: on a GPU their kernels are recorded once as a CUDA graph and replayed.

A small model on a GPU spends its time in Python, which starts some hundred kernels for a forward pass. Merges are
written into the resident weights in place, so that a graph recorded under one candidate serves all others.

Reference: CUDA graphs, https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch

if TYPE_CHECKING:
    from memmcl.backbone.forward import Backbone

Returned = TypeVar("Returned")


_Recorded = tuple[torch.cuda.CUDAGraph, Any, Callable[[], Any]]
"""The graph, what the call returned, and the call itself, which keeps the tensors alive that the kernels read."""


class Recordings:
    """Calls by name. A call may read only tensors that are updated in place, and must not branch on their values.

    On a CPU, and while the model has LoRA layers, every call runs as it is.
    """

    def __init__(self, backbone: Backbone) -> None:
        self._backbone = backbone
        self._recorded: dict[Hashable, _Recorded | None] = {}  # None: run once, and not recorded so far
        self._refused = False

    @torch.no_grad()
    def run(self, name: Hashable, call: Callable[[], Returned], *, own_memory: bool = False) -> Returned:
        """Return the call's result: run the first time, recorded the second, replayed from then on.

        The next replay on this backbone overwrites the result of a replay; with `own_memory`, only the next one of
        this name does.
        """
        if self._backbone.device.type != "cuda" or hasattr(self._backbone.model, "peft_config") or self._refused:
            return call()
        if name not in self._recorded:
            self._recorded[name] = None
            return call()
        recorded = self._recorded[name] or self._record(name, call, own_memory)
        if recorded is None:
            return call()
        graph, returned, _ = recorded
        graph.replay()
        return cast(Returned, returned)

    def clear(self) -> None:
        """Forget all recordings, because the tensors that they read were replaced."""
        self._recorded.clear()

    def _record(self, name: Hashable, call: Callable[[], Any], own_memory: bool) -> _Recorded | None:
        """Return the recorded call; None where it cannot be recorded, say because the model waits for the GPU.

        From then on nothing is recorded: another recording may read what this call returns.
        """
        graph, pool = torch.cuda.CUDAGraph(), None if own_memory else self._backbone.pool
        try:
            # A recording that fails leaves its stream as the current one.
            with (
                torch.cuda.stream(torch.cuda.current_stream()),
                torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"),
            ):
                returned = call()
        except RuntimeError:
            self._refused = True
            self._recorded.clear()
            return None
        recorded = self._recorded[name] = (graph, returned, call)
        return recorded
