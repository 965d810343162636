"""A page of another origin, in a real browser, against every port of a cluster and of a run."""

from __future__ import annotations

import json
import threading
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import httpx
import psutil
import pytest
from browser import MISSING, Browser, installed, open_browser
from cluster import Cluster
from e2e_driver import LOOPBACK, ONE_WORKER, desk, wait_until
from prefect import flow
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from processes import MARK, free_ports
from servers import prefect_api_server

from memmcl.store import Store

pytestmark = [pytest.mark.campaign, pytest.mark.timeout(1800), pytest.mark.skipif(not installed(), reason=MISSING)]
PAGE = Path(__file__).with_name("other_origin.html")
REBOUND = "rebound.test"
"""A name of another site that leads to this machine: what is called DNS rebinding."""
ASK = """
const [what, path, method, body, done] = arguments;
fetch(path, {method, body, headers: body ? {"Content-Type": "application/json"} : {}})
    .then(async answer => done([what, answer.status, await answer.text()])).catch(error => done([what, 0, `${error}`]));
"""
TRIED = 40
"""At least as many requests go to each port."""
KEPT = b"kept"


class _Silent(SimpleHTTPRequestHandler):
    def log_message(self, *arguments: object) -> None:
        pass


@contextmanager
def other_site() -> Iterator[str]:
    """Serve the page that attacks on a port of its own; yield its URL."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Silent, directory=str(PAGE.parent))) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(scope="module")
def window(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """A browser in which `REBOUND` leads to this machine, on a site that is neither a cluster's nor a run's."""
    with (
        other_site() as site,
        open_browser(site, tmp_path_factory.mktemp("window"), f"--host-resolver-rules=MAP {REBOUND} 127.0.0.1") as one,
    ):
        one.driver.set_script_timeout(600)
        yield one


def attack(window: Browser, ports: Collection[int], flow_run: str) -> list[list[Any]]:
    """Try everything on each port; return what the page could read: [request, status, text]."""
    window.open(f"/{PAGE.name}")
    read = list(window.driver.execute_async_script("attack(...arguments)", sorted(ports), flow_run))
    assert len(read) > TRIED * len(ports), "each request is answered, if by the browser's refusal"
    return read


def rebind(window: Browser, port: int, *asked: tuple[str, str, str | None]) -> list[list[Any]]:
    """Ask a port as a page that came from it under another site's name; return [request, status, text] of each."""
    window.driver.get(f"http://{REBOUND}:{port}/")
    return [
        list(window.driver.execute_async_script(ASK, f"{method} {path}", path, method, body))
        for path, method, body in asked
    ]


def ports_of(processes: Iterable[psutil.Process]) -> set[int]:
    """Return the ports that they listen on, all of them on the loopback interface."""
    pids = {process.pid for process in processes}
    found = [one for one in psutil.net_connections("tcp") if one.pid in pids and one.status == psutil.CONN_LISTEN]
    assert {one.laddr.ip for one in found} <= LOOPBACK
    return {one.laddr.port for one in found}


def asked_of_prefect(flow_run: str) -> list[tuple[str, str, str | None]]:
    cancelled = json.dumps({"state": {"type": "CANCELLED"}, "force": True})
    return [
        ("/api/flow_runs/filter", "POST", "{}"),
        ("/api/variables/", "POST", '{"name": "stolen", "value": "x"}'),
        (f"/api/flow_runs/{flow_run}", "GET", None),
        (f"/api/flow_runs/{flow_run}/set_state", "POST", cancelled),
        (f"/api/flow_runs/{flow_run}", "DELETE", None),
    ]


def told(answers: Iterable[list[Any]]) -> list[list[Any]]:
    """Return the answers that hold anything but a refusal (status 0: the browser's own)."""
    return [answer for answer in answers if 0 < answer[1] < 400 and answer[2]]


def history(client: SyncPrefectClient, flow_run: str) -> dict[str, Any]:
    """Return what a page would have changed in a Prefect server."""
    found = client.read_flow_runs(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[UUID(flow_run)])))
    variables = client.request("POST", "/variables/filter", json={}).json()
    mark, now = f"mark.{uuid4().hex}", datetime.now(UTC).isoformat()
    event = {"event": mark, "occurred": now, "resource": {"prefect.resource.id": mark}, "id": str(uuid4())}
    client.request("POST", "/events", json=[event])
    wait_until(lambda: events(client, mark), "what was sent before is stored too", 0.2)
    return {
        "runs": [(one.name, one.state_name) for one in found],
        "variables": [one["name"] for one in variables],
        "events": sorted(set(events(client, "stolen"))),
    }


def events(client: SyncPrefectClient, prefix: str) -> list[str]:
    """Return the names of the events that the server holds under a prefix."""
    answer = client.request("POST", "/events/filter", json={"filter": {"event": {"prefix": [prefix]}}}).json()
    return [str(one["event"]) for one in answer["events"]]


def test_the_page_reads_and_changes_what_nothing_closes(window: Browser, tmp_path: Path) -> None:
    """What the other tests are worth: a Prefect server as it comes."""
    with prefect_api_server(tmp_path) as api, SyncPrefectClient(api) as client:
        flow_run = str(client.create_flow_run(_nothing, name="kept").id)
        before = history(client, flow_run)
        port = int(api.rpartition(":")[2].split("/")[0])
        read = told(attack(window, [port], flow_run))
        assert {"GET", "POST"} <= {what.split()[0] for what, *_ in read}
        assert told(rebind(window, port, asked_of_prefect(flow_run)[0]))
        assert before["runs"]
        assert history(client, flow_run) == {
            "runs": [],
            "variables": ["stolen"],
            "events": ["stolen.post", "stolen.socket"],
        }


# ------------------------------------------------------------------------------------------------- a cluster


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster with a worker and one node."""
    made = Cluster(tmp_path_factory.mktemp("cluster"))
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("PREFECT_SERVER_DATABASE_CONNECTION_URL", raising=False)
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.delenv(name, raising=False)
        try:
            made.up(deploy=False, nodes=1, prefect_port=free_ports(1)[0])
            for name, value in made.environment.items():
                if name.startswith("AWS_"):
                    patch.setenv(name, value)
            yield made
        finally:
            made.down(purge=True)


def test_a_cluster_shows_nothing_to_a_page_of_another_origin_and_takes_nothing(
    window: Browser, cluster: Cluster
) -> None:
    known = cluster.environment
    mark = json.loads((cluster.directory / "processes.json").read_text())["mark"]
    ports = ports_of(_marked(f"{mark}/"))
    settings = dict(setting.split("=", 1) for setting in cluster.settings)
    store = Store.open(
        settings["store.url"], endpoint_url=settings["store.endpoint_url"], region=settings["store.region"]
    ).objects
    store.write("kept", KEPT)
    with SyncPrefectClient(known["PREFECT_API_URL"], auth_string=known["PREFECT_API_AUTH_STRING"]) as client:
        flow_run = str(client.create_flow_run(_nothing, name="kept").id)
        before = history(client, flow_run)
        assert told(attack(window, ports, flow_run)) == []
        prefect = int(known["PREFECT_API_URL"].rpartition(":")[2].split("/")[0])
        assert told(rebind(window, prefect, *asked_of_prefect(flow_run))) == []
        endpoint = int(settings["store.endpoint_url"].rpartition(":")[2])
        assert told(rebind(window, endpoint, ("/memmcl/store/kept", "GET", None), ("/memmcl", "GET", None))) == []
        assert history(client, flow_run) == before
    assert store.read("kept") == KEPT
    assert set(store.sizes("")) == {"kept"}


# ----------------------------------------------------------------------------------------------------- a run


def test_a_run_shows_nothing_to_a_page_of_another_origin_and_takes_nothing(
    window: Browser, tmp_path: Path, tiny_base: Path
) -> None:
    with desk(tmp_path, tiny_base) as place:
        endless = ["--set", "experts.steps=1000000", *ONE_WORKER, "--verbose"]
        with place.started("run", place.config, *endless) as running:
            err = running.output / "err"
            running.wait_until(lambda: "training on" in err.read_text(errors="replace"), "it trains")
            out = (running.output / "out").read_text()
            site = out.partition("Prefect UI: ")[2].split()[0]
            ports = ports_of(running.members())
            assert int(site.rpartition(":")[2]) in ports
            with SyncPrefectClient(f"{site}/api") as client:
                flow_run = str(next(one.id for one in client.read_flow_runs() if one.name.startswith("tiny")))
                before = history(client, flow_run)
                assert [state for _, state in before["runs"]] == ["Running"]
                assert told(attack(window, ports, flow_run)) == []
                answers = rebind(window, int(site.rpartition(":")[2]), *asked_of_prefect(flow_run))
                assert told(answers) == []
                assert history(client, flow_run) == before
            window.driver.get(f"{site}/runs")  # a link from elsewhere still leads there
            window.wait_for("tiny: 6 subtasks")
            assert httpx.get(f"{site}/api/health").text == "true"
            running.kill()


@flow
def _nothing() -> None:
    """Is never run."""


def _marked(mark: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK, "").startswith(mark):
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return found
