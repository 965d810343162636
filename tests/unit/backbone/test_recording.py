"""When calls are made, recorded and replayed; the GPU's part is stood in for, test_on_a_gpu.py has the real one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from memmcl.backbone.recording import Recordings


class Gpu:
    """Records by keeping what the call returned; counts replays. refuses: nothing can be recorded."""

    def __init__(self) -> None:
        self.replayed = 0
        self.pools: list[Any] = []
        self.refuses = False

    def replay(self) -> None:
        self.replayed += 1

    @contextmanager
    def recording(self, graph: Gpu, *, pool: Any, capture_error_mode: str) -> Iterator[None]:
        self.pools.append(pool)
        yield
        if self.refuses:
            raise RuntimeError("operation not permitted when stream is capturing")

    @contextmanager
    def stream(self, _: Any) -> Iterator[None]:
        yield


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    found = Gpu()
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: found)
    monkeypatch.setattr(torch.cuda, "graph", found.recording)
    monkeypatch.setattr(torch.cuda, "stream", found.stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    return found


def recordings(device: str = "cuda") -> tuple[Recordings, Any]:
    backbone: Any = SimpleNamespace(device=torch.device(device), model=SimpleNamespace(), pool="shared")
    return Recordings(backbone), backbone


def calls(found: Recordings, name: str, times: int, **more: bool) -> int:
    """Return how often the call was really made."""
    made: list[int] = []
    for _ in range(times):
        assert found.run(name, lambda: made.append(1) or "value", **more) == "value"
    return len(made)


def test_a_call_is_made_then_recorded_then_replayed(gpu: Gpu) -> None:
    found, _ = recordings()
    assert calls(found, "one", 1) == 1
    assert gpu.replayed == 0
    assert calls(found, "one", 4) == 1, "recording runs the call's Python once"
    assert gpu.replayed == 4
    assert calls(found, "kept", 3, own_memory=True) == 2
    assert gpu.pools == ["shared", None]
    found.clear()
    assert calls(found, "one", 3) == 2


def test_on_a_cpu_and_under_lora_layers_calls_are_made(gpu: Gpu) -> None:
    assert calls(recordings("cpu")[0], "one", 4) == 4
    found, backbone = recordings()
    assert calls(found, "one", 3) == 2
    backbone.model.peft_config = {}
    assert calls(found, "one", 3) == 3
    del backbone.model.peft_config
    assert calls(found, "one", 3) == 0
    assert gpu.replayed == 5


def test_where_one_call_cannot_be_recorded_none_is(gpu: Gpu) -> None:
    found, _ = recordings()
    assert calls(found, "prefix", 3) == 2
    gpu.refuses = True
    calls(found, "outputs", 2)
    assert gpu.replayed == 2
    assert calls(found, "outputs", 2) == 2
    assert calls(found, "prefix", 2) == 2, "it is replayed, though what reads it is not"
    assert gpu.replayed == 2
