"""`memmcl deploy`: the work pool, the deployments and the automations on a Prefect server, the same however often."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.objects import ConcurrencyLimitConfig
from prefect.deployments.runner import RunnerDeployment
from prefect.events import AutomationCore
from prefect.exceptions import ObjectNotFound, PrefectException
from prefect.flows import Flow, load_flow_from_entrypoint
from prefect.schedules import Cron
from prefect.settings import get_current_settings
from prefect.types.entrypoint import EntrypointType
from prefect.workers.process import ProcessWorker
from pydantic import ValidationError

from memmcl import seeds
from memmcl.config import RunConfig, read_yaml
from memmcl.errors import ConfigError, ServiceError, UsageError, shown
from memmcl.store.objects import normalise
from memmcl.version import __version__

AUTOMATIONS = "automations.yaml"
"""Beside the file of the deployments."""
KEYS = {"name", "entrypoint", "work_pool"}
KEYS |= {"description", "tags", "enforce_parameter_schema", "schedules", "concurrency_limit", "parameters"}
"""Of a deployment in the file."""


@dataclass(frozen=True)
class Applied:
    """What `deploy` did to one object on the server."""

    what: Literal["work pool", "deployment", "automation"]
    name: str
    done: Literal["created", "updated", "unchanged"]


def deploy(file: Path, config: RunConfig) -> list[Applied]:
    """Bring the Prefect server to what `file` and the automations beside it describe; return what was done.

    config: the default parameters of all deployments. What was changed in the UI since stays, until `file`, `config`
    or memmcl itself changes.

    Raises:
        UsageError, ConfigError: no server is named, or a file cannot be used.
        ServiceError: the server does not answer, or refuses.
    """
    api = get_current_settings().api.url
    if not api:
        raise UsageError(
            "expected PREFECT_API_URL to name a Prefect server, it is not set; start one with `prefect server start` "
            "and export PREFECT_API_URL=http://127.0.0.1:4200/api"
        )
    settings = absolute(config).model_dump(mode="json")
    deployments = [_deployment(entry, settings, file) for entry in _entries(file, "deployments")]
    beside = file.with_name(AUTOMATIONS)
    automations = list(_entries(beside, "automations")) if beside.exists() else []
    try:
        with get_client(sync_client=True) as client:
            applied = [_pool(client, name) for name in sorted({str(one.work_pool_name) for one in deployments})]
            applied += [_apply(client, one) for one in deployments]
            applied += [_automate(client, _automation(client, entry, beside)) for entry in automations]
    except (httpx.HTTPError, PrefectException, RuntimeError) as error:
        lines = str(error).strip().splitlines()
        raise ServiceError(
            f"the Prefect server at {api} did not take the deployments: {lines[0] if lines else type(error).__name__}; "
            "see that it runs and that PREFECT_API_URL names it"
        ) from error
    return applied


def absolute(config: RunConfig) -> RunConfig:
    """Return the configuration with absolute paths: a worker runs flows in another folder than this one."""

    def absolute_path(name: str | None) -> str | None:
        return str(Path(name).resolve()) if name and Path(name).exists() else name

    store = config.store.model_copy(update={"url": normalise(config.store.url)})
    model = config.model.model_copy(update={"name_or_path": absolute_path(config.model.name_or_path)})
    data = config.data.model_copy(update={"source": absolute_path(config.data.source)})
    experts = config.experts.model_copy(update={"anchor_texts": absolute_path(config.experts.anchor_texts)})
    return config.model_copy(update={"store": store, "model": model, "data": data, "experts": experts})


def _entries(file: Path, section: str) -> Iterator[dict[str, Any]]:
    loaded = read_yaml(file, "name the file of the deployments")
    entries = loaded.get(section) if isinstance(loaded, dict) else None
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ConfigError(f"{file}: expected a list of {section}, each a mapping; see deployments/ of memmcl")
    yield from entries


def _deployment(entry: Mapping[str, Any], settings: Mapping[str, Any], file: Path) -> RunnerDeployment:
    """Return one deployment of the file; its version is a digest of the entry, its parameters and memmcl's version."""
    unknown = sorted(set(entry) - KEYS)
    if unknown:
        raise ConfigError(f"{file}: unknown key {shown(unknown[0])} in a deployment; known: {', '.join(sorted(KEYS))}")
    try:
        flow: Flow[..., Any] = load_flow_from_entrypoint(entry["entrypoint"], use_placeholder_flow=False)
        pool, limit = entry["work_pool"], entry.get("concurrency_limit")
        takes_config = "config" in flow.parameters.properties
        parameters = {**({"config": settings} if takes_config else {}), **entry.get("parameters", {})}
        schema = flow.parameters.model_dump(mode="json")
        identity = {"entry": dict(entry), "parameters": parameters, "schema": schema, "memmcl": __version__}
        return RunnerDeployment.from_flow(
            flow,
            name=entry["name"],
            description=entry.get("description"),
            tags=entry.get("tags", []),
            parameters=parameters,
            enforce_parameter_schema=entry.get("enforce_parameter_schema", True),
            schedules=[
                Cron(schedule["cron"], timezone=schedule.get("timezone", "UTC"), active=schedule.get("active", True))
                for schedule in entry.get("schedules", [])
            ],
            concurrency_limit=ConcurrencyLimitConfig.model_validate(limit) if isinstance(limit, dict) else limit,
            work_pool_name=pool["name"],
            job_variables=pool.get("job_variables", {}),
            version=f"{__version__}-{seeds.digest(identity)[:12]}",
            entrypoint_type=EntrypointType.MODULE_PATH,
        )
    except (KeyError, TypeError, ValueError, ValidationError, PrefectException, ImportError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise ConfigError(f"{file}: deployment {shown(entry.get('name', '?'))} cannot be used: {what}") from error


def _automation(client: SyncPrefectClient, entry: Mapping[str, Any], file: Path) -> AutomationCore:
    """Return one automation of the file; a deployment that it runs is named there, its id is looked up."""
    name = entry.get("name", "?")
    actions = [dict(action) for action in entry.get("actions", [])]
    for action in actions:
        if "deployment" in action:
            wanted = action.pop("deployment")
            try:
                action["deployment_id"] = client.read_deployment_by_name(wanted).id
            except (ObjectNotFound, ValueError) as error:
                message = f"{file}: automation {shown(name)}: there is no deployment {shown(wanted)}"
                raise ConfigError(message) from error
    try:
        return AutomationCore.model_validate({**entry, "actions": actions})
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"])
        raise ConfigError(f"{file}: automation {shown(name)}: {where}: {problem['msg']}") from error


def _pool(client: SyncPrefectClient, name: str) -> Applied:
    try:
        client.read_work_pool(name)
    except ObjectNotFound:
        template = ProcessWorker.get_default_base_job_template()
        client.create_work_pool(WorkPoolCreate(name=name, type=ProcessWorker.type, base_job_template=template))
        return Applied("work pool", name, "created")
    return Applied("work pool", name, "unchanged")


def _apply(client: SyncPrefectClient, wanted: RunnerDeployment) -> Applied:
    done: Literal["created", "updated"] = "updated"
    try:
        if client.read_deployment_by_name(wanted.full_name).version == wanted.version:
            return Applied("deployment", wanted.full_name, "unchanged")
    except ObjectNotFound:
        done = "created"
    wanted.apply()
    return Applied("deployment", wanted.full_name, done)


def _automate(client: SyncPrefectClient, wanted: AutomationCore) -> Applied:
    present = client.read_automations_by_name(wanted.name)
    if not present:
        client.create_automation(wanted)
        return Applied("automation", wanted.name, "created")
    if _plain(present[0]) == _plain(wanted):
        return Applied("automation", wanted.name, "unchanged")
    client.update_automation(present[0].id, wanted)
    return Applied("automation", wanted.name, "updated")


def _plain(automation: AutomationCore) -> dict[str, Any]:
    """Return what an automation does, without ids, and without whether a person turned it off."""
    plain = automation.model_dump(include={"description", "trigger", "actions"})
    plain["trigger"].pop("id", None)
    return plain
