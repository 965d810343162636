"""Calls that are made again and again: on a GPU their kernels are recorded once and replayed.

A small model on a GPU spends its time in Python, which starts some hundred kernels for a forward pass. Merges are
written into the resident weights where these lie, so that what was recorded under one candidate serves all others.

Reference: CUDA graphs, https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch

if TYPE_CHECKING:
    from memmcl.backbone.forward import Backbone

Returned = TypeVar("Returned")


@dataclass
class _Recorded:
    graph: torch.cuda.CUDAGraph
    returned: Any
    call: Callable[[], Any]
    """holds what the kernels read, so that it stays where it is"""


class Recordings:
    """Calls by name. A call may read only tensors that stay where they lie, and must not look at their values.

    On a CPU, and while LoRA layers hang on the model, calls are simply made.
    """

    def __init__(self, backbone: Backbone) -> None:
        self._backbone = backbone
        self._recorded: dict[Hashable, _Recorded] = {}
        self._made: set[Hashable] = set()
        self._refused = False

    @torch.no_grad()
    def run(self, name: Hashable, call: Callable[[], Returned], *, kept: bool = False) -> Returned:
        """Return what the call returns: made the first time, recorded the second, replayed from then on.

        Of a replay the caller must be done with it before the next replay on this backbone, unless it is `kept`: then
        it is overwritten by the next of this name only.
        """
        if self._backbone.device.type != "cuda" or hasattr(self._backbone.model, "peft_config") or self._refused:
            return call()
        if name not in self._made:
            self._made.add(name)
            return call()
        recorded = self._recorded.get(name) or self._record(name, call, kept)
        if recorded is None:
            return call()
        recorded.graph.replay()
        returned: Returned = recorded.returned
        return returned

    def clear(self) -> None:
        """Forget all, since what was read has moved."""
        self._recorded.clear()
        self._made.clear()

    def _record(self, name: Hashable, call: Callable[[], Any], kept: bool) -> _Recorded | None:
        """Return the recorded call; None where it cannot be recorded, as of a model that waits for the GPU.

        Then all calls are made from now on: others may have read what this one returns.
        """
        graph = torch.cuda.CUDAGraph()
        try:
            # A recording that fails leaves its stream behind as the current one.
            with (
                torch.cuda.stream(torch.cuda.current_stream()),
                torch.cuda.graph(graph, pool=None if kept else self._backbone.pool, capture_error_mode="thread_local"),
            ):
                returned = call()
        except RuntimeError:
            self._refused = True
            self._recorded.clear()
            return None
        self._recorded[name] = _Recorded(graph, returned, call)
        return self._recorded[name]
