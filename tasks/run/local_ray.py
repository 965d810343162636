"""A local Ray that ends with this process and leaves nothing behind, and a Ray that is joined; both are watched."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import ray
from ray._private import ray_constants
from ray._raylet import AuthenticationTokenLoader  # type: ignore[attr-defined]  # its stub leaves it out
from ray.exceptions import RayError, RayTaskError

from memmcl.errors import ServiceDied, ServiceError
from memmcl.urls import first_line
from tasks.run import reaper, watch
from tasks.run.leftovers import MARK, home, work_folder
from tasks.run.watch import AGAIN, Service, at_address, before_exit, of_process, watched

REJOIN_SECONDS = 30.0
"""For how long the head of a cluster may be away; after a minute Ray would end this process, without a word of ours."""
SOCKET_PATH = 107 if sys.platform == "linux" else 103
"""The longest path of a unix socket."""
_SOCKET = "/session_2026-11-28_02-40-24_270356_4194304/sockets/plasma_store"
_DAEMONS = {"gcs_server": "control service (gcs_server)", "raylet": "node (raylet)"}
"""What Ray calls the two processes that nothing works without, and what messages call them."""

_TOKEN = "RAY_AUTH_TOKEN"
_OBITUARIES = ("Raylet is terminated", "The node with node id")


@contextmanager
def local_ray(**options: Any) -> Iterator[None]:
    """Start a Ray in a new folder, by options of `ray.init`, for the block or this process; ServiceDied if it dies."""
    with work_folder("ray", _place(), keep=True) as folder, _reaped(f"{MARK}={folder}") as tell, _no_obituaries():
        # SPT_NOENV: or titles are written over the environment.
        with _private(), _environment({MARK: str(folder), "SPT_NOENV": "1"}):
            ray.init(_temp_dir=str(folder), **options)
        node: Any = ray._private.worker._global_node
        logs = Path(node.get_session_dir_path()) / "logs"
        messages = {
            name: f"the {title} of the local Ray died; its logs are in {logs}; look for memory limits, then {AGAIN}"
            for name, title in _DAEMONS.items()
        }
        daemons = {name: node.all_processes[name][0].process for name in _DAEMONS}
        tell({"pid": daemons["raylet"].pid, "message": messages["raylet"]})
        with _until_lost(*(of_process(process, messages[name]) for name, process in daemons.items())):
            yield


@contextmanager
def joined_ray(**options: Any) -> Iterator[None]:
    """Join a cluster until the block ends, by options of `ray.init`; ServiceDied if its head or the node here dies."""
    ray.init(**options)
    where = options["address"]
    host, _, port = ray.get_runtime_context().gcs_address.rpartition(":")
    services = [at_address(f"the Ray cluster at {where}", host.strip("[]"), int(port), REJOIN_SECONDS)]
    node = _own_node()
    with _reaped() as tell:
        if node is not None:
            message = f"this machine's node of the Ray cluster at {where} (raylet) died; start it again, then {AGAIN}"
            services.append(Service(lambda: not node.is_running() or node.status() == psutil.STATUS_ZOMBIE, message))
            tell({"pid": node.pid, "message": message})
        with _until_lost(*services):
            yield


@contextmanager
def _private() -> Iterator[None]:
    """Have `ray.init` in this block start a Ray on 127.0.0.1 alone, with a token that is in no file.

    By default Ray listens on all interfaces, exports its metrics to anybody, and keeps its token in the home folder,
    readable by all. Only internal settings change that; tests look at the sockets and files of a run.
    """
    supported = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    os.environ.setdefault("RAY_enable_metrics_collection", "0")
    if _TOKEN not in os.environ and "RAY_AUTH_TOKEN_PATH" not in os.environ:
        os.environ[_TOKEN] = secrets.token_hex(32)
        AuthenticationTokenLoader.instance().reset_cache()  # it may have seen another, or none
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = supported


@contextmanager
def _until_lost(*services: Service) -> Iterator[None]:
    """Leave Ray at the end of the block; ServiceDied, in one line, if a service dies or Ray itself fails."""
    try:
        with watched(*services, stop=ray.shutdown):
            yield
    except RayTaskError:  # of a function that Ray ran
        raise
    except RayError as error:
        raise ServiceDied(f"Ray failed ({type(error).__name__}: {first_line(error)}); {AGAIN}") from error


def _place() -> Path:
    """Return the parent of a local Ray's folder, or refuse a $RAY_TMPDIR too long for the unix sockets in it."""
    chosen = os.environ.get("RAY_TMPDIR")
    place = Path(chosen).absolute() if chosen else home()
    longest = SOCKET_PATH - len("/ray-12345678") - len(_SOCKET)
    if len(str(place)) <= longest:
        return place
    if chosen:
        raise ServiceError(
            f"RAY_TMPDIR is too long for the unix sockets of Ray: expected at most {longest} characters, got {chosen}"
        )
    return Path("/tmp")  # as Ray does itself where the usual place is a long one


def _own_node() -> psutil.Process | None:
    """Return the raylet that this process is connected to; None where it is not seen."""
    node: Any = ray._private.worker._global_node
    socket = str(node.raylet_socket_name)
    for process in psutil.process_iter(["name", "cmdline"]):
        if process.info["name"] == "raylet" and any(socket in word for word in process.info["cmdline"] or []):
            return process
    return None


@contextmanager
def _no_obituaries() -> Iterator[None]:
    """Drop what Ray prints when a daemon dies, twenty lines of its log among it: our message has one line."""
    worker = ray._private.worker
    say = worker.print_to_stdstream

    def without(data: dict[str, Any], *args: Any, **options: Any) -> None:
        if not any(line.startswith(_OBITUARIES) for line in data["lines"]):
            say(data, *args, **options)

    worker.print_to_stdstream = without
    try:
        yield
    finally:
        worker.print_to_stdstream = say


@contextmanager
def _reaped(*marks: str) -> Iterator[Callable[[dict[str, Any]], None]]:
    """End the processes that carry the marks when the block, or this process, has ended (see `reaper`).

    Yields a function that takes the raylet's pid, and the message to print if Ray ends this process when it dies.
    """
    child = subprocess.Popen(
        [sys.executable, "-I", "-S", reaper.__file__, *marks],
        stdin=subprocess.PIPE,
        stderr=watch.terminal_errors,
        start_new_session=True,
    )
    assert child.stdin is not None
    pipe = child.stdin

    def write(line: bytes) -> None:
        with suppress(OSError, ValueError):  # somebody killed it
            pipe.write(line)
            pipe.flush()

    farewell = partial(write, reaper.FAREWELL)
    try:
        with before_exit(farewell):
            yield lambda line: write(json.dumps(line).encode() + b"\n")
    finally:
        farewell()
        pipe.close()
        child.wait()


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """Set variables for the processes that are started in the block."""
    before = {name: os.environ[name] for name in variables if name in os.environ}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name in variables:
            os.environ.pop(name, None)
        os.environ.update(before)
