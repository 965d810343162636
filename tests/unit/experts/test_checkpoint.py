"""A checkpoint's bytes: every bit comes back, and what is none is refused, never run."""

from __future__ import annotations

import json
import math
import pickle
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save
from torch import Tensor

from memmcl.errors import TrainingError
from memmcl.experts.checkpoint import VERSION, Progressed, decode, encode, restore

PROGRESSED = Progressed(
    step=3,
    loss=[0.1 + 0.2, 5e-324, 1.7976931348623157e308],
    anchor=[None, -0.0, math.pi],
    validation=[(2, 1 / 3), (3, 0.1)],
    micro_batch=2,
    tokens=2**60 + 1,
    seconds=1e-9 + 0.1,
)


def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(3, 4, generator=generator)
    special = torch.tensor([math.nan, math.inf, -math.inf, -0.0, 1e-45])
    return {"adapter.m.A": values, "adapter.m.B": values.T, "best.m.A": values.bfloat16(), "exp_avg.m.A": special}


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("progressed", [PROGRESSED, Progressed()], ids=["some steps", "none"])
def test_round_trip_is_exact(progressed: Progressed) -> None:
    data = encode(progressed, tensors())
    found, loaded = decode(data)
    assert found == progressed
    assert [math.copysign(1, value) for value in found.anchor if value == 0] == [
        math.copysign(1, value) for value in progressed.anchor if value == 0
    ]
    assert all(isinstance(look, tuple) for look in found.validation)
    assert loaded.keys() == tensors().keys()
    for name, tensor in tensors().items():
        assert (loaded[name].dtype, loaded[name].shape) == (tensor.dtype, tensor.shape)
        assert bits(loaded[name]) == bits(tensor), name
    assert encode(found, loaded) == data, "the bytes differ the second time"


@pytest.mark.parametrize(
    ("validation", "best", "since"),
    [
        ([], None, 0),
        ([(2, 0.5)], 2, 0),
        ([(2, 0.5), (4, 0.4), (6, 0.45), (8, 0.4)], 4, 2),  # of equals the earliest
        ([(2, 0.5), (4, 0.6), (6, 0.7)], 2, 2),
    ],
)
def test_best_step_and_looks_since(validation: list[tuple[int, float]], best: int | None, since: int) -> None:
    progressed = Progressed(validation=validation)
    assert (progressed.best_step, progressed.validations_since_best) == (best, since)


def with_header(values: Any) -> bytes:
    contiguous = {name: tensor.contiguous() for name, tensor in tensors().items()}
    return save(contiguous, metadata={"memmcl": values if isinstance(values, str) else json.dumps(values)})


def values_of(progressed: Progressed) -> dict[str, Any]:
    return {"version": VERSION, **vars(progressed)}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"not a checkpoint",
        save({"adapter.m.A": torch.zeros(2)}),
        with_header("{"),
        with_header("[]"),
        with_header("3"),
        with_header(values_of(PROGRESSED) | {"version": VERSION + 1}),
        with_header({name: value for name, value in values_of(PROGRESSED).items() if name != "version"}),
        with_header(values_of(PROGRESSED) | {"unknown": 1}),
        with_header(values_of(PROGRESSED) | {"validation": [3]}),
        with_header(values_of(PROGRESSED) | {"validation": None}),
    ],
    ids=[
        "nothing",
        "text",
        "an adapter",
        "half a header",
        "a list",
        "a number",
        "another version",
        "no version",
        "an unknown field",
        "a look without loss",
        "no looks",
    ],
)
def test_what_is_no_checkpoint_is_refused(data: bytes) -> None:
    with pytest.raises(TrainingError, match=r"^not a checkpoint of a training \(.*\); remove it and train anew$"):
        decode(data)


def test_another_version_is_named() -> None:
    with pytest.raises(TrainingError, match="another version"):
        decode(with_header(values_of(PROGRESSED) | {"version": VERSION + 1}))


def test_damaged_bytes_are_refused_or_read_but_never_anything_else() -> None:
    """Cut anywhere, it is no checkpoint; a broken byte in the header gives the error of the tree, or a checkpoint."""
    data = encode(PROGRESSED, tensors())
    header = 8 + int.from_bytes(data[:8], "little")
    for length in [*range(0, header, 7), header, len(data) - 1]:
        with pytest.raises(TrainingError, match="not a checkpoint of a training"):
            decode(data[:length])
    refused = 0
    for place in range(header):
        for change in (0x01, 0x10, 0x80):
            broken = bytearray(data)
            broken[place] ^= change
            try:
                decode(bytes(broken))
            except TrainingError:
                refused += 1
    assert refused > 2 * header


class Payload:
    """Unpickled, it would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.path, "run")


@pytest.mark.parametrize("kind", ["pickle", "torch"])
def test_nothing_is_unpickled(tmp_path: Path, kind: str) -> None:
    payload, stream = Payload(tmp_path / "ran"), BytesIO()
    if kind == "pickle":
        pickle.dump(payload, stream)
    else:
        torch.save({"adapter": payload}, stream)
    with pytest.raises(TrainingError, match="not a checkpoint"):
        decode(stream.getvalue())
    assert not payload.path.exists()
    pickle.loads(pickle.dumps(payload))
    assert payload.path.exists(), "the payload is harmless: this test shows nothing"


def test_restore_copies_into_the_same_tensors() -> None:
    into = {"m.A": torch.zeros(3, 4), "m.B": torch.zeros(4, 3)}
    places = {name: tensor.data_ptr() for name, tensor in into.items()}
    restore(tensors(), "adapter", into)
    for name, tensor in into.items():
        assert tensor.data_ptr() == places[name]
        assert torch.equal(tensor, tensors()[f"adapter.{name}"])


@pytest.mark.parametrize(
    ("into", "told"),
    [
        ({"m.A": torch.zeros(2, 4)}, r"adapter\.m\.A is \(3, 4\) instead of \(2, 4\)"),
        ({"m.A": torch.zeros(4, 3)}, r"adapter\.m\.A is \(3, 4\) instead of \(4, 3\)"),
        ({"n.A": torch.zeros(3, 4)}, r"adapter\.n\.A is missing"),
    ],
    ids=["another rank", "transposed", "another module"],
)
def test_a_checkpoint_of_another_training_is_refused(into: dict[str, Tensor], told: str) -> None:
    with pytest.raises(TrainingError, match=f"the checkpoint does not fit this training: {told}; remove it"):
        restore(tensors(), "adapter", into)
    assert not any(tensor.any() for tensor in into.values())


def test_fields_are_what_this_version_wrote() -> None:
    """Whoever adds a field raises VERSION: an older checkpoint would be read as if it had the field's default."""
    assert sorted(vars(PROGRESSED)) == sorted(
        ["step", "loss", "anchor", "validation", "micro_batch", "tokens", "seconds"]
    )
    assert VERSION == 1
