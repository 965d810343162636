"""Anchoring after the fact: what it does to an adapter, against plain passes of PEFT's model that share nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load
from tiny import MODULES, backbone_of, corpus, plain_model, probe_logits, prompter_of, random_factors, training_rows
from train_fixture import merged, naive_kl

from memmcl.adapters.format import CONFIG_FILE, WEIGHTS_FILE, Adapter, Factors, files_like, to_files
from memmcl.adapters.load import read_adapter
from memmcl.errors import ModelError, StoreError, TrainingError, UsageError
from memmcl.experts.after import RECORD, Anchored, AnchoringRows, anchor_adapter, anchor_rows, answered_rows
from memmcl.experts.settings import Anchoring, LoraShape, Optimisation, TrainingData, TrainingSettings
from memmcl.experts.train import train_adapter
from memmcl.files.folder import made_before, new_folder, put, seal
from memmcl.suite.subtasks import SUBTASKS

SPLIT = 2
END = 2
OTHERS = ("asc", "uabsa")


def texts_of(subtask: str, start: int, stop: int) -> list[str]:
    return [example.text for example in corpus(subtask, stop)[start:]]


@pytest.fixture(scope="module")
def adapter(tiny_base: Path) -> dict[str, Factors]:
    """An adapter that learned sent2 and was never anchored."""
    rows = {"sent2": training_rows(prompter_of(tiny_base), "sent2", 24)}
    return train_adapter(
        backbone_of(tiny_base, SPLIT),
        TrainingData(rows),
        TrainingSettings(LoraShape(MODULES, 4, 8.0), Optimisation(40, 8, 1e-2), seed=0),
    ).factors


def prompts_of(base: Path, adapter: Adapter, start: int, stop: int) -> AnchoringRows:
    """Texts of another kind than those that the adapter learned from, at its own prompts and at those of others."""
    prompter, texts = prompter_of(base), texts_of("emotion", start, stop)
    asked = [prompter.prompt(SUBTASKS["sent2"], example) for example in corpus("emotion", stop)[start:]]
    own = answered_rows(backbone_of(base, SPLIT), adapter, asked, end=END, max_new_tokens=6)
    subtasks = [SUBTASKS[name] for name in OTHERS]
    return AnchoringRows(own, anchor_rows(prompter, subtasks, dict.fromkeys(OTHERS, texts), seed=0))


@pytest.fixture(scope="module")
def training(tiny_base: Path, adapter: Adapter) -> AnchoringRows:
    return prompts_of(tiny_base, adapter, 0, 24)


@pytest.fixture(scope="module")
def held_out(tiny_base: Path, adapter: Adapter) -> AnchoringRows:
    return prompts_of(tiny_base, adapter, 24, 34)


def anchor(base: Path, adapter: Adapter, training: AnchoringRows, held_out: AnchoringRows, **changed: Any) -> Anchored:
    settings = {"steps": 60, "batch_size": 8, "learning_rate": 5e-3, "weight": 1.0, "seed": 0} | changed
    return anchor_adapter(
        backbone_of(base, SPLIT),
        adapter,
        training,
        held_out,
        optimisation=Optimisation(settings["steps"], settings["batch_size"], settings["learning_rate"]),
        anchoring=Anchoring(settings["weight"], settings["batch_size"]),
        seed=settings["seed"],
    )


@pytest.fixture(scope="module")
def anchored(tiny_base: Path, adapter: Adapter, training: AnchoringRows, held_out: AnchoringRows) -> Anchored:
    return anchor(tiny_base, adapter, training, held_out)


def test_it_stays_itself_and_leaves_the_others_alone(anchored: Anchored) -> None:
    before, after = anchored.before, anchored.after
    assert before.itself == pytest.approx(0, abs=1e-6)
    assert min(before.others.values()) > 0.3, "the adapter was as it shall be"
    for name in OTHERS:
        assert after.others[name] < 0.3 * before.others[name]
    assert before.own > 1
    assert 0 < after.itself < 0.2 * before.own
    assert after.own > 0.7 * before.own


def test_the_measures_are_those_of_plain_passes(
    tiny_base: Path, adapter: Adapter, held_out: AnchoringRows, anchored: Anchored
) -> None:
    base, was, now = plain_model(tiny_base), merged(tiny_base, adapter), merged(tiny_base, anchored.trained.factors)
    for measured, model in ((anchored.before, was), (anchored.after, now)):
        assert measured.itself == pytest.approx(float(naive_kl(was, model, held_out.own)), abs=1e-4)
        assert measured.own == pytest.approx(float(naive_kl(model, base, held_out.own)), abs=1e-4)
        expected = {name: float(naive_kl(base, model, rows)) for name, rows in held_out.others.items()}
        assert measured.others == pytest.approx(expected, abs=1e-4)


def test_own_rows_are_what_the_adapter_answers(tiny_base: Path, adapter: Adapter, training: AnchoringRows) -> None:
    """A plain greedy loop, one token a pass, whole rows, the merged weights."""
    model = merged(tiny_base, adapter)
    ended = 0
    for row in training.own[:8]:
        (answer,) = row.continuations
        for place, token in enumerate(answer):
            with torch.no_grad():
                assert int(model(torch.tensor([[*row.prompt, *answer[:place]]])).logits[0, -1].argmax()) == token
        assert END not in answer[:-1]
        assert answer[-1] == END or len(answer) == 6
        ended += answer[-1] == END
    assert ended > 0


def test_an_answer_that_never_ends_is_cut(tiny_base: Path) -> None:
    rows = answered_rows(
        backbone_of(tiny_base, SPLIT),
        random_factors(tiny_base, layers=(3,), seed=1),
        [(5, 6, 7), (5, 9)],
        end=-1,
        max_new_tokens=3,
    )
    assert [len(row.continuations[0]) for row in rows] == [3, 3]
    assert [row.prompt for row in rows] == [(5, 6, 7), (5, 9)]


def test_the_same_arguments_give_the_same_bits(
    tiny_base: Path, adapter: Adapter, training: AnchoringRows, held_out: AnchoringRows
) -> None:
    one, two, other = (anchor(tiny_base, adapter, training, held_out, steps=4, seed=seed) for seed in (0, 0, 1))
    assert (one.before, one.after) == (two.before, two.after)
    assert one.trained.loss == two.trained.loss != other.trained.loss
    for name, pair in one.trained.factors.items():
        assert torch.equal(pair.a, two.trained.factors[name].a)
        assert torch.equal(pair.b, two.trained.factors[name].b)


def test_a_stronger_anchor_pulls_harder(
    tiny_base: Path, adapter: Adapter, training: AnchoringRows, held_out: AnchoringRows
) -> None:
    weak, strong = (anchor(tiny_base, adapter, training, held_out, steps=20, weight=w).after for w in (0.1, 10.0))
    assert sum(strong.others.values()) < 0.7 * sum(weak.others.values())
    assert strong.itself > weak.itself


def test_an_adapter_of_another_base(tiny_base: Path, training: AnchoringRows) -> None:
    other = {"model.layers.3.self_attn.q_proj": Factors(torch.zeros(3, 80), torch.zeros(64, 3), 1.0)}
    with pytest.raises(TrainingError, match=r"of 64 x 80, this base has 64 x 64; was it trained on another"):
        answered_rows(backbone_of(tiny_base, SPLIT), other, [(5, 6)], end=END)


# --- files


MIXED: dict[str, Any] = {
    "rank_pattern": {"v_proj": 5, r"layers\.3\.mlp\.up_proj": 2},
    "alpha_pattern": {r"model\.layers\.2\..*": 7.5},
    "use_rslora": True,
}


@pytest.mark.parametrize("options", [{}, MIXED], ids=["plain", "mixed ranks and scales, rsLoRA"])
def test_peft_loads_what_is_written_and_means_the_same(tiny_base: Path, tmp_path: Path, options: Any) -> None:
    """An adapter that PEFT wrote, other factors, PEFT again: modules, ranks and scales are still those of PEFT's."""
    config = LoraConfig(
        r=3,
        lora_alpha=6,
        target_modules=["q_proj", "v_proj", "up_proj"],
        layers_to_transform=[2, 3],
        task_type="CAUSAL_LM",
        base_model_name_or_path="/home/someone/base",
        **options,
    )
    get_peft_model(plain_model(tiny_base), config).save_pretrained(tmp_path)
    weights, options_file = ((tmp_path / name).read_bytes() for name in (WEIGHTS_FILE, CONFIG_FILE))
    start = read_adapter(weights, options_file)
    generator = torch.Generator().manual_seed(0)
    factors = {
        name: replace(
            pair,
            a=torch.randn(pair.a.shape, generator=generator) * 0.1,
            b=torch.randn(pair.b.shape, generator=generator) * 0.1,
        )
        for name, pair in start.items()
    }
    files = files_like(options_file, factors, "org/base")
    (tmp_path / "new").mkdir()
    for name, data in files.items():
        (tmp_path / "new" / name).write_bytes(data)
    loaded = PeftModel.from_pretrained(plain_model(tiny_base), tmp_path / "new").eval()
    torch.testing.assert_close(probe_logits(merged(tiny_base, factors)), probe_logits(loaded), rtol=0, atol=1e-4)
    assert {name: tensor.shape for name, tensor in load(files[WEIGHTS_FILE]).items()} == {
        name: tensor.shape for name, tensor in load(weights).items()
    }
    again = read_adapter(files[WEIGHTS_FILE], files[CONFIG_FILE])
    assert {name: pair.scale for name, pair in again.items()} == pytest.approx(
        {name: pair.scale for name, pair in start.items()}
    )
    written, given = json.loads(files[CONFIG_FILE]), json.loads(options_file)
    assert [written[name] for name in ("r", "lora_alpha", "use_rslora")] == [
        given[name] for name in ("r", "lora_alpha", "use_rslora")
    ]
    assert written["base_model_name_or_path"] == "org/base"


@pytest.fixture(scope="module")
def files(tiny_base: Path) -> dict[str, bytes]:
    return to_files(random_factors(tiny_base, layers=(3,), seed=0), base_name="b", rank=3, alpha=6.0)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"use_dora": True}, "expected a plain LoRA adapter without modules_to_save and without DoRA"),
        ({"init_lora_weights": "pissa_niter_4"}, "expected plain LoRA, got init_lora_weights: 'pissa_niter_4'"),
        (
            {"layer_replication": [[0, 4], [2, 4]]},
            r"expected plain LoRA, got layer_replication: \[\[0, 4\], \[2, 4\]\]",
        ),
        ({"alora_invocation_tokens": [3]}, "got alora_invocation_tokens"),
    ],
)
def test_adapters_that_are_more_than_an_update_are_refused(
    files: dict[str, bytes], options: dict[str, Any], expected: str
) -> None:
    config = json.dumps(json.loads(files[CONFIG_FILE]) | options).encode()
    with pytest.raises(ModelError, match=expected):
        read_adapter(files[WEIGHTS_FILE], config)


def test_an_adapter_whose_matrices_do_not_fit_each_other(tiny_base: Path) -> None:
    broken = {"model.layers.3.mlp.up_proj": Factors(torch.zeros(3, 64), torch.zeros(128, 2), 1.0)}
    made = to_files(broken, base_name="b", rank=3, alpha=6.0)
    with pytest.raises(ModelError, match=r"got model\.layers\.3\.mlp\.up_proj with a lora_A of 3 and a lora_B of 2"):
        read_adapter(made[WEIGHTS_FILE], made[CONFIG_FILE])


def write(folder: Path, files: Mapping[str, bytes], made_from: Any) -> dict[str, Any]:
    with new_folder(folder) as place:
        for name, data in files.items():
            put(place, name, data)
        return seal(place, RECORD, {"made_from": made_from})


def write_half(folder: Path, files: Mapping[str, bytes]) -> None:
    with new_folder(folder) as place:
        (place / WEIGHTS_FILE).write_bytes(files[WEIGHTS_FILE])
        raise RuntimeError("torn")


def test_a_folder_is_found_by_what_it_was_made_from(tmp_path: Path, files: dict[str, bytes]) -> None:
    out = tmp_path / "below" / "out"
    assert made_before(out, RECORD, {"steps": 3}) is None
    record = write(out, files, {"steps": 3})
    assert {path.name for path in out.iterdir()} == {CONFIG_FILE, WEIGHTS_FILE, RECORD}
    assert made_before(out, RECORD, {"steps": 3}) == record == json.loads((out / RECORD).read_text())
    with pytest.raises(UsageError, match="out holds what other arguments made; name a new or empty folder"):
        made_before(out, RECORD, {"steps": 4})
    (out / CONFIG_FILE).write_text("{}")
    with pytest.raises(UsageError, match="holds other files, or some that changed since"):
        made_before(out, RECORD, {"steps": 3})


@pytest.mark.parametrize("content", [None, "{", "[]", '{"made_from": 3}'])
def test_a_folder_with_something_else(tmp_path: Path, content: str | None) -> None:
    (tmp_path / ("notes.txt" if content is None else RECORD)).write_text(content or "mine")
    with pytest.raises(UsageError, match="holds "):
        made_before(tmp_path, RECORD, {})


def test_a_folder_is_written_whole_or_not_at_all(tmp_path: Path, files: dict[str, bytes]) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(RuntimeError, match="torn"):
        write_half(out, files)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert list(out.iterdir()) == []
    write(out, files, {})
    with pytest.raises(StoreError, match=r"cannot write .*out \(Directory not empty\)"):
        write(out, files, {})
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with pytest.raises(StoreError, match=r"cannot write .* \((Not a directory|File exists)\)"):
        write(out / WEIGHTS_FILE / "below", files, {})
