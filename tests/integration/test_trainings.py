"""Trainings as stages on a tiny model: their keys, what they stand on, their checkpoints, their rows."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from e2e_driver import ref_of, tiny_config
from prefect.states import Completed, State
from tiny import plain_model, probe_logits

from memmcl.adapters import format as adapter
from memmcl.backbone.resident import resident
from memmcl.config import parse_config
from memmcl.errors import CorruptArtifact, ModelError, TrainingError
from memmcl.evaluate.asking import make_probe
from memmcl.experts import checkpoint
from memmcl.experts.train import STAGE_VERSION
from memmcl.report.schema import ExpertResult
from memmcl.search.scorer import Scorer
from memmcl.search.spec import SearchSpec
from memmcl.store import ArtifactRef, Manifest, StageSettings, Store, cache_key
from memmcl.store.manifest import manifest_path
from memmcl.suite.splits import Splits
from tasks.run import runtime
from tasks.run.inputs import find_inputs
from tasks.run.journal import Pinned
from tasks.run.models import adapted_model, base_adapters_of, folded, warm_start_of
from tasks.run.runtime import Run, open_store
from tasks.stages import data, experts, references, sections, training, weak
from tasks.stages.opening import open_run
from tasks.stages.run_artifacts import TrainedArtifacts
from tasks.stages.training import TrainingPlan
from tasks.ui.updates import Update, watched_by

MEMBERS = ("sent2", "irony", "emotion")
STEPS = 6


@dataclass(frozen=True)
class Place:
    """One run in a store of its own, its rows published."""

    run: Run
    splits: Splits
    train: dict[str, ArtifactRef]
    weak: dict[str, ArtifactRef]
    anchors: ArtifactRef | None

    @property
    def store(self) -> Store:
        return open_store(self.run)

    def warm(self) -> ArtifactRef:
        return ref_of(experts.train_warm.fn(self.run, self.train))

    def expert(self, name: str, warm: ArtifactRef | None = None) -> ArtifactRef:
        return ref_of(experts.train_expert.fn(self.run, name, self.train[name], self.anchors, warm))

    def joint(self) -> ArtifactRef:
        return ref_of(experts.train_joint.fn(self.run, self.train))

    def reference(self, name: str, expert: ArtifactRef) -> dict[str, Any]:
        state = references.measure_reference.fn(self.run, name, expert, self.weak[name], self.train[name], None)
        return dict(json.loads(self.store.read(ref_of(state), "reference.json")))

    def manifest(self, ref: ArtifactRef) -> Manifest:
        return self.store.load(ref)


Make = Callable[..., Place]


@pytest.fixture(autouse=True)
def _without_a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks are called as functions here: they log as any module does, and show no progress."""

    @contextmanager
    def unseen(title: str, total: int, *, kind: str, start: int = 0) -> Iterator[Callable[..., None]]:
        yield lambda done, in_all, words: None

    for module in (data, experts, runtime, training, weak):
        if hasattr(module, "log"):
            monkeypatch.setattr(module, "log", partial(logging.getLogger, "memmcl.test"))
    monkeypatch.setattr(training, "shown", unseen)


@pytest.fixture
def make(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Make:
    """Open a run with changes of its settings, and publish its rows."""

    def made(changes: dict[str, Any] | None = None, *, subtasks: tuple[str, ...] = MEMBERS, **settings: Any) -> Place:
        tree = tiny_config(tiny_base)
        tree["data"] |= {"subtasks": list(subtasks), "train_rows": 12}
        tree["experts"] |= {"steps": STEPS, **settings}
        for section, values in (changes or {}).items():
            tree[section] = tree.get(section, {}) | values
        tree["store"] = {"url": str(tmp_path_factory.mktemp("trainings") / "store")}
        config = parse_config(tree)
        inputs = find_inputs(config)
        run = open_run(config, inputs)
        refs, anchors, _ = data.publish_splits.fn(run)
        parts = {part: {name: found[part] for name, found in refs.items()} for part in ("train", "weak")}
        return Place(run, inputs.splits, parts["train"], parts["weak"], anchors)

    return made


def test_an_expert_labels_weak_texts_that_have_no_labels(make: Make) -> None:
    place = make({"data": {"weak_source": "pseudo", "weak_rows": 3, "pseudo_pool": 2}}, subtasks=("irony",))
    texts = runtime.read_rows(place.run, place.weak["irony"])
    assert {row.gold for row in texts} == {""}, "nobody saw a label"
    expert = place.expert("irony")
    found = ref_of(weak.label_weak.fn(place.run, "irony", "weak", expert, place.weak["irony"]))
    assert place.manifest(found).inputs == (expert, place.weak["irony"])
    labelled = runtime.read_rows(place.run, found)
    assert (len(texts), len(labelled)) == (6, 3)
    assert {row.text for row in labelled} <= {row.text for row in texts}
    assert {row.gold for row in labelled} <= set(place.run.subtask("irony").labels)


# -------------------------------------------------------------------------------------------------- keys


@pytest.fixture
def keys_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[Place], dict[str, str]]:
    """Return the keys of all trainings of a run, without training."""

    def keys(place: Place) -> dict[str, str]:
        found: dict[str, str] = {}

        def planned(run: Run, plan: TrainingPlan, *, inputs: Any, config: Any = None, **_: Any) -> State[ArtifactRef]:
            config = config or training.describe(run, plan)
            key = cache_key(plan.kind, inputs=inputs, config=config, stage_version=STAGE_VERSION, seed=run.config.seed)
            found[plan.title] = key
            return Completed(data=ArtifactRef(kind=plan.kind, key=key, name=plan.title))

        monkeypatch.setattr(experts, "train_or_reuse", planned)
        warm = place.warm() if place.run.config.experts.warm_start else None
        for name in MEMBERS:
            place.expert(name, warm)
        place.joint()
        experts.train_weak.fn(place.run, place.weak)
        return found

    return keys


EXPERTS = {f"expert {name}" for name in MEMBERS}
EVERY = {"warm start", "joint LoRA", "weak LoRA"} | EXPERTS


@pytest.mark.parametrize(
    ("changed", "before", "after"),
    [
        (set(), {}, {"checkpoint_every": 7}),
        (set(), {}, {"validate_every": 7}),
        (EXPERTS, {}, {"anchor_weight": 0.7}),
        (EXPERTS, {}, {"anchor_every": 3}),
        (EXPERTS, {}, {"anchor_rows": 2}),
        (EXPERTS, {}, {"anchor_source": "corpus"}),
        (EXPERTS, {}, {"anchor_weight": 0}),
        (set(), {"anchor_weight": 0}, {"anchor_weight": 0, "anchor_every": 3, "anchor_rows": 2}),
        (EXPERTS, {"anchor_weight": 0}, {"anchor_weight": 0, "init": "osrm"}),
        (EVERY - {"joint LoRA", "weak LoRA"}, {}, {"warm_start": 0.3}),
        (EVERY - {"weak LoRA"}, {}, {"validation_rows": 2}),
        (EVERY - {"weak LoRA"}, {"validation_rows": 2}, {"validation_rows": 2, "validate_every": 7}),
        (
            {f"plain {name}" for name in EXPERTS} | {"warm start", "joint LoRA"} | EXPERTS,
            {"anchor_after": 0.5, "validation_rows": 2},
            {"anchor_after": 0.5, "validation_rows": 2, "validate_every": 7},
        ),
        (EVERY, {}, {"learning_rate": 1e-3}),
        (EVERY, {}, {"steps": 9}),
        (EVERY, {}, {"rslora": True}),
        (EXPERTS, {"anchor_after": 0.5}, {"anchor_after": 0.5, "anchor_weight": 0.7}),
    ],
)
def test_a_training_has_another_key_for_what_it_reads_alone(
    make: Make,
    keys_of: Callable[[Place], dict[str, str]],
    changed: set[str],
    before: dict[str, Any],
    after: dict[str, Any],
) -> None:
    first, second = (keys_of(make(**settings)) for settings in (before, after))
    assert first.keys() == second.keys()
    assert {name for name in first if first[name] != second[name]} == changed


def test_the_run_knows_the_key_of_its_warm_start_before_it_trains(make: Make) -> None:
    place = make()
    assert experts.warm_key(place.run, place.splits) == place.warm().key
    assert experts.warm_key(make(warm_start=0).run, place.splits) is None


def test_what_is_trained_with_is_part_of_the_runs_id(make: Make) -> None:
    run = make().run
    assert run.id == make().run.id
    others = {make(**changes).run.id for changes in ({"anchor_source": "corpus"}, {"warm_start": 0.25}, {"steps": 7})}
    assert len({run.id, *others}) == 4
    assert make(checkpoint_every=0).run.id == run.id


# ----------------------------------------------------------------------------------- what experts stand on


def test_an_expert_on_a_warm_start_is_a_delta_on_it(make: Make, tiny_base: Path, tmp_path: Path) -> None:
    """With peft: its folder `standalone` on the plain base is what its own delta on the warm start is here."""
    from peft import PeftModel

    place = make()
    warm = place.warm()
    expert = place.expert("irony", warm)
    manifest = place.manifest(expert)
    assert warm in manifest.inputs
    assert warm_start_of(place.run, expert) == warm
    assert (len(manifest.metrics["loss"]), len(place.manifest(warm).metrics["loss"])) == (3, 9)

    place.store.fetch(expert, tmp_path / "expert")
    whole = PeftModel.from_pretrained(plain_model(tiny_base), tmp_path / "expert" / training.STANDALONE).eval()
    with adapted_model(place.run, expert) as (backbone, _):
        ours = probe_logits(backbone.model)
    with folded(place.run, [expert]) as (backbone, _):
        alone = probe_logits(backbone.model)
    torch.testing.assert_close(probe_logits(whole), ours, atol=1e-4, rtol=1e-4)
    assert (ours - alone).abs().max() > 1e-3, "what it stands on matters"
    untouched = probe_logits(resident(place.run.model)[0].model)
    torch.testing.assert_close(untouched, probe_logits(plain_model(tiny_base)), atol=0, rtol=0)


def test_without_a_warm_start_an_expert_stands_on_the_base(make: Make) -> None:
    place = make(warm_start=0)
    expert = place.expert("irony")
    assert warm_start_of(place.run, expert) is None
    assert base_adapters_of(place.run, {"irony": expert}) == {}
    assert set(place.manifest(expert).blobs) == {adapter.WEIGHTS_FILE, adapter.CONFIG_FILE}


def test_experts_on_different_warm_starts_do_not_add_up(make: Make) -> None:
    place, other = make(), make(steps=8)
    refs = {"irony": place.expert("irony", place.warm())}
    manifest = other.manifest(other.expert("emotion", other.warm()))
    place.store.publish(
        "expert",
        manifest.key,
        name=manifest.name,
        files={},
        inputs=manifest.inputs,
        settings=StageSettings(manifest.config),
    )
    with pytest.raises(ModelError, match="have different warm starts"):
        base_adapters_of(place.run, refs | {"emotion": manifest.ref})


def test_rslora_is_written_with_its_own_scale(make: Make, tiny_base: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    place = make(warm_start=0, rslora=True, rank=8, alpha=8)
    expert = place.expert("irony")
    place.store.fetch(expert, tmp_path)
    theirs = PeftModel.from_pretrained(plain_model(tiny_base), tmp_path).eval()
    with adapted_model(place.run, expert) as (backbone, _):
        torch.testing.assert_close(probe_logits(theirs), probe_logits(backbone.model), atol=1e-4, rtol=1e-4)
    (scale,) = {pair.scale for pair in runtime.load_adapter(place.run, expert).values()}
    assert scale == pytest.approx(8**0.5)


def test_candidates_of_a_search_hold_the_warm_start_whatever_their_genes(make: Make) -> None:
    """A genome of one expert at 1 scores what its reference has; all genes zero is the warm start alone."""
    place = make({"evaluation": {"calibration": False}})
    warm = place.warm()
    trained = {name: place.expert(name, warm) for name in MEMBERS[:2]}
    measured = {name: place.reference(name, ref) for name, ref in trained.items()}
    refs = {
        name: ref_of(references.measure_reference.fn(place.run, name, ref, place.weak[name], place.train[name], None))
        for name, ref in trained.items()
    }
    weak = {name: place.weak[name] for name in trained}
    scorer = Scorer(TrainedArtifacts(experts=trained, weak=weak, references=refs).problem(place.run))
    spec = SearchSpec(
        name="pair",
        key="0" * 64,
        strategy="random",
        parts={name: {name: (1.0,)} for name in trained},
        subtasks=("irony",),
        seeds=(),
        evaluations=1,
        blocks=1,
        bounds=(0.0, 1.5),
        mask_seed=0,
    )
    own = scorer.evaluate(spec, (0.0, 1.0), ())
    assert own["values"]["irony"] == pytest.approx(1.0, abs=1e-4)
    assert set(measured["irony"]) == {"base", "expert", "constant"}
    assert measured["irony"]["constant"]["answer"] in place.run.subtask("irony").labels
    nothing = scorer.evaluate(spec, (0.0, 0.0), ())["values"]["irony"]
    scorer.close()
    with folded(place.run, [warm]) as (backbone, prompter):
        rows = runtime.read_rows(place.run, place.weak["irony"])
        probe = make_probe(place.run.config.evaluation, (backbone, prompter), place.run.subtask("irony"), rows)
        alone = probe.gold_logprob() - measured["irony"]["expert"]["loglik"]
    assert nothing == pytest.approx(float(torch.tensor(alone).exp()), rel=1e-4)


# --------------------------------------------------------------------------------------- after the fact


def test_an_expert_is_anchored_after_the_fact_from_its_plain_self(make: Make) -> None:
    place = make(warm_start=0, anchor_after=0.5, anchor_weight=1.0)
    expert = place.manifest(place.expert("sent2"))
    (plain,) = [place.manifest(ref) for ref in expert.inputs if ref.kind == "expert"]
    assert (plain.name, expert.name) == ("plain expert sent2", "expert sent2")
    assert plain.metrics["anchor"] == [None] * 3
    assert expert.metrics["loss"][0] == pytest.approx(0.0, abs=1e-4), "it starts at itself"
    assert [value is not None for value in expert.metrics["anchor"]] == [True, False, True]
    assert place.anchors not in plain.inputs
    stronger = make(warm_start=0, anchor_after=0.5, anchor_weight=2.0)
    assert stronger.manifest(stronger.expert("sent2")).key != expert.key
    assert {one.key for one in stronger.store.list("expert") if one.name.startswith("plain")} == {plain.key}


def test_results_tell_of_it_from_its_first_plain_step_on(make: Make) -> None:
    place = make(warm_start=0, anchor_after=0.5, anchor_weight=1.0, validation_rows=2, validate_every=2)
    expert = place.expert("sent2")
    trained = TrainedArtifacts(experts={"sent2": expert}, weak={}, references={})
    (section,) = sections.training_sections(place.run, trained)
    told = ExpertResult.model_validate(section)
    (plain,) = [place.manifest(ref) for ref in place.manifest(expert).inputs if ref.kind == "expert"]
    assert (told.steps, len(told.loss)) == (STEPS, STEPS)
    assert [value is not None for value in told.anchor] == [False] * 3 + [True, False, True]
    assert told.loss[:3] == tuple(plain.metrics["loss"])
    assert [point.step for point in told.validation] == [2, 3]
    assert told.best_step == plain.metrics["best_step"]
    assert told.seconds > plain.seconds > 0


# ---------------------------------------------------------------------------------------- checkpoints


class Killed(BaseException):
    """Stands for the end of the process."""


@pytest.fixture
def killed_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[Place, str, int], int]:
    """Train an expert until its n-th checkpoint is written, and stop there; return the step of that checkpoint."""

    def kill(place: Place, name: str, number: int) -> int:
        saved: list[int] = []
        save = Store.save_checkpoint

        def saving(self: Store, key: str, content: bytes) -> None:
            save(self, key, content)
            saved.append(checkpoint.decode(content)[0].step)
            if len(saved) == number:
                raise Killed

        with monkeypatch.context() as patched:
            patched.setattr(Store, "save_checkpoint", saving)
            with pytest.raises(Killed):
                place.expert(name)
        return saved[-1]

    return kill


def test_a_training_goes_on_from_its_checkpoint_bit_by_bit(
    make: Make, killed_at: Callable[..., int], caplog: pytest.LogCaptureFixture
) -> None:
    whole, broken = (make(warm_start=0, dropout=0.1, validation_rows=3, validate_every=2) for _ in range(2))
    assert killed_at(broken, "irony", 2) == 4
    resident(broken.run.model)  # as it was before: the same process would go on with it
    with caplog.at_level(logging.INFO, logger="memmcl.test"):
        again = broken.manifest(broken.expert("irony"))
    assert f"irony: goes on from step 4 of {STEPS}" in caplog.text
    once = whole.manifest(whole.expert("irony"))
    assert (again.key, again.blobs) == (once.key, once.blobs)
    same = ("loss", "anchor", "validation", "best_step", "steps")
    assert [again.metrics[name] for name in same] == [once.metrics[name] for name in same]
    assert broken.store.objects.sizes("checkpoints") == {}


def damaged(place: Place, key: str) -> None:
    path = f"checkpoints/{key}.bin"
    content = place.store.objects.read(path)
    assert content is not None
    place.store.objects.write(path, content[:-1] + bytes([content[-1] ^ 1]))


def of_another_version(place: Place, key: str) -> None:
    content = place.store.read_checkpoint(key)
    assert content is not None
    place.store.save_checkpoint(key, content.replace(b'\\"version\\": 1', b'\\"version\\": 9'))


def of_another_rank(place: Place, key: str) -> None:
    content = place.store.read_checkpoint(key)
    assert content is not None
    progressed, tensors = checkpoint.decode(content)
    place.store.save_checkpoint(key, checkpoint.encode(progressed, {name: t[:1] for name, t in tensors.items()}))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (damaged, "is damaged and counts as not written"),
        (of_another_version, "irony: trained anew: not a checkpoint of a training (another version)"),
        (of_another_rank, "irony: trained anew: the checkpoint does not fit this training"),
    ],
)
def test_a_checkpoint_that_cannot_be_used_is_left_behind(
    make: Make,
    killed_at: Callable[..., int],
    caplog: pytest.LogCaptureFixture,
    spoil: Callable[[Place, str], None],
    said: str,
) -> None:
    place, whole = make(warm_start=0), make(warm_start=0)
    killed_at(place, "irony", 1)
    (path,) = place.store.objects.sizes("checkpoints")
    spoil(place, Path(path).stem)
    with caplog.at_level(logging.WARNING):
        again = place.manifest(place.expert("irony"))
    assert said in caplog.text
    assert again.blobs == whole.manifest(whole.expert("irony")).blobs
    assert place.store.objects.sizes("checkpoints") == {}


def test_a_store_that_takes_no_checkpoint_stops_no_training(
    make: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from memmcl.errors import StoreFull

    def full(*_: object) -> None:
        raise StoreFull("no space left")

    monkeypatch.setattr(Store, "save_checkpoint", full)
    place = make(warm_start=0)
    with caplog.at_level(logging.WARNING, logger="memmcl.test"):
        assert place.manifest(place.expert("irony")).metrics["steps"] == STEPS
    assert "irony: no checkpoint at this step: no space left" in caplog.text


# ----------------------------------------------------------------------------------------------- rows


def test_validation_rows_are_the_last_and_not_trained_on(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    place = make(warm_start=0.5, validation_rows=3, validate_every=2, patience=1)
    seen: list[dict[str, Any]] = []
    train = training.train_adapter

    def watched(backbone: Any, data: Any, settings: Any, **more: Any) -> Any:
        seen.append({"rows": data.rows, "validation": data.validation, "stopping": settings.stopping})
        return train(backbone, data, settings, **more)

    monkeypatch.setattr(training, "train_adapter", watched)
    trained = place.manifest(place.expert("irony", place.warm()))
    joint, own = seen
    examples = runtime.read_rows(place.run, place.train["irony"])
    tokens = training.token_rows(resident(place.run.model)[1], place.run.subtask("irony"), examples)
    assert own["rows"] == {"irony": tokens[:-3]}
    assert own["validation"] == {"irony": tokens[-3:]}
    assert (own["stopping"].every, own["stopping"].patience) == (2, 1)
    assert joint["rows"]["irony"] == tokens[:-3]
    assert {name: len(rows) for name, rows in joint["validation"].items()} == dict.fromkeys(MEMBERS, 3)
    looks = dict(trained.metrics["validation"])
    assert trained.metrics["best_step"] == min(looks, key=lambda step: looks[step])
    experts.train_weak.fn(place.run, place.weak)
    assert seen[-1]["validation"] == {}
    assert {name: len(rows) for name, rows in seen[-1]["rows"].items()} == dict.fromkeys(MEMBERS, 8)


def test_rows_that_are_all_kept_for_validation_are_an_error(make: Make) -> None:
    place = make(validation_rows=12)
    said = "irony has 12 training rows, and experts.validation_rows keeps 12 of them; lower it, or raise data.train"
    with pytest.raises(TrainingError, match=said):
        place.expert("irony")
    with pytest.raises(TrainingError, match="emotion has 12 training rows"):
        place.warm()


def test_a_pinned_warm_start_is_taken_as_it_is(make: Make) -> None:
    place = make()
    pinned = place.store.publish("warm", "ab" * 32, name="warm start", files={"w": b"weights"}).ref
    run = place.run.model_copy(update={"pinned": Pinned(warm=pinned)})
    updates: list[Update] = []
    with watched_by(updates.append):
        state = experts.train_warm.fn(run, place.train)
    assert (ref_of(state), state.name) == (pinned, "Reused")
    assert updates == [Update("warm start", "warm", "reused")]
    assert experts.warm_key(run, place.splits) == pinned.key
    assert [one.ref for one in replace(place, run=run).store.list("warm")] == [pinned]
    place.store.objects.write(manifest_path("warm", pinned.key), b"{")
    with pytest.raises(CorruptArtifact, match=r"'warm start' .*, which an earlier run made, is damaged in file://"):
        experts.train_warm.fn(run, place.train)


def test_a_pinned_warm_start_that_is_damaged_is_trained_again_where_the_rows_are_the_same(make: Make) -> None:
    place = make()
    pinned = place.warm()
    whole = place.manifest(pinned).blobs
    run = place.run.model_copy(update={"pinned": Pinned(warm=pinned)})
    place.store.objects.write(manifest_path("warm", pinned.key), b"{")
    assert ref_of(experts.train_warm.fn(run, place.train)) == pinned
    assert place.manifest(pinned).blobs == whole
