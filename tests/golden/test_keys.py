"""The keys of every stage of two fixed configurations: a store of today must still be hit after any move of the code.

Nothing is computed: the store says of every key that it is asked for that its artifact is there, and what it was asked
for is compared. Whoever changes a key on purpose raises the stage's version, and pins the new keys here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from e2e_driver import ref_of, tiny_config
from prefect.logging import disable_run_logger
from tiny import corpus, random_factors

from memmcl.adapters.load import UserAdapter
from memmcl.api.searching import plan
from memmcl.backbone import resident
from memmcl.backbone.load import resolve_base
from memmcl.backbone.shapes import read_shapes
from memmcl.config import parse_config
from memmcl.store import ArtifactRef, Manifest, Store
from memmcl.suite.subtasks import get_subtask
from memmcl.suite.weak import WeakRows
from tasks.run import inputs
from tasks.run.runtime import Run
from tasks.stages.contexts import ContextualModel, gate_contexts
from tasks.stages.data import publish_splits
from tasks.stages.evaluate import evaluate_subtask, models_to_evaluate
from tasks.stages.experts import train_expert, train_joint, train_warm, train_weak
from tasks.stages.merge import STAGE_2, build_unified, read_search, search_groups, search_unified, winner_of
from tasks.stages.opening import open_run
from tasks.stages.references import measure_reference
from tasks.stages.report import export_full
from tasks.stages.run_artifacts import TrainedArtifacts
from tasks.stages.weak import label_weak

NAMES = ("sent2", "irony", "emotion")
DIGEST = "ba5e" * 16
GOLDEN = Path(__file__).with_name("keys.json")
ELSEWHERE = {
    "data": {"weak_source": "pseudo", "selection_rows": 4},
    "experts": {"warm_start": 0.0, "anchor_after": 0.5, "init": "osrm", "validation_rows": 3},
    "search": {
        "method": "ties",
        "genes": {"density": [0.1, 0.9]},
        "adapter_rank": 4,
        "rivals": ["tsv"],
        "blocks": 2,
        "joint_evaluations": 9,
        "strategy": "nsga2",
        "fitness": "metric",
        "mask": True,
        "rungs": [0.5],
    },
}
"""Settings far from the defaults of the tiny run."""


@pytest.fixture
def everything(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A store that has whatever is asked for; of its files, a search's document alone can be read."""
    made: dict[str, Manifest] = {}

    def find(self: Store, kind: str, key: str) -> Manifest:
        made[key] = Manifest(
            kind=kind,
            key=key,
            name=f"{kind} {len(made)}",
            blobs={},
            inputs=(),
            config={},
            config_digest="",
            seed=0,
            stage_version=1,
            code_version="",
            created="",
            seconds=0.0,
            metrics={},
        )
        return made[key]

    def load(self: Store, ref: ArtifactRef) -> Manifest:
        stands = [one.ref for one in made.values() if one.kind == "warm"] if ref.kind == "expert" else []
        return find(self, ref.kind, ref.key).model_copy(update={"inputs": tuple(stands)})

    def read(self: Store, artifact: ArtifactRef | Manifest, file: str) -> bytes:
        assert file == "search.json"
        document = {
            "coefficients": {name: [0.5] for name in NAMES},
            "recipe": {"method": "linear", "parameters": {}, "seed": 0},
            "fitness": 0.75,
            "finalists": [{"wins": True, "origin": "seed:uniform", "index": 3}],
        }
        return json.dumps(document).encode()

    monkeypatch.setattr(Store, "find", find)
    monkeypatch.setattr(Store, "load", load)
    monkeypatch.setattr(Store, "read", read)
    with disable_run_logger():
        yield


@pytest.fixture
def open_tiny(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Mapping[str, Any]], Run]:
    """Open the tiny run on a base whose name and digest are always the same."""
    found = resolve_base(str(tiny_base))
    monkeypatch.setattr(inputs, "resolve_base", lambda *_: replace(found, name="org/tiny", digest=DIGEST))
    monkeypatch.setattr(resident, "find_base", lambda *_: found)

    def opened(more: Mapping[str, Any]) -> Run:
        tree = tiny_config(Path("org/tiny"))
        tree["model"]["device"] = "cpu"
        tree["data"]["subtasks"] = list(NAMES)
        tree["store"] = {"url": "memory://golden"}
        for section, settings in more.items():
            tree.setdefault(section, {}).update(settings)
        return open_run(parse_config(tree))

    return opened


def keys(run: Run) -> dict[str, str]:
    """Return what a run asks the store for, stage by stage: `what` -> the first digits of its key."""
    splits, anchors, read = publish_splits.fn(run)
    train, weak, test = ({name: parts[part] for name, parts in splits.items()} for part in ("train", "weak", "test"))
    selection = {name: parts["selection"] for name, parts in splits.items() if "selection" in parts}
    cfg = run.config
    warm = ref_of(train_warm.fn(run, train)) if cfg.experts.warm_start else None
    experts = {name: ref_of(train_expert.fn(run, name, train[name], anchors, warm)) for name in NAMES}
    if cfg.data.weak_source == "pseudo":
        weak = {name: ref_of(label_weak.fn(run, name, "weak", experts[name], weak[name])) for name in NAMES}
        selection = {
            name: ref_of(label_weak.fn(run, name, "selection", experts[name], selection[name])) for name in NAMES
        }
    references = {
        name: ref_of(measure_reference.fn(run, name, experts[name], weak[name], train[name], selection.get(name)))
        for name in NAMES
    }
    trained = TrainedArtifacts(
        experts=experts,
        warm=warm,
        joint=ref_of(train_joint.fn(run, train)),
        weak_lora=ref_of(train_weak.fn(run, weak)),
        weak=weak,
        selection=selection,
        references=references,
    )
    stage1 = search_groups.fn(run, trained).data
    stage2 = search_unified.fn(run, stage1, trained).data
    unified = ref_of(build_unified.fn(run, stage2[STAGE_2], experts))
    winners = {name: winner_of(read_search(run, ref)) for name, ref in {**stage1, **stage2}.items()}
    model = ContextualModel(unified=unified, train=train, order=NAMES)
    gates = {name: ref_of(gate_contexts.fn(run, name, model, weak[name])) for name in NAMES}
    evaluations = {
        name: ref_of(
            evaluate_subtask.fn(
                run, name, models_to_evaluate(run, trained, winners, name), model, gates[name], weak[name], test[name]
            )
        )
        for name in NAMES
    }
    single = {
        "run": run.id,
        "rows": run.rows,
        "data": read,
        "anchors": anchors,
        "warm": warm,
        "joint": trained.joint,
        "weak lora": trained.weak_lora,
        "unified": unified,
        "model": ref_of(export_full.fn(run, unified)),
    }
    groups: dict[str, Mapping[str, ArtifactRef]] = {
        "train": train,
        "weak": weak,
        "test": test,
        "selection": selection,
        "expert": experts,
        "reference": references,
        "search": {**stage1, **stage2},
        "gate": gates,
        "evaluation": evaluations,
    }
    several = {f"{group} {name}": ref for group, refs in groups.items() for name, ref in refs.items()}
    found = {**single, **several}
    return {what: one[:12] if isinstance(one, str) else one.key[:12] for what, one in found.items() if one is not None}


@pytest.mark.usefixtures("everything")
@pytest.mark.parametrize("which", ["tiny", "elsewhere"])
def test_every_stage_asks_for_the_keys_of_before(which: str, open_tiny: Callable[[Mapping[str, Any]], Run]) -> None:
    golden = json.loads(GOLDEN.read_text())
    found = keys(open_tiny({"tiny": {}, "elsewhere": ELSEWHERE}[which]))
    assert found == golden[which], json.dumps(found, indent=1)


def brought_keys(base: Path, folder: Path) -> dict[str, str]:
    """Return what a search on adapters and rows of a user's asks the store for."""
    config = parse_config(
        {
            "model": {"name_or_path": "org/tiny", "dtype": "float32", "device": "cpu"},
            "search": {"population": 4},
            "store": {"url": str(folder)},
        }
    )
    shapes, adapters = read_shapes(str(base)), []
    for seed, name in enumerate(("sent2", "other")):
        files = {"adapter_config.json": b"{}", "adapter_model.safetensors": name.encode()}
        adapters.append(UserAdapter(name, name, files, random_factors(base, layers=(2, 3), seed=seed), None))
    rows = [
        WeakRows(name, get_subtask(name), "sent2" if name == "sent2" else None, tuple(corpus(name, 6)))
        for name in ("sent2", "irony")
    ]
    weights = replace(resolve_base(str(base)), name="org/tiny", digest=DIGEST)
    store = Store.open(config.store.url)
    found = plan(config, store, weights, shapes, adapters, rows, 11)
    problem = found.problem
    groups = {"expert": problem.experts, "weak": problem.weak, "reference": problem.references}
    refs = {f"{group} {name}": ref.key for group, refs in groups.items() for name, ref in refs.items()}
    return {what: key[:12] for what, key in {**refs, "first": found.spec.key, "search": found.plan.key}.items()}


@pytest.mark.usefixtures("everything")
def test_a_search_on_what_a_user_brings_asks_for_the_keys_of_before(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resident, "find_base", lambda *_: resolve_base(str(tiny_base)))
    found = brought_keys(tiny_base, tmp_path)
    assert found == json.loads(GOLDEN.read_text())["brought"], json.dumps(found, indent=1)
