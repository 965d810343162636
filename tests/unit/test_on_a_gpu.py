"""What is done another way on a GPU, against the same on the CPU and against itself the first time; needs a GPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from merge_fixture import COEFFICIENTS, RECIPES, Adapters, moments, weights_of
from tiny import backbone_of, corpus, in_lora_layers, prompter_of, random_factors

from memmcl.backbone.forward import Backbone
from memmcl.evaluate.scoring import Probe
from memmcl.evaluate.teacher_forced import TeacherForced
from memmcl.merge.build import Merger
from memmcl.merge.genome import Recipe
from memmcl.suite.prompts import Prompter
from memmcl.suite.subtasks import SUBTASKS

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
LAMBDAS = (0.0, 1.0, -0.7, 0.4, 1.0)
"""Candidates one after the other: made, recorded, replayed; one of them twice."""


@pytest.fixture(scope="module")
def prompter(tiny_base: Path) -> Prompter:
    return prompter_of(tiny_base)


@pytest.fixture(params=[0, 2])
def split(request: pytest.FixtureRequest) -> int:
    found: int = request.param
    return found


def merger_of(directory: Path, backbone: Backbone) -> Merger:
    return Merger(backbone, {"one": random_factors(directory, layers=(2, 3), seed=3)}, blocks=1)


def probe_of(backbone: Backbone, prompter: Prompter, name: str, rows: int = 7, shots: int = 0) -> Probe:
    asked, found = SUBTASKS[name], corpus(name, rows + shots)
    shown = [(asked, row) for row in found[rows:]]
    return Probe(backbone, prompter, asked, found[:rows], demonstrations=shown, batch_size=3, max_new_tokens=20)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("recipe", [Recipe(), *RECIPES], ids=lambda recipe: recipe.method)
def test_merges_are_those_of_the_cpu(tiny_base: Path, recipe: Recipe, dtype: str) -> None:
    adapters: Adapters = {
        name: random_factors(tiny_base, layers=(1, 2, 3), seed=seed) for seed, name in enumerate(COEFFICIENTS)
    }
    weights = []
    for device in ("cpu", "cuda"):
        backbone = backbone_of(tiny_base, 1, dtype, device)
        before = weights_of(backbone)
        merger = Merger(backbone, adapters, blocks=2, grams=moments(adapters))
        for factor in (0.5, 0.0, 1.0):  # made, recorded, replayed
            merger.apply({name: tuple(factor * v for v in row) for name, row in COEFFICIENTS.items()}, recipe)
        weights.append({name: weight.float().cpu() for name, weight in weights_of(backbone).items()})
        merger.reset()
        assert all(torch.equal(weight, before[name]) for name, weight in weights_of(backbone).items())
    for name, expected in weights[0].items():
        tolerance = 2e-5 if dtype == "float32" else 2**-7
        torch.testing.assert_close(weights[1][name], expected, rtol=0, atol=tolerance, msg=name)


@pytest.mark.parametrize("name", ["emotion", "uabsa"])
def test_given_answers_are_replayed(tiny_base: Path, prompter: Prompter, name: str, split: int) -> None:
    rows = corpus(name, 6)
    found = {}
    for device in ("cpu", "cuda"):
        backbone = backbone_of(tiny_base, split, "float32", device)
        merger = merger_of(tiny_base, backbone)

        def given(backbone: Backbone = backbone) -> TeacherForced:
            return TeacherForced(backbone, prompter, SUBTASKS[name], rows, [r.answer for r in rows], ends=[2, 6])

        kept = given()
        found[device] = []
        for value in LAMBDAS:
            merger.apply({"one": (value,)})
            values = [np.concatenate([part.logprobs for part in one.segments()]) for one in (kept, given())]
            np.testing.assert_array_equal(values[0], values[1])
            found[device].append(values[0])
        assert (found[device][1] == found[device][-1]).all()
    assert np.abs(found["cpu"][0] - found["cpu"][1]).min() > 0.01
    np.testing.assert_allclose(found["cuda"], found["cpu"], rtol=0, atol=2e-3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shots", [0, 2])
@pytest.mark.parametrize("name", ["emotion", "uabsa"])
def test_answers_are_replayed(
    tiny_base: Path, prompter: Prompter, name: str, shots: int, split: int, dtype: str
) -> None:
    found = {}
    for device in ("cpu", "cuda"):
        backbone = backbone_of(tiny_base, split, dtype, device)
        merger = merger_of(tiny_base, backbone)
        kept = probe_of(backbone, prompter, name, shots=shots)
        found[device] = []
        for value in LAMBDAS:
            merger.apply({"one": (value,)})
            both = [kept, probe_of(backbone, prompter, name, shots=shots)]
            assert both[0].answers() == both[1].answers()
            assert both[0].gold_logprob() == both[1].gold_logprob()
            found[device].append(kept.answers() if name == "uabsa" else kept.label_scores().tolist())
        assert found[device][0] != found[device][1] == found[device][-1]
    if dtype == "float32" and name == "uabsa":
        assert found["cuda"] == found["cpu"]
    elif dtype == "float32":
        np.testing.assert_allclose(found["cuda"], found["cpu"], rtol=0, atol=2e-3)


def test_nothing_is_replayed_where_lora_layers_hang(tiny_base: Path, prompter: Prompter) -> None:
    backbone = backbone_of(tiny_base, 2, "float32", "cuda")
    probe = probe_of(backbone, prompter, "emotion")
    plain = [probe.label_scores() for _ in range(3)]
    factors = random_factors(tiny_base, layers=(2, 3), seed=3)
    with in_lora_layers(backbone, factors):
        found = [probe.label_scores() for _ in range(3)]
    fresh = probe_of(backbone, prompter, "emotion")
    with in_lora_layers(backbone, factors):
        expected = fresh.label_scores()
    assert all((one == expected).all() for one in found)
    assert not (plain[0] == expected).any()
    assert all((one == plain[0]).all() for one in [*plain, probe.label_scores()])
