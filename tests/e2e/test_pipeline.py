"""The whole DAG through the command line on a tiny Llama: on a directory, and on a real S3 server."""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from e2e_driver import (
    LAMBDAS,
    LOOPBACK,
    ONE_WORKER,
    PLANTED,
    STAGE_EVALUATIONS,
    SUBTASKS,
    Desk,
    Ended,
    desk,
    frozen,
    manifest,
    one_line,
    planted,
    read_json,
    runs_of,
    settings,
    states,
    traces,
)
from servers import S3Server
from tiny import plain_model, probe_logits

from memmcl.adapters import format as adapter
from memmcl.store import Manifest, Store

pytestmark = pytest.mark.timeout(1800)
MODELS = ("base", "constant", "experts", "uniform", "sum", "arithmetic", "unified", "unified+context", "weak", "joint")
FIXED = ("split", "anchors", "warm", "expert", "reference", "unified", "gate")
"""Kinds whose files hold no times: the same run makes the same bytes."""


# ---------------------------------------------------------------------------------------- on a directory


def test_run_prints_the_table_and_where_to_look(reference: Desk) -> None:
    out = (reference.root / "out.txt").read_text()
    (done,) = reference.store.list("run")
    for model in MODELS:
        assert re.search(rf"^{re.escape(model)} .*\d", out, re.MULTILINE), f"no row {model} in {out}"
    assert f"run {done.key[:8]}" in out
    assert "memmcl ui" in out
    assert done.metrics["flow_run_id"] in out
    assert "Traceback" not in out + (reference.root / "err.txt").read_text()
    directory = reference.cwd / "memmcl-runs" / done.key[:8]
    assert (directory / "report.html").is_file()
    assert (directory / "adapter" / "adapter_model.safetensors").is_file()


def test_a_secret_in_an_argument_is_nowhere(reference: Desk) -> None:
    """Not in store, report, history or terminal; Ray's own folder records the command line as it was."""
    report = reference.store.read(reference.store.list("run")[0], "report.html").decode()
    assert "X-Amz-Signature=***" in report, "the command was recorded"
    looked = [path for path in reference.root.rglob("*") if path.is_file()]
    assert {"out.txt", "err.txt", "prefect.db", "report.html"} <= {path.name for path in looked}
    assert [path for path in looked if PLANTED.encode() in path.read_bytes()] == []


def test_every_stage_is_published_with_its_lineage(reference: Desk) -> None:
    store = reference.store
    found = {(one.kind, one.key): one for one in store.list()}
    kinds = Counter(kind for kind, _ in found)
    six = len(SUBTASKS)
    parts = Counter(one.name.split()[-1] for one in store.list("split"))
    assert {"train", "weak", "test"} <= set(parts)
    assert set(parts.values()) == {six}
    assert kinds == {
        "split": six * len(parts),
        "anchors": 1,
        "data": 1,
        "warm": 1,
        "expert": six + 2,
        "reference": six,
        "search": 5,
        "unified": 1,
        "gate": six,
        "evaluation": six,
        "run": 1,
    }
    for one in found.values():
        for ref in one.inputs:
            assert (ref.kind, ref.key) in found, f"{one.ref} was made from {ref}, which is not there"
    reached: set[tuple[str, str]] = set()
    ahead = [(done.kind, done.key) for done in store.list("run")]
    while ahead:
        reached.add(ahead[-1])
        ahead += [(ref.kind, ref.key) for ref in found[ahead.pop()].inputs if (ref.kind, ref.key) not in reached]
    assert reached == set(found), "the run's lineage leads to everything that was made"


def test_searches_used_their_budgets(reference: Desk) -> None:
    store = reference.store
    budgets = dict.fromkeys(("SC", "ABSA", "MAST", "unified"), STAGE_EVALUATIONS)
    seen = {}
    for search in store.list("search"):
        document = read_json(store, search, "search.json")
        seen[document["spec"]["name"]] = len(document["candidates"])
        whole = [entry for entry in document["candidates"] if not entry["stopped"]]
        best = max(entry["fitness"] for entry in whole if entry["fitness"] is not None)
        (winner,) = [one for one in document["finalists"] if one["wins"]]
        assert winner["fitness"] == max(one["fitness"] for one in document["finalists"]) == search.metrics["fitness"]
        if document["winner"] is None:
            assert winner["search"] == "task arithmetic", "the one that competes with the unified search"
            assert winner["fitness"] >= best
        else:
            assert document["candidates"][document["winner"]]["fitness"] == best == winner["fitness"]
        table = pq.read_table(io.BytesIO(store.read(search, "candidates.parquet"))).to_pylist()
        assert [row["fitness"] for row in table] == [entry["fitness"] for entry in document["candidates"]]
        told = store.records(f"searches/{document['spec']['key']}")
        for entry in document["candidates"]:
            if "reused_from" not in entry:
                assert told[entry["index"]]["genome"] == entry["genome"]
    arithmetic = seen.pop("task arithmetic")
    assert seen == budgets
    assert arithmetic == len(LAMBDAS) + 1, "the grid, and the uniform average"


def test_adapter_is_the_merge_that_was_searched(reference: Desk, tiny_base: Path) -> None:
    """peft on the tiny base gives what the warm start and the sum of coefficient x B A over all experts give."""
    from peft import PeftModel

    store = reference.store
    (done,) = store.list("run")
    directory = reference.cwd / "memmcl-runs" / done.key[:8] / "adapter"
    merged = probe_logits(PeftModel.from_pretrained(plain_model(tiny_base), directory).eval())
    coefficients = read_json(store, manifest(store, "search", "search unified"), "search.json")["coefficients"]
    oracle = plain_model(tiny_base)
    added = {f"expert {name}": coefficient for name, (coefficient,) in coefficients.items()}
    for name in added:
        _add(oracle, store, manifest(store, "expert", name), added[name])
    without = probe_logits(oracle)
    _add(oracle, store, manifest(store, "warm", "warm start"), 1.0)
    assert set(coefficients) == set(SUBTASKS)
    torch.testing.assert_close(merged, probe_logits(oracle), atol=1e-4, rtol=1e-4)
    for other in (without, probe_logits(plain_model(tiny_base))):
        assert (merged - other).abs().max() > 0.01, "neither the base, nor without what the experts stand on"


def test_an_expert_stands_alone_too(reference: Desk, tiny_base: Path, tmp_path: Path) -> None:
    """Fetched, its own files are a delta on the warm start; those in `standalone` are one adapter on the plain base."""
    from peft import PeftModel

    store = reference.store
    expert = manifest(store, "expert", "expert irony")
    fetched = reference.run("store", "fetch", expert.key[:12], tmp_path / "expert")
    assert fetched.code == 0, fetched
    whole = probe_logits(PeftModel.from_pretrained(plain_model(tiny_base), tmp_path / "expert" / "standalone").eval())
    oracle = plain_model(tiny_base)
    for part in (expert, manifest(store, "warm", "warm start")):
        _add(oracle, store, part, 1.0)
    torch.testing.assert_close(whole, probe_logits(oracle), atol=1e-4, rtol=1e-4)


def test_what_experts_stand_on_is_no_gene(reference: Desk) -> None:
    store = reference.store
    warm = manifest(store, "warm", "warm start")
    for name in SUBTASKS:
        assert warm.ref in manifest(store, "expert", f"expert {name}").inputs
    for name in ("joint LoRA", "weak LoRA"):
        assert warm.ref not in manifest(store, "expert", name).inputs
    assert manifest(store, "unified", "unified model").metrics["warm_start"] == warm.key
    results = read_json(store, store.list("run")[0], "results.json")
    assert set(results["merge"]["experts"]) == set(SUBTASKS)
    assert warm.key[:12] in " ".join(results["notes"])
    trainings = {entry["subtask"]: entry for entry in results["experts"]}
    assert list(trainings) == ["warm", *sorted(SUBTASKS), "joint", "weak"]
    assert {name: entry["steps"] for name, entry in trainings.items()} == {
        "warm": 24,
        **dict.fromkeys(SUBTASKS, 4),
        "joint": 48,
        "weak": 48,
    }
    for name in SUBTASKS:
        assert [value is not None for value in trainings[name]["anchor"]] == [True, False, True, False], "every other"
    assert not any(trainings[name]["anchor"] for name in ("warm", "joint", "weak"))


def test_interference_is_measured_on_the_first_rows(reference: Desk) -> None:
    results = read_json(reference.store, reference.store.list("run")[0], "results.json")
    found = {(entry["expert"], entry["subtask"]): entry for entry in results["interference"]}
    assert found.keys() == {(expert, name) for expert in ("base", *SUBTASKS) for name in SUBTASKS}
    assert {entry["n"] for entry in found.values()} == {4}
    assert len({round(entry["score"], 6) for entry in found.values()}) > 3, "models differ"
    kept = {(entry["model"], entry["subtask"]) for entry in results["retention"]}
    assert kept == {(model, name) for model in ("sum", "unified") for name in SUBTASKS}
    compared = {(pair["a"], pair["b"]) for pair in results["comparisons"]}
    assert {("unified", "sum"), ("unified", "weak"), ("unified", "joint")} <= compared


def test_task_vectors_are_those_of_the_experts_alone(reference: Desk) -> None:
    store = reference.store
    found = read_json(store, store.list("run")[0], "results.json")["task_vectors"]
    assert found["experts"] == sorted(SUBTASKS), "what they stand on is none of them"
    irony = manifest(store, "expert", "expert irony")
    files = (store.read(irony, name) for name in (adapter.WEIGHTS_FILE, adapter.CONFIG_FILE))
    factors = adapter.from_files(*files)
    layers = sorted({int(module.split(".")[2]) for module in factors})
    assert [part["layer"] for part in found["layers"]] == layers
    squares = dict.fromkeys((*layers, None), 0.0)
    for module, pair in factors.items():
        for layer in (int(module.split(".")[2]), None):
            squares[layer] += float((pair.scale * pair.b.double() @ pair.a.double()).square().sum())
    for part in (*found["layers"], found["overall"]):
        norm = part["norms"][found["experts"].index("irony")]
        assert norm == pytest.approx(squares[part["layer"]] ** 0.5, rel=1e-6)
        assert 0 < part["conflict"] < 1


def test_report_is_one_file_that_works_offline(reference: Desk) -> None:
    (done,) = reference.store.list("run")
    page = (reference.cwd / "memmcl-runs" / done.key[:8] / "report.html").read_text()

    class Links(HTMLParser):
        remote: list[str] = []  # noqa: RUF012

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            loads = {"script": "src", "img": "src", "link": "href", "iframe": "src", "source": "src"}.get(tag)
            self.remote += [value or "" for name, value in attrs if name == loads and "data:" not in (value or "")]

    Links().feed(page)
    assert Links.remote == []
    assert page.count("<svg") + page.count("data:image/") >= 3
    for model in MODELS:
        assert model in page
    results = read_json(reference.store, done, "results.json")
    assert [entry["name"] for entry in results["subtasks"]]
    assert done.key in page


def test_the_same_command_again_starts_nothing(reference: Desk) -> None:
    before = frozen(reference.cwd / "memmcl-store")
    history = _files(reference.history.parent)
    sessions = sorted(path.name for path in (reference.ray_folder).rglob("session_*"))
    ended = reference.run("run", reference.config)
    assert ended.code == 0, ended
    assert "finished; from the store" in ended.out
    assert re.search(r"^unified .*\d", ended.out, re.MULTILINE)
    assert frozen(reference.cwd / "memmcl-store") == before, "nothing was published again"
    assert _files(reference.history.parent) == history, "no server wrote to the history"
    assert sorted(path.name for path in (reference.ray_folder).rglob("session_*")) == sessions, "no Ray"


def test_the_history_holds_one_finished_run(reference: Desk) -> None:
    assert Counter(runs_of(reference.history)) == {
        (name, "Completed"): 1 for name in ("tiny", "experts", "merge", "evaluation")
    }
    (done,) = reference.store.list("run")
    names = [name for name, _ in states(reference.history, "flow_run")]
    assert f"tiny: 6 subtasks of embedded, seed 0, run {done.key[:8]}" in names
    tasks = states(reference.history, "task_run")
    assert {state for _, state in tasks} == {"Completed"}
    assert {f"expert {name}" for name in SUBTASKS} <= {name for name, _ in tasks}


def test_no_other_machine_can_reach_anything_of_a_run(reference: Desk) -> None:
    sockets = [line.rsplit(maxsplit=1) for line in (reference.root / "sockets.txt").read_text().splitlines()]
    assert {"raylet", "gcs_server"} <= {name for name, _ in sockets}
    assert [(name, address) for name, address in sockets if address not in LOOPBACK] == []


def test_no_secret_of_the_environment_is_in_anything_a_run_wrote(reference: Desk) -> None:
    """Everything: what it printed, store and report, its home, temporary files, Prefect's and Ray's folders."""
    assert list((reference.root / "kept").glob("*-runtime_env_agent.log"))
    assert reference.history.exists()
    assert traces(planted(), reference.root, reference.ray_folder) == []
    assert not (reference.root / "home" / ".ray").exists(), "nor a token of Ray's own"


def test_store_commands(reference: Desk, tmp_path: Path) -> None:
    store = reference.store
    verified = reference.run("store", "verify")
    assert verified.code == 0, verified
    assert f"{len(store.list())} artifacts" in verified.out
    assert "0 problems" in verified.out

    listed = reference.run("store", "ls", "expert")
    assert listed.code == 0, listed
    for one in store.list("expert"):
        assert one.key[:12] in listed.out
    assert "unified" not in listed.out

    unified = manifest(store, "unified", "unified model")
    shown = reference.run("store", "show", unified.key[:12])
    assert json.loads(shown.out) == json.loads(unified.model_dump_json())

    fetched = reference.run("store", "fetch", unified.key[:12], tmp_path / "fetched")
    assert fetched.code == 0, fetched
    for file, info in unified.blobs.items():
        assert hashlib.sha256((tmp_path / "fetched" / file).read_bytes()).hexdigest() == info.sha256

    unknown = reference.run("store", "show", "ffffffffffff0")
    assert unknown.code == 2
    assert one_line(unknown)


def test_report_shows_the_latest_run(reference: Desk, tmp_path: Path) -> None:
    ended = reference.run("report", "--out", tmp_path / "copy")
    assert ended.code == 0, ended
    for model in MODELS:
        assert re.search(rf"^{re.escape(model)} .*\d", ended.out, re.MULTILINE)
    (done,) = reference.store.list("run")
    assert (tmp_path / "copy" / "report.html").read_bytes() == reference.store.read(done, "report.html")
    assert (tmp_path / "copy" / "adapter" / "README.md").is_file()


def test_predict_answers_every_subtask(reference: Desk) -> None:
    asked = reference.run("predict", "The food was great, the wait was not.", "--aspect", "food", "--aspect", "wait")
    assert asked.code == 0, asked
    rows = [line.split() for line in asked.out.splitlines()[1:] if line.strip()]
    assert len(rows) >= len(SUBTASKS) + 1, "one line a subtask, and one an aspect"
    about = [line for line in asked.out.splitlines() if line.lstrip().startswith("Aspect polarity")]
    assert len(about) == 2
    for aspect, line in zip(("food", "wait"), about, strict=True):
        assert aspect in line
        assert re.search(r"positive|negative|neutral", line)
        assert 1 / 3 - 0.01 <= float(line.split()[-1]) <= 1, "the best of three labels, as a share"


# --------------------------------------------------------------------------------------- on an S3 server


@pytest.fixture(scope="module")
def bucket(s3: S3Server) -> list[str]:
    """The options that put a store into the S3 server's bucket."""
    place = {"url": f"s3://{s3.bucket}/runs", "endpoint_url": s3.endpoint_url, "region": "us-east-1"}
    return [*settings(*(f"store.{name}={value}" for name, value in place.items()))]


@pytest.fixture(scope="module")
def remote(
    tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, s3: S3Server, prefect_api: str, bucket: list[str]
) -> Iterator[tuple[Desk, Ended]]:
    """A run on the S3 server and on a Prefect server that was there before; one worker instead of two."""
    root = tmp_path_factory.mktemp("remote")
    with desk(root, tiny_base, server=prefect_api, environment=s3.environment) as place:
        yield place, place.watch("run", place.config, *ONE_WORKER, *bucket)


@pytest.fixture(scope="module")
def remote_store(s3: S3Server, remote: tuple[Desk, Ended]) -> Store:
    """The store in the bucket, after the run."""
    assert remote[1].code == 0, remote[1]
    return Store.open(f"s3://{s3.bucket}/runs", endpoint_url=s3.endpoint_url, region="us-east-1")


@pytest.mark.campaign
def test_on_s3_every_artifact_lies_in_the_bucket(
    reference: Desk, remote: tuple[Desk, Ended], remote_store: Store
) -> None:
    there, here = ({(one.kind, one.key) for one in store.list()} for store in (remote_store, reference.store))
    assert there == here, "the same run, under the same keys"
    verification = remote_store.verify()
    assert list(verification.problems) == []
    assert verification.manifests == len(there)


@pytest.mark.campaign
def test_on_s3_the_results_are_those_of_the_directory(reference: Desk, remote_store: Store) -> None:
    """Another store, another number of workers: the same bytes."""
    for kind in FIXED:
        here = {one.key: one.blobs for one in reference.store.list(kind)}
        assert {one.key: one.blobs for one in remote_store.list(kind)} == here, kind
    for here_search in reference.store.list("search"):
        (there_search,) = [one for one in remote_store.list("search") if one.key == here_search.key]
        assert _untimed(reference.store, here_search) == _untimed(remote_store, there_search)
    tables = [
        read_json(store, store.list("run")[0], "results.json")["scores"] for store in (reference.store, remote_store)
    ]
    assert tables[0] == tables[1]


@torch.no_grad()
def _add(model: torch.nn.Module, store: Store, trained: Manifest, coefficient: float) -> None:
    """Add a trained adapter's task vectors to the model's weights."""
    modules = dict(model.named_modules())
    files = (store.read(trained, name) for name in (adapter.WEIGHTS_FILE, adapter.CONFIG_FILE))
    for module, factors in adapter.from_files(*files).items():
        modules[module].weight += coefficient * factors.scale * (factors.b @ factors.a)


def _untimed(store: Store, search: Any) -> dict[str, Any]:
    document = read_json(store, search, "search.json")
    for candidate in document["candidates"]:
        del candidate["seconds"]
    return dict(document)


def _files(directory: Path) -> dict[str, tuple[int, int]]:
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in paths}
