"""The members of a cluster: how each is started, and how its readiness is seen."""

from __future__ import annotations

import ipaddress
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from processes import HOST, Daemon, answers
from seaweed import PORTS, S3Server, weed_command

from memmcl.errors import UsageError

BIN = Path(sys.executable).parent
DATABASE = "PREFECT_SERVER_DATABASE_CONNECTION_URL"
OBJECT_STORE_BYTES = 256 * 2**20
RAY_IS_UP = "Ray runtime started"


@dataclass(frozen=True)
class Options:
    """The options of `up`; kept, so that a later `up` without options makes the same cluster."""

    nodes: int = 2
    cpus_per_node: int = 1
    gpus_per_node: int = 0
    prefect_port: int = 4200
    worker: bool = True
    listen: str = HOST
    """Where the Prefect server listens. It asks for a login; the others stay on 127.0.0.1."""

    def __post_init__(self) -> None:
        counts = {"nodes": self.nodes, "cpus_per_node": self.cpus_per_node, "gpus_per_node": self.gpus_per_node}
        for name, count in counts.items():
            if count < 0:
                raise UsageError(f"{name} must be 0 or more; got {count}")
        if not 0 < self.prefect_port < 65536:
            raise UsageError(f"prefect_port must be from 1 to 65535; got {self.prefect_port}")
        try:
            one = not ipaddress.IPv4Address(self.listen).is_unspecified
        except ValueError:
            one = False
        if not one:
            raise UsageError(f"listen must be one IPv4 address of this machine; got {self.listen!r}")


@dataclass
class State:
    """The content of processes.json."""

    mark: str
    run_folder: str
    """A short path outside: the paths of unix sockets may have about a hundred characters."""
    ports: list[int]
    options: Options = field(default_factory=Options)
    database: str | None = None
    deployed: bool = False
    processes: dict[str, Daemon] = field(default_factory=dict)


@dataclass(frozen=True)
class Member:
    """How one process of the cluster is started, and how its readiness is seen."""

    command: list[str]
    where: str
    environment: dict[str, str]
    ready: Callable[[], bool]
    port: int | None = None
    after: str | None = None
    """A member that this one depends on: when that one starts again, so must this one."""


def members(state: State, directory: Path, environment: dict[str, str]) -> dict[str, Member]:
    """Return how each member is started, in the order of starting.

    directory: of the cluster; environment: what it takes to use it, which the S3 server's credentials are part of.

    Raises:
        ServiceError: there is no S3 server to start.
    """
    options, ports, address = state.options, state.ports, ray_address(state)
    site = prefect_site(options)
    serve = {name: value for name, value in environment.items() if not name.startswith(("AWS_", "RAY_"))}
    serve["PREFECT_SERVER_API_AUTH_STRING"] = serve["PREFECT_API_AUTH_STRING"]
    serve["PREFECT_SERVER_CORS_ALLOWED_ORIGINS"] = site
    if state.database:
        serve[DATABASE] = state.database
    s3 = S3Server(s3_endpoint(state), environment["AWS_ACCESS_KEY_ID"], environment["AWS_SECRET_ACCESS_KEY"])
    compute = environment | {"RAY_idle_worker_killing_time_threshold_ms": "600000"}  # idle workers hold the model

    def says(name: str, text: str) -> Callable[[], bool]:
        log = directory / "logs" / f"{name}.log"
        return lambda: text in log.read_text(errors="replace")

    started = {
        "prefect": Member(
            prefect_command(options.prefect_port, options.listen),
            site,
            serve,
            lambda: answers(f"{site}/api/health"),
            options.prefect_port,
        ),
        "s3": Member(
            weed_command(s3, directory / "s3", ports[:PORTS]),
            s3.endpoint_url,
            {"TMPDIR": state.run_folder, **s3.keys},
            s3.ready,
            ports[0],
        ),
        "ray-head": Member(
            _ray(
                "--head",
                "--port",
                ports[PORTS],
                "--ray-client-server-port",
                ports[PORTS + 1],
                "--num-cpus",
                0,
                "--num-gpus",
                0,
                "--include-dashboard",
                "false",
                "--temp-dir",
                f"{state.run_folder}/ray",
            ),
            address,
            compute,
            says("ray-head", RAY_IS_UP),
            ports[PORTS],
        ),
    }
    cpus, gpus = options.cpus_per_node, options.gpus_per_node
    for name in [f"ray-node-{number}" for number in range(1, options.nodes + 1)]:
        command = _ray("--address", address, "--num-cpus", cpus, "--num-gpus", gpus)
        started[name] = Member(command, f"{cpus} CPU, {gpus} GPU", compute, says(name, RAY_IS_UP), after="ray-head")
    if options.worker:
        name = "memmcl-1"
        command = [str(BIN / "prefect"), "worker", "start", "--pool", "memmcl", "--type", "process", "--limit", "2"]
        beats = environment | {"PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30"}
        up = says("worker", f"Worker '{name}' started")
        started["worker"] = Member([*command, "--name", name], "pool memmcl", beats, up)
    return started


def prefect_command(port: int, host: str = HOST) -> list[str]:
    """Return the command line of a Prefect server; by default this machine alone can reach it."""
    return [sys.executable, "-m", "prefect", "server", "start", "--host", host, "--port", str(port)]


def prefect_site(options: Options) -> str:
    """Return the URL of the Prefect UI, which is the only origin whose pages may read what the server answers."""
    return f"http://{options.listen}:{options.prefect_port}"


def ray_address(state: State) -> str:
    """Return the host:port that drivers join the Ray cluster at."""
    return f"{HOST}:{state.ports[PORTS]}"


def s3_endpoint(state: State) -> str:
    """Return the URL of the S3 server."""
    return f"http://{HOST}:{state.ports[0]}"


def _ray(*options: str | int) -> list[str]:
    ports = ["--min-worker-port", "0", "--max-worker-port", "0", "--dashboard-agent-listen-port", "0"]
    fixed = ["--block", "--object-store-memory", str(OBJECT_STORE_BYTES), "--log-color", "false", *ports]
    return [sys.executable, str(Path(__file__).with_name("ray_node.py")), *map(str, options), *fixed]
