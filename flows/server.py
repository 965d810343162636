"""A Prefect server as a child process, for runs without another."""

from __future__ import annotations

import ctypes
import http.client
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from prefect.logging.handlers import APILogWorker
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows.own_server import HOST, origins
from memmcl.errors import ServiceError
from tasks.run.leftovers import work_folder
from tasks.run.watch import AGAIN, answering, of_process, watched

AWAY_SECONDS = 60.0
"""For how long a server at PREFECT_API_URL may be away: Prefect's client tries about as long."""
_FORGETFUL = {"PREFECT_SERVER_SERVICES_DB_VACUUM_ENABLED": "events,flow_runs"}
"""Without it a history of flow runs grows for ever."""


@contextmanager
def prefect_server(port: int | None = None) -> Iterator[str]:
    """Yield the API URL of $PREFECT_API_URL, or else of a child server that ends with the block (or with us).

    port: of the child; None takes a free one. PREFECT_API_URL is set for everything started inside.

    Raises:
        ServiceError: the named server does not answer, the port is in use, or the child does not come up.
    """
    named = os.environ.get("PREFECT_API_URL")
    if named:
        if not _healthy(named):
            raise ServiceError(f"no Prefect server answers at PREFECT_API_URL={named}; start it, or unset the variable")
        with watched(answering(f"the Prefect server at {named}", lambda: _healthy(named), AWAY_SECONDS)):
            yield named
        return
    chosen = check_port(port or 0)
    url = f"http://{HOST}:{chosen}/api"
    with work_folder("prefect", keep=True) as folder, (folder / "server.log").open("w+b") as output:
        child = subprocess.Popen(
            server_command(chosen),
            stdout=output,
            stderr=subprocess.STDOUT,
            env=server_environment(chosen),
            stdin=subprocess.DEVNULL,
            preexec_fn=_die_with_parent,
            start_new_session=True,
        )
        try:
            _wait(child, url, output.fileno())
            os.environ["PREFECT_API_URL"] = url  # for Ray's workers; settings that were read before do not see it
            died = f"the run's Prefect server died; its log is {output.name}; look for memory limits, then {AGAIN}"
            drain = partial(APILogWorker.drain_all, timeout=5)  # or it goes on trying when the server is gone
            with temporary_settings({PREFECT_API_URL: url}), watched(of_process(child, died), stop=drain):
                yield url
        finally:
            os.environ.pop("PREFECT_API_URL", None)
            child.terminate()
            try:
                child.wait(10)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()


def server_command(port: int) -> list[str]:
    """Return the command line of a Prefect server on this machine."""
    return [sys.executable, "-P", "-m", "flows.own_server", str(port)]  # -P: whatever lies in the working directory


def server_environment(port: int) -> dict[str, str]:
    """Return the environment of a Prefect server on this port: quiet, and its pages, alone, ask it for their data.

    It removes from its history events after a week and flow runs after 90 days, unless the environment says otherwise.
    """
    return {
        **_FORGETFUL,
        **os.environ,
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
        "PREFECT_LOGGING_SERVER_LEVEL": "WARNING",
        "PREFECT_SERVER_UI_API_URL": f"http://{HOST}:{port}/api",
        "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": ",".join(origins(port)),
    }


def check_port(port: int) -> int:
    """Return `port` if nothing listens on it; for 0, a free port.

    Raises:
        ServiceError: it is in use.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            message = f"port {port} is in use; name another with --port, or stop what listens there"
            raise ServiceError(message) from error
        return int(probe.getsockname()[1])


def _wait(child: subprocess.Popen[bytes], url: str, output: int, seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not _healthy(url):
        if child.poll() is not None or time.monotonic() > deadline:
            lines = os.pread(output, 100_000, 0).decode(errors="replace").strip().splitlines()
            raise ServiceError(f"the Prefect server did not start: {lines[-1] if lines else 'its log is empty'}")
        time.sleep(0.3)


def _healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url.rstrip('/')}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except (OSError, ValueError, http.client.HTTPException):  # whatever answers there
        return False


def _die_with_parent() -> None:
    """Have the kernel end the child when we die, however we die (Linux)."""
    if sys.platform == "linux" and Path("/proc/self").exists():
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
