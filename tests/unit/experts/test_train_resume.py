"""A training that was interrupted goes on to the same bits, and whatever else it was asked for goes with it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import backbone_of
from train_fixture import (
    ANCHORING,
    assert_same_state,
    assert_same_training,
    held_out_rows,
    other_rows,
    own_rows,
    state_of,
    train,
)

from memmcl.adapters.format import Adapter, Factors, to_files
from memmcl.backbone.forward import Backbone
from memmcl.errors import TrainingError
from memmcl.experts import checkpoint
from memmcl.experts.checkpoint import decode
from memmcl.experts.settings import Anchoring, Stopping
from memmcl.experts.train import Moved, TrainedAdapter

PLAIN: dict[str, Any] = {"steps": 7}
EVERYTHING: dict[str, Any] = PLAIN | {
    "dropout": 0.1,
    "weight_decay": 0.1,
    "micro_batch": 3,
    "anchoring": replace(ANCHORING, every=2, delay=0.2),
    "stopping": Stopping(every=2),
    "learning_rate": 2e-2,
}
EARLY = EVERYTHING | {"steps": 12, "learning_rate": 0.1, "curve": "constant", "stopping": Stopping(2, patience=1)}


class Killed(Exception):
    """Stands for whatever ends a process."""


class Saves(list[bytes]):
    """Keeps checkpoints; after `last` of them, whoever saved is killed."""

    def __init__(self, last: int | None = None) -> None:
        super().__init__()
        self.last = last

    def __call__(self, data: bytes) -> None:
        self.append(data)
        if len(self) == self.last:
            raise Killed


def run(base: Path, backbone: Backbone, settings: dict[str, Any], **more: Any) -> TrainedAdapter:
    rows = {**own_rows(base), "emotion": other_rows(base)["uabsa"][:2]}
    anchors = {"irony": other_rows(base)["irony"], "uabsa": other_rows(base)["uabsa"][1:]}
    return train(backbone, rows, anchors, **{"validation": held_out_rows(base)} | settings | more)


@pytest.fixture(scope="module", params=["plain", "everything", "early"])
def whole(
    request: pytest.FixtureRequest, tiny_base: Path, backbone: Backbone
) -> tuple[dict[str, Any], TrainedAdapter, Saves]:
    """Settings, an uninterrupted training, and its checkpoints after every step."""
    settings = {"plain": PLAIN, "everything": EVERYTHING, "early": EARLY}[request.param]
    saves = Saves()
    trained = run(tiny_base, backbone, settings, save=saves, save_every=1)
    if settings is EARLY:
        assert trained.stopped_early
        assert trained.best_step is not None
        assert trained.best_step == len(trained.loss) - 2 < 10
        assert len(saves) == len(trained.loss)
    else:
        assert len(saves) == len(trained.loss) - 1 == 6
    return settings, trained, saves


def without_clock(data: bytes) -> tuple[Any, dict[str, bytes]]:
    progressed, tensors = decode(data)
    return replace(progressed, seconds=0.0), {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}


@pytest.mark.parametrize("kept", [1, 3, -1])
def test_killed_while_saving(
    tiny_base: Path, backbone: Backbone, whole: tuple[dict[str, Any], TrainedAdapter, Saves], kept: int
) -> None:
    """From any checkpoint training goes on to the same factors, losses, anchors, looks, best adapter and tokens.

    From the last one, of a training that stopped early, there is nothing left to do but to give back the best adapter.
    """
    settings, trained, saves = whole
    kept %= len(saves) + 1
    before = state_of(backbone.model)
    killed = Saves(last=kept)
    with pytest.raises(Killed):
        run(tiny_base, backbone, settings, save=killed, save_every=1)
    assert_same_state(before, state_of(backbone.model))
    assert without_clock(killed[-1]) == without_clock(saves[kept - 1])
    later = Saves()
    resumed = run(tiny_base, backbone, settings, resume=killed[-1], save=later, save_every=1)
    assert_same_training(resumed, trained)
    assert [without_clock(data) for data in later] == [without_clock(data) for data in saves[kept:]]
    assert decode(killed[-1])[0].seconds <= resumed.seconds


def test_killed_between_checkpoints_and_again(
    tiny_base: Path, backbone: Backbone, whole: tuple[dict[str, Any], TrainedAdapter, Saves]
) -> None:
    """What was done since the last checkpoint is done again; a resumed training can be killed like any other."""
    settings, trained, _ = whole
    saves: Saves = Saves()
    for end in (3, 5, 6):

        def watch(moved: Moved, end: int = end) -> None:
            if moved.step == end:
                raise Killed

        with pytest.raises(Killed):
            run(
                tiny_base,
                backbone,
                settings,
                save=saves,
                save_every=2,
                progress=watch,
                resume=saves[-1] if saves else None,
            )
    assert [decode(data)[0].step for data in saves] == [2, 4, 6]
    steps: list[Moved] = []
    assert_same_training(run(tiny_base, backbone, settings, resume=saves[-1], progress=steps.append), trained)
    assert [moved.step for moved in steps] == list(range(7, len(trained.loss) + 1))


def test_nothing_is_saved_unless_asked_for(tiny_base: Path, backbone: Backbone) -> None:
    saves = Saves()
    run(tiny_base, backbone, PLAIN | {"steps": 3}, save=saves)
    run(tiny_base, backbone, PLAIN | {"steps": 3}, save=saves, save_every=3)
    assert not saves, "the last step needs no checkpoint"


def test_a_checkpoint_is_resumed_with_a_teacher_and_a_start(tiny_base: Path, backbone: Backbone) -> None:
    first = run(tiny_base, backbone, PLAIN)
    settings = PLAIN | {"start": first.factors, "teacher": "self", "anchoring": Anchoring(3.0, 2), "steps": 4}
    saves = Saves()
    trained = run(tiny_base, backbone, settings, save=saves, save_every=2)
    assert_same_training(run(tiny_base, backbone, settings, resume=saves[0]), trained)


CHILD = """
import json, sys
from pathlib import Path
sys.path[:0] = json.loads(sys.argv[2])
import torch
from test_train_resume import EVERYTHING, as_files, run
from tiny import backbone_of

folder = Path(sys.argv[1])
base = Path((folder / "base").read_text())
for dtype in ("float32", "bfloat16"):
    trained = run(base, backbone_of(base, 2, dtype), EVERYTHING, resume=(folder / dtype).read_bytes())
    for name, data in as_files(trained).items():
        (folder / f"{dtype}.{name}").write_bytes(data)
"""


def as_files(trained: TrainedAdapter) -> dict[str, bytes]:
    """Return all that decides whether two trainings are equal, as bytes."""
    told = replace(trained, factors={}, seconds=0.0)
    return {"curves": json.dumps(vars(told)).encode(), **to_files(trained.factors, base_name="", rank=4, alpha=8.0)}


def test_another_process_goes_on_to_the_same_bits(tiny_base: Path, tmp_path: Path, backbone: Backbone) -> None:
    (tmp_path / "base").write_text(str(tiny_base))
    expected = {}
    for dtype in ("float32", "bfloat16"):
        saves = Saves()
        trained = run(tiny_base, backbone_of(tiny_base, 2, dtype), EVERYTHING, save=saves, save_every=3)
        (tmp_path / dtype).write_bytes(saves[0])
        expected |= {f"{dtype}.{name}": data for name, data in as_files(trained).items()}
    tests = [str(Path(__file__).parents[2] / "helpers"), str(Path(__file__).parent)]
    subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path), json.dumps(tests)],
        check=True,
        timeout=280,
        env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())},
    )
    assert {name: (tmp_path / name).read_bytes() for name in expected} == expected


def test_a_checkpoint_of_another_training_is_refused(tiny_base: Path, backbone: Backbone) -> None:
    saves = Saves()
    run(tiny_base, backbone, EARLY, save=saves, save_every=1)
    before = state_of(backbone.model)
    with pytest.raises(TrainingError, match=r"layers\.2\.self_attn\.q_proj\.A is \(4, 64\) instead of \(2, 64\)"):
        run(tiny_base, backbone, EARLY | {"rank": 2}, resume=saves[0])
    with pytest.raises(TrainingError, match=r"layers\.1\.self_attn\.q_proj\.A is missing"):
        run(tiny_base, backbone_of(tiny_base, 1), EARLY, resume=saves[0])
    for data in (b"", saves[0][:-1]):
        with pytest.raises(TrainingError, match="not a checkpoint of a training"):
            run(tiny_base, backbone, EARLY, resume=data)
    progressed, tensors = decode(saves[-1])
    for lost in ("adapter", "exp_avg", "exp_avg_sq", "best"):
        name = next(name for name in tensors if name.startswith(f"{lost}."))
        data = checkpoint.encode(progressed, {key: tensor for key, tensor in tensors.items() if key != name})
        with pytest.raises(TrainingError, match=f"the checkpoint does not fit this training: {name} is missing"):
            run(tiny_base, backbone, EARLY, resume=data)
    assert_same_state(before, state_of(backbone.model))


def test_a_start_of_another_rank_decides_the_checkpoint(tiny_base: Path, backbone: Backbone) -> None:
    def start(rank: int) -> Adapter:
        generator = torch.Generator().manual_seed(rank)
        name = "model.layers.3.mlp.up_proj"
        return {name: Factors(torch.randn(rank, 64, generator=generator), torch.zeros(128, rank), 1.0)}

    saves = Saves()
    trained = run(tiny_base, backbone, PLAIN, start=start(2), save=saves, save_every=3)
    assert_same_training(run(tiny_base, backbone, PLAIN, start=start(2), resume=saves[0]), trained)
    with pytest.raises(TrainingError, match=r"up_proj\.A is \(2, 64\) instead of \(3, 64\)"):
        run(tiny_base, backbone, PLAIN, start=start(3), resume=saves[0])
