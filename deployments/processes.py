"""Processes that outlive the command which started them: daemons, found again by pid, start time and a mark.

The mark is an environment variable. Whatever a daemon starts inherits it, however deep and detached, so that all of it
can be ended together, as all of a container ends with it. No other process is ever signalled. Linux only.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from memmcl.errors import ServiceError

HOST = "127.0.0.1"
MARK = "MEMMCL_CLUSTER_MEMBER"
START_SECONDS = 180.0
STOP_SECONDS = 8.0


@dataclass(frozen=True)
class Daemon:
    """A process that was started, as far as a later command needs to know it."""

    pid: int
    started: float
    mark: str
    made_of: str
    where: str
    log: str

    def alive(self) -> bool:
        """Return whether it runs; a zombie, or another process that was given its pid, does not count."""
        try:
            process = psutil.Process(self.pid)
            return bool(abs(process.create_time() - self.started) < 1 and process.status() != psutil.STATUS_ZOMBIE)
        except psutil.NoSuchProcess:
            return False

    def members(self) -> list[psutil.Process]:
        """Return the live processes that carry its mark: itself, and what it started."""
        return [process for process in psutil.process_iter() if _mark(process) == self.mark]

    def stop(self, seconds: float = STOP_SECONDS) -> None:
        """Send SIGTERM and give it `seconds`, then end what is left of it and of what it started.

        Raises:
            ServiceError: something survives SIGKILL.
        """
        if self.alive():
            with suppress(psutil.NoSuchProcess, psutil.TimeoutExpired):
                process = psutil.Process(self.pid)
                process.terminate()
                process.wait(seconds)
        self.kill()

    def kill(self) -> None:
        """SIGKILL it and all that it started, and wait until nothing of it is left.

        Raises:
            ServiceError: something survives, as a process in an uninterruptible wait does.
        """
        deadline = time.monotonic() + START_SECONDS
        while left := self.members():
            if time.monotonic() > deadline:
                raise ServiceError(f"processes {[one.pid for one in left]} do not end; look at them with ps")
            for process in left:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            time.sleep(0.05)
        with suppress(ChildProcessError):  # ours when this same process started it
            os.waitpid(self.pid, os.WNOHANG)


def spawn(command: list[str], environment: Mapping[str, str], log: Path, where: str, mark: str, made_of: str) -> Daemon:
    """Start `command` in a session of its own, without a terminal; what it says goes to a new file `log`.

    environment: all of it, but for the mark.
    where: how a user reaches it; mark: no other daemon's; made_of: see `digest`. All three are only noted.
    The log of the daemon before is kept beside the new one, as NAME.previous.log.

    Raises:
        OSError: the command cannot be executed.
    """
    if log.exists():
        log.replace(log.with_suffix(".previous.log"))
    # SPT_NOENV: or Ray's workers write their titles over their environment, and the mark with it.
    marked = {**environment, MARK: mark, "SPT_NOENV": "1", "PYTHONUNBUFFERED": "1"}
    files = [
        (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
        (os.POSIX_SPAWN_OPEN, 1, str(log), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600),
        (os.POSIX_SPAWN_DUP2, 1, 2),
    ]
    pid = os.posix_spawn(command[0], command, marked, file_actions=files, setsid=True)
    return Daemon(pid, psutil.Process(pid).create_time(), mark, made_of, where, str(log))


def digest(*made_of: object) -> str:
    """Return what tells two ways of starting a daemon apart: its command, its environment and the like."""
    return hashlib.sha256(json.dumps(made_of, sort_keys=True, default=str).encode()).hexdigest()


def wait_until_ready(name: str, daemon: Daemon, ready: Callable[[], bool], seconds: float = START_SECONDS) -> None:
    """Poll until `ready` holds.

    Raises:
        ServiceError: the daemon ended, or it is not ready in time; the last lines of its log are in the message.
    """
    deadline = time.monotonic() + seconds
    while not ready():
        if not daemon.alive():
            raise ServiceError(f"{name} ended while it started; the end of {daemon.log}:\n{tail(Path(daemon.log))}")
        if time.monotonic() > deadline:
            raise ServiceError(
                f"{name} is not up after {seconds:.0f} s; the end of {daemon.log}:\n{tail(Path(daemon.log))}"
            )
        time.sleep(0.2)


def free_ports(count: int) -> list[int]:
    """Return `count` different TCP ports of 127.0.0.1 that nothing listens on now."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind((HOST, 0))
        return [one.getsockname()[1] for one in sockets]


def is_free(port: int) -> bool:
    """Return whether nothing listens on this TCP port of 127.0.0.1."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True


def answers(url: str) -> bool:
    """Return whether an HTTP server answers a GET of this URL, with status 200."""
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def tail(log: Path, lines: int = 15) -> str:
    """Return the last lines of a log, or a word that there are none."""
    said = log.read_text(errors="replace").splitlines() if log.exists() else []
    return "\n".join(said[-lines:]) or "(it said nothing)"


def write_private(path: Path, text: str) -> None:
    """Write a file that only its owner can read, in one step: a reader sees the old content or the new."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # mkstemp: mode 0600
    with os.fdopen(handle, "w") as file:
        file.write(text)
    Path(name).replace(path)


def _mark(process: psutil.Process) -> str | None:
    try:
        mark: str | None = process.environ().get(MARK)
    except (psutil.Error, OSError):  # it ended, or it is another user's
        return None
    return mark
