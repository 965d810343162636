"""A store that an older memmcl wrote: its run is found finished, read, predicted with and retrained from.

older_store.tar.xz holds run.yaml and the store that `memmcl run run.yaml --set ray.workers=1` made of it at e846996,
before the code was moved into the packages of today. Its base, the folder `base`, was the tiny one of these tests.
"""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest
from e2e_driver import frozen, ref_of
from prefect.logging import disable_run_logger
from prefect.states import State

import memmcl
from memmcl.config import RunConfig, load_config
from memmcl.errors import DataError
from memmcl.store import ArtifactRef, Store
from tasks.stages.data import publish_splits
from tasks.stages.experts import train_expert, train_warm
from tasks.stages.merge import search_groups
from tasks.stages.opening import open_run
from tasks.stages.references import measure_reference
from tasks.stages.run_artifacts import TrainedArtifacts

OLDER = Path(__file__).with_name("older_store.tar.xz")
STORE = "memmcl-store"
RUN_ID = "263e62f4a45c890294d261277e196a48a1186f3e6b89160522d40f275b6a7af7"
NAMES = ("sent2", "irony", "uabsa")
SECRET = "https://me:hunter2@host/rows"
ONE_WORKER = "ray.workers=1"
"""As it was run."""


@pytest.fixture
def older(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """The older store, in the working directory."""
    with tarfile.open(OLDER) as archive:
        archive.extractall(tmp_path, filter="data")
    (tmp_path / "base").symlink_to(tiny_base)
    monkeypatch.chdir(tmp_path)
    return Store.open(STORE)


def settings(*overrides: str) -> RunConfig:
    return load_config(Path("run.yaml"), [ONE_WORKER, *overrides])


def test_it_is_whole(older: Store) -> None:
    checked = older.verify()
    assert list(checked.problems) == []
    assert checked.manifests == len(older.list()) == 34


def test_its_run_is_the_one_that_the_same_configuration_asks_for(older: Store) -> None:
    run = open_run(settings())
    assert run.base.digest == memmcl.open_run(STORE).base.digest, "the tiny base is another one: write the store anew"
    assert run.id == RUN_ID
    assert older.find("run", run.id) is not None


def test_its_results_are_read(older: Store) -> None:
    run = memmcl.open_run(STORE)
    assert (run.id, run.name, set(run.order)) == (RUN_ID, "old", set(NAMES))
    assert {mean.model: round(mean.mean, 3) for mean in run.results.means} == {
        "constant": 0.536,
        **dict.fromkeys(("base", "experts", "uniform", "sum", "arithmetic", "unified", "unified+context"), 0.417),
    }
    assert run.predictions.num_rows == 4 * len(NAMES)
    assert set(run.candidates["search"].to_pylist()) == {"SC", "ABSA", "MAST", "unified", "task arithmetic"}
    assert RUN_ID in run.report
    written = {path.name for path in run.save("out")}
    assert {"report.html", "adapter_model.safetensors", "adapter_config.json"} <= written


def test_its_model_answers_as_it_did(older: Store) -> None:
    found = memmcl.load_model(STORE).predict(["The food was great."], subtasks=["sent2", "irony"])
    answers = [(one.subtask, one.label, round(one.probability or 0, 2)) for one in found]
    assert answers == [("sent2", "positive", 0.70), ("irony", "non_irony", 0.99)]
    memmcl.open_run(STORE).save("out")
    assert memmcl.load_model("out").predict(["The food was great."], subtasks=["sent2", "irony"]) == found
    file = Path("out") / "sentiment_model.json"
    unknown = json.loads(file.read_text())
    unknown["prompts"]["toxicity"] = unknown["prompts"]["sent2"]
    file.write_text(json.dumps(unknown))
    with pytest.raises(DataError, match="its settings have not: 'toxicity'"):
        memmcl.load_model("out")
    file.write_text('{"version": 2}')
    with pytest.raises(DataError, match="does not describe an exported model"):
        memmcl.load_model("out")


def test_a_secret_that_an_older_run_stored_is_not_saved_with_its_model(older: Store) -> None:
    run = memmcl.open_run(STORE)
    config = {**run.results.run.config, "data": {**run.config.data.model_dump(mode="json"), "source": SECRET}}
    info = run.results.run.model_copy(update={"config": config})
    run.__dict__["results"] = run.results.model_copy(update={"run": info})
    run.save("out")
    assert "hunter2" not in (Path("out") / "sentiment_model.json").read_text()
    assert run.model_file.config["data"]["source"].endswith("@host/rows")


def test_another_run_takes_all_from_it_that_is_the_same(older: Store) -> None:
    """A longer search of the unified model: splits, trainings, references and stage 1 are those of the older run."""
    before = frozen(Path(STORE))
    run = open_run(settings("search.stage2_evaluations=6"))
    assert run.id != RUN_ID

    def reused(state: State[ArtifactRef]) -> ArtifactRef:
        assert state.name == "Reused", state
        return ref_of(state)

    with disable_run_logger():
        splits, anchors, _ = publish_splits.fn(run)
        train, weak = ({name: parts[part] for name, parts in splits.items()} for part in ("train", "weak"))
        warm = reused(train_warm.fn(run, train))
        experts = {name: reused(train_expert.fn(run, name, train[name], anchors, warm)) for name in NAMES}
        references = {
            name: reused(measure_reference.fn(run, name, experts[name], weak[name], train[name], None))
            for name in NAMES
        }
        trained = TrainedArtifacts(experts=experts, weak=weak, references=references)
        assert search_groups.fn(run, trained).name == "Reused"
    assert frozen(Path(STORE)) == before, "nothing was made"
