"""A person's way through the Prefect UI in a real browser: form, refusal, run, DAG, tables, logs."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from browser import MISSING, Browser, installed, open_browser, until
from e2e_driver import COMMAND, SUBTASKS, Desk, Running, desk, tiny_config
from processes import answers, free_ports, tail
from pydantic import BaseModel

from memmcl.config import RunConfig
from memmcl.report import Results, verdict
from memmcl.store import Store

pytestmark = [pytest.mark.campaign, pytest.mark.timeout(1800), pytest.mark.skipif(not installed(), reason=MISSING)]
DEPLOYMENTS = Path(__file__).parents[2] / "deployments" / "prefect.yaml"
RUN_SECONDS = 600.0
STEPS = "Optimiser steps per expert, its share of the warm start included"
GRAPH = ".run-graph__stage canvas"
STATE = ".state-badge"
"""Of these badges, the first on the page of a run shows its own state."""
ENDED = ("Completed", "Failed", "Crashed", "Cancelled")


@dataclass(frozen=True)
class Ui:
    """A Prefect server with our deployments, a worker that runs them, and a browser window on it."""

    window: Browser
    api: httpx.Client
    place: Desk
    worker: Running
    store: str

    def ask(self, what: str, **query: Any) -> Any:
        """Return what the API answers."""
        return self.api.post(what, json=query).raise_for_status().json()

    def count_runs(self) -> int:
        """Return how many flow runs of the pipeline there are; the schedule of the retrain makes others."""
        return int(self.ask("/flow_runs/count", flows={"name": {"any_": ["pipeline"]}}))

    def open_form(self) -> None:
        """Go to the form by which a person runs the pipeline with other settings."""
        self.window.open("/deployments")
        self.window.follow("pipeline", "/deployments/deployment/")
        self.window.click("Run")
        self.window.click("Custom run")
        self.window.wait_for(STEPS, "Submit")

    def submit(self, steps: str, answered: Callable[[], bool]) -> None:
        """Fill in the form and submit it, until it is answered.

        The server refuses (503) what it cannot write because its SQLite database is locked; the page then asks to try
        again.
        """
        for _ in range(3):
            self.open_form()
            self.window.fill(STEPS, steps)
            self.window.click("Submit")
            until(lambda: answered() or "Something went wrong" in self.window.text, self.window.describe)
            if answered():
                return
        raise AssertionError(self.window.describe())

    def results(self) -> Results:
        """Return the results of the only run in the store."""
        store = Store.open(self.store)
        (done,) = store.list("run")
        return Results.model_validate_json(store.read(done, "results.json"))

    def open_artifact(self, page: str, begins: str) -> str:
        """Go from the page of a run to one of its artifacts; return the text of that."""
        self.window.open(page)
        self.window.click("Artifacts")
        self.window.follow(begins, "/artifacts/")
        return self.window.wait_for("Show raw data")


@pytest.fixture(scope="module")
def ui(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Iterator[Ui]:
    """Server, deployments, worker and browser, as the documentation has a person start them."""
    root = tmp_path_factory.mktemp("demo", numbered=False)
    base, store = root / "tiny-llama", root / "store"
    shutil.copytree(tiny_base, base)
    (root / "screenshots").mkdir()
    port = free_ports(1)[0]
    site = f"http://127.0.0.1:{port}"
    environment = {
        "DO_NOT_TRACK": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_WORKER_QUERY_SECONDS": "1",
    }
    prefect = COMMAND.with_name("prefect")
    with ExitStack() as stack:
        # Its pages ask the API that PREFECT_API_URL names, which the desk sets, not the one they came from.
        place = stack.enter_context(desk(root / "desk", base, server=f"{site}/api", environment=environment))
        serve = ("server", "start", "--host", "127.0.0.1", "--port", str(port))
        server = stack.enter_context(place.started(*serve, program=prefect))
        server.wait_until(lambda: answers(f"{site}/api/health"), "the server answered")
        place.config.write_text(yaml.safe_dump({**tiny_config(base), "store": {"url": str(store)}}))
        deployed = place.run("deploy", "--config", place.config, "--file", DEPLOYMENTS)
        assert deployed.code == 0, deployed
        start = ("worker", "start", "--pool", "memmcl", "--type", "process", "--limit", "1")
        worker = stack.enter_context(place.started(*start, program=prefect))
        window = stack.enter_context(open_browser(site, root / "screenshots"))
        client = stack.enter_context(httpx.Client(base_url=f"{site}/api", timeout=60))
        yield Ui(window, client, place, worker, str(store))


@pytest.fixture(scope="module")
def run_page(ui: Ui) -> str:
    """The page of a run with 3 steps an expert, started with the form and looked at until it was Completed.

    Between two looks the window is empty: without a GPU a page that draws its DAG anew all the time takes a whole core,
    which the run needs.
    """
    window = ui.window
    ui.submit("3", lambda: "/run?" not in window.address)
    window.follow("", "/runs/flow-run/")  # the only link to a run, whether in the message or in the list
    until(lambda: window.address.startswith("/runs/flow-run/"), lambda: f"the run's page, not {window.address}")
    page = window.address.partition("?")[0]
    until(lambda: _state(window) in {"Scheduled", "Late", "Pending", "Running"}, lambda: _said(ui))
    window.leave()
    ended = {"flow_runs": {"id": {"any_": [_id(page)]}, "state": {"name": {"any_": ENDED}}}}
    merging = {"flow_runs": {"name": {"any_": ["merge"]}, "state": {"type": {"any_": ["RUNNING"]}}}}
    until(
        lambda: ui.ask("/flow_runs/filter", **merging) or ui.ask("/flow_runs/filter", **ended),
        lambda: _said(ui),
        RUN_SECONDS,
    )
    window.open(page)
    window.click("Subflow Runs")
    window.wait_for("experts", "merge")
    until(lambda: window.has_drawn(GRAPH, STATE), lambda: "the DAG of a run in progress")
    window.shoot("dag-running")
    window.leave()
    until(lambda: ui.ask("/flow_runs/filter", **ended), lambda: _said(ui), RUN_SECONDS)
    window.open(page)
    until(lambda: _state(window) in ENDED, lambda: _said(ui))
    assert _state(window) == "Completed", _said(ui)
    return page


def test_the_form_explains_every_setting_and_holds_the_values_that_were_deployed(ui: Ui) -> None:
    ui.open_form()
    shown = ui.window.text
    ui.window.shoot("form")
    missing = [text for text in _descriptions(RunConfig) if text not in shown]
    assert not missing
    deployed = tiny_config(Path(ui.store).with_name("tiny-llama"))
    for text, value in {
        STEPS: deployed["experts"]["steps"],
        "Peak learning rate of AdamW": deployed["experts"]["learning_rate"],
        "Adapted layers: all, or top-N; those below are computed once": deployed["experts"]["adapt_layers"],
        "Training rows a subtask, at most": deployed["data"]["train_rows"],
        "Directory, file:// or s3:// URL of the store": f"file://{ui.store}",
    }.items():
        assert ui.window.field(text).get_attribute("value") == str(value)


def test_a_bad_value_is_refused_with_the_reason_and_nothing_is_started(ui: Ui) -> None:
    before = ui.count_runs()
    reason = "'config.experts.steps'. Failure reason: 0 is less than the minimum of 1"
    ui.submit("0", lambda: reason in ui.window.text)
    ui.window.centre(ui.window.field(STEPS))
    ui.window.shoot("refused")
    assert ui.count_runs() == before
    assert "/run?" in ui.window.address  # still the form, to mend the value


def test_the_dag_of_the_run_is_drawn(ui: Ui, run_page: str) -> None:
    ui.window.open(run_page)
    ui.window.click("Subflow Runs")
    ui.window.wait_for("experts", "merge", "evaluation")
    until(lambda: ui.window.has_drawn(GRAPH, STATE), lambda: "the DAG of a completed run")
    ui.window.shoot("dag-completed")
    graph = ui.api.get(f"/flow_runs/{_id(run_page)}/graph-v2").raise_for_status().json()
    drawn = {node["label"].partition(" / ")[0]: node["state_type"] for _, node in graph["nodes"]}
    assert drawn == dict.fromkeys(("splits", "experts", "merge", "evaluation", "report"), "COMPLETED")


def test_the_run_says_what_it_is_and_the_history_lists_it(ui: Ui, run_page: str) -> None:
    run_id = ui.results().run.run_id[:8]
    names = (
        f"tiny: 6 subtasks of embedded, seed 0, run {run_id}",
        "memmcl",
        "name:tiny",
        "base:tiny-llama",
        f"run:{run_id}",
    )
    ui.window.open(run_page)
    ui.window.wait_for(*names)
    ui.window.open("/runs")
    ui.window.wait_for("4 runs\n")
    ui.window.click("Hide subflows")
    shown = ui.window.wait_for("1 run\n", *names)
    assert re.search(r"\nCompleted\n", shown.partition(names[0])[2])
    ui.window.shoot("runs")
    run = ui.api.get(f"/flow_runs/{_id(run_page)}").raise_for_status().json()
    assert run["parameters"]["config"]["experts"]["steps"] == 3


def test_the_tables_show_the_scores_that_are_in_the_store(ui: Ui, run_page: str) -> None:
    results = ui.results()
    titles = {model.name: model.title for model in results.models}
    ui.window.open(run_page)
    ui.window.click("Artifacts")
    ui.window.wait_for("leaderboard-", "scores-", "summary-")
    ui.window.shoot("artifacts")
    ui.open_artifact(run_page, "leaderboard-")
    board = ui.window.table()
    ui.window.shoot("leaderboard")
    assert [row["place"] for row in board] == [str(place) for place in range(1, 11)]
    assert {row["model"]: float(row["mean"]) for row in board} == {
        titles[mean.model]: pytest.approx(mean.mean, abs=1e-4) for mean in results.means
    }
    ui.open_artifact(run_page, "scores-")
    scores = {(row["subtask"], row["model"]): float(row["score"]) for row in ui.window.table()}
    assert scores == {
        (score.subtask, titles[score.model]): pytest.approx(score.score, abs=1e-4) for score in results.scores
    }


def test_the_summary_gives_the_verdict_and_a_command_that_writes_the_report(ui: Ui, run_page: str) -> None:
    shown = ui.open_artifact(run_page, "summary-")
    ui.window.shoot("summary")
    assert verdict(ui.results()).headline in shown
    (line,) = re.findall(r"^ *memmcl (report .+)$", shown, re.MULTILINE)
    reported = ui.place.run(*shlex.split(line))
    assert reported.code == 0, reported
    assert (ui.place.cwd / f"report-{ui.results().run.run_id[:8]}" / "report.html").is_file()


def test_every_expert_is_a_task_whose_progress_and_log_can_be_followed(ui: Ui, run_page: str) -> None:
    window = ui.window
    window.open(run_page)
    window.click("Subflow Runs")
    window.follow("experts", "/runs/flow-run/")
    window.wait_for("Parent Run", "warm: training on 144 rows, 9 steps of 4")  # lines further down: when scrolled to
    said = [line["message"] for line in ui.ask("/logs/filter", logs={"flow_run_id": {"any_": [_id(window.address)]}})]
    for subtask in SUBTASKS:
        assert any(line.startswith(f"{subtask}: training on 24 rows, 2 steps of 4") for line in said)
    window.click("Task Runs")
    window.wait_for("15 Task runs\n", *(f"\nexpert {subtask}\n" for subtask in SUBTASKS))
    until(lambda: window.has_drawn(GRAPH, STATE), lambda: "the DAG of the experts")
    window.shoot("dag-experts")
    progress = ui.ask("/artifacts/filter", artifacts={"type": {"any_": ["progress"]}})
    assert {f"expert-{subtask}" for subtask in SUBTASKS} < {made["key"] for made in progress}
    assert {float(made["data"]) for made in progress} == {100.0}


def test_the_log_of_the_run_can_be_followed(ui: Ui, run_page: str) -> None:
    results = ui.results()
    means = {mean.model: f"{mean.mean:.3f} ± {mean.se:.3f}" for mean in results.means}
    ui.window.open(run_page)
    ui.window.click("Logs")
    ui.window.wait_for(
        f"run {results.run.run_id[:8]}: 6 subtasks on ",
        "sent2: 24 train, 8 weak, 0 selection, 8 test",
        f"unified {means['unified']}, base {means['base']}",
    )


def _descriptions(section: type[BaseModel]) -> Iterator[str]:
    """Yield the description of every setting, however deep."""
    for field in section.model_fields.values():
        assert field.description
        yield field.description
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _descriptions(field.annotation)


def _state(window: Browser) -> str:
    return window.text_of(STATE)


def _said(ui: Ui) -> str:
    """Return what a failure needs to be understood: the page, and the worker's last words."""
    return f"a completed run; {ui.window.describe()}\n{tail(ui.worker.output / 'err', 40)}"


def _id(run_page: str) -> str:
    return run_page.partition("?")[0].rpartition("/")[2]
