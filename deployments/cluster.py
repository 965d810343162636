"""The services of a deployment as plain processes on one machine: the topology of the containers, without them.

    python deployments/cluster.py up       start what does not run: Prefect and S3 servers, Ray head and nodes, worker
    python deployments/cluster.py status   the table of them; exit code 1 when one is dead
    python deployments/cluster.py down     stop them; the data stays, unless --purge

Everything is kept in one directory: `env` (to source), `processes.json`, `logs/`, and the data of the servers. All
of it listens on 127.0.0.1 only, but for the Prefect server where --listen names another address. The Prefect server
asks for a login, the S3 server for credentials, Ray for a token; the first `up` makes them up.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import secrets
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from members import BIN, DATABASE, Member, Options, State, members, prefect_site, ray_address, s3_endpoint
from processes import (
    HOST,
    STOP_SECONDS,
    Daemon,
    digest,
    free_ports,
    is_free,
    spawn,
    tail,
    wait_until_ready,
    write_private,
)
from seaweed import PORTS, REGION, S3Server, remove_sockets

from memmcl.errors import MemmclError, ServiceError, UsageError
from memmcl.files.allowed import VARIABLE as ALLOWED
from memmcl.urls import clean

ROOT = Path(__file__).resolve().parent.parent
QUIET = {"PREFECT_SERVER_ANALYTICS_ENABLED": "false", "DO_NOT_TRACK": "1", "RAY_USAGE_STATS_ENABLED": "0"}


class Cluster:
    """The cluster in one directory; every method looks at what really runs.

    Example:
        >>> cluster = Cluster(".cluster")
        >>> cluster.up(nodes=2)
        >>> cluster.kill("ray-node-1")
        >>> cluster.up()  # and it is back
        >>> cluster.down(purge=True)
    """

    def __init__(self, directory: str | Path = ".cluster") -> None:
        self.directory = Path(directory).absolute()

    def up(self, *, deploy: bool = True, **options: Any) -> None:
        """Start what does not run, or runs with other options, each when the one before is healthy.

        deploy: register the deployments with the new Prefect server (`memmcl deploy`), once in a cluster's life.
        options: fields of `Options`; those that are left out stay as they were.

        Raises:
            ServiceError: something did not come up; what this call started has been stopped again.
            UsageError: the directory holds something else, or an option is out of bounds.
        """
        self._make_directory()
        with self._locked():
            before = self._load()
            wanted_options = replace(before.options if before else Options(), **options)
            state = before or State(
                secrets.token_hex(8), tempfile.mkdtemp(prefix="memmcl-", dir="/tmp"), free_ports(PORTS + 2)
            )
            state.options = wanted_options
            state.database = os.environ.get(DATABASE) or state.database
            Path(state.run_folder).mkdir(mode=0o700, exist_ok=True)
            for folder in ("logs", "prefect"):
                (self.directory / folder).mkdir(exist_ok=True)
            self._save(state)
            self._write_environment(state)
            started: list[Daemon] = []
            try:
                wanted = members(state, self.directory, self.environment)
                for name in [name for name in state.processes if name not in wanted]:
                    self._stop(state, name)
                for name in [name for name in wanted if name != "worker"]:
                    self._ensure(state, name, wanted, started)
                if deploy and not state.deployed:
                    self._deploy(state)
                if "worker" in wanted:
                    self._ensure(state, "worker", wanted, started)
            except BaseException:
                for daemon in reversed(started):
                    daemon.stop()
                raise

    def down(self, *, purge: bool = False) -> list[str]:
        """Stop all, the last first, and return their names; what they stored stays, or is removed as well.

        Raises:
            ServiceError: another `up` or `down` is at work there.
        """
        if self._load() is None:
            return []
        with self._locked():
            state = self._state()
            stopped = list(reversed(state.processes))
            for name in stopped:
                self._stop(state, name)
            if purge:
                remove_sockets(state.ports)
                shutil.rmtree(state.run_folder, ignore_errors=True)
                shutil.rmtree(self.directory)
        return stopped

    def process(self, name: str) -> int:
        """Return the pid of a member: "prefect", "s3", "ray-head", "ray-node-1" ..., "worker"."""
        return self._daemon(name).pid

    def kill(self, name: str) -> None:
        """SIGKILL a member with all that it started, as when its container is killed."""
        self._daemon(name).kill()

    def status(self) -> dict[str, tuple[Daemon, bool]]:
        """Return each member that was started, and whether it is alive."""
        return {name: (daemon, daemon.alive()) for name, daemon in self._state().processes.items()}

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs in its environment to use the cluster; the same as in DIR/env."""
        lines = (self.directory / "env").read_text().splitlines()
        return dict(shlex.split(line)[1].split("=", 1) for line in lines)

    @property
    def settings(self) -> list[str]:
        """The KEY=VALUE settings of a run on this cluster, each for one --set."""
        state = self._state()
        return [
            "store.url=s3://memmcl/store",
            f"store.endpoint_url={s3_endpoint(state)}",
            f"store.region={REGION}",
            f"ray.address={ray_address(state)}",
        ]

    def _ensure(self, state: State, name: str, wanted: dict[str, Member], started: list[Daemon]) -> None:
        """Start a member unless it runs as it should; first end the rest of it, and the members that depend on it."""
        member = wanted[name]
        made_of = digest(member.command, member.environment)
        before = state.processes.get(name)
        if before and before.alive() and before.made_of == made_of:
            return
        if before:
            before.stop()
        for other, daemon in state.processes.items():
            if wanted[other].after == name:
                daemon.kill()
        if member.port and not is_free(member.port):
            other = "choose another with --prefect-port, or " if name == "prefect" else ""
            raise ServiceError(f"port {member.port} of {name} is in use; {other}stop what listens there")
        log = self.directory / "logs" / f"{name}.log"
        environment = _inherited() | member.environment
        daemon = spawn(member.command, environment, log, member.where, f"{state.mark}/{name}", made_of)
        started.append(daemon)
        state.processes[name] = daemon
        self._save(state)
        wait_until_ready(name, daemon, member.ready)

    def _stop(self, state: State, name: str) -> None:
        # SeaweedFS would wait 15 s for nothing; what it has acknowledged survives SIGKILL.
        state.processes.pop(name).stop(2.0 if name == "s3" else STOP_SECONDS)
        self._save(state)

    def _deploy(self, state: State) -> None:
        log = self.directory / "logs" / "deploy.log"
        command = [str(BIN / "memmcl"), "deploy", *(word for one in self.settings for word in ("--set", one))]
        with log.open("wb") as output:
            code = subprocess.run(
                command,
                env=_inherited() | self.environment,
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                check=False,
            ).returncode
        if code:
            raise ServiceError(f"`memmcl deploy` ended with {code}; the end of {log}:\n{tail(log)}")
        state.deployed = True
        self._save(state)

    def _daemon(self, name: str) -> Daemon:
        processes = self._state().processes
        if name not in processes:
            raise UsageError(f"no {name!r} in {self.directory}; there are {', '.join(processes) or 'no processes'}")
        return processes[name]

    def _state(self) -> State:
        state = self._load()
        if state is None:
            raise UsageError(f"no cluster in {self.directory}; `up` makes one")
        return state

    def _load(self) -> State | None:
        file = self.directory / "processes.json"
        if not file.exists():
            return None
        kept = json.loads(file.read_text())
        processes = {name: Daemon(**one) for name, one in kept["processes"].items()}
        return State(**{**kept, "options": Options(**kept["options"]), "processes": processes})

    def _save(self, state: State) -> None:
        write_private(self.directory / "processes.json", json.dumps(asdict(state), indent=1))

    def _write_environment(self, state: State) -> None:
        """Write DIR/env; credentials that are there already stay."""
        known = self.environment if (self.directory / "env").exists() else {}
        api = f"{prefect_site(state.options)}/api"
        environment = {
            "PREFECT_API_URL": api,
            "PREFECT_SERVER_UI_API_URL": api,
            "PREFECT_API_AUTH_STRING": known.get("PREFECT_API_AUTH_STRING", f"memmcl:{secrets.token_hex(20)}"),
            "PREFECT_HOME": str(self.directory / "prefect"),
            ALLOWED: _allowed(state, known.get(ALLOWED, "")),
            **QUIET,
            **S3Server(
                "",
                known.get("AWS_ACCESS_KEY_ID", secrets.token_hex(10)),
                known.get("AWS_SECRET_ACCESS_KEY", secrets.token_hex(20)),
            ).environment,
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # drivers stay on 127.0.0.1 as well, see ray_node.py
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": known.get("RAY_AUTH_TOKEN", secrets.token_hex(32)),
        }
        lines = [f"export {name}={shlex.quote(value)}\n" for name, value in environment.items()]
        write_private(self.directory / "env", "".join(lines))

    def _make_directory(self) -> None:
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        others = [path.name for path in self.directory.iterdir() if path.name != ".lock"]
        if others and self._load() is None:
            raise UsageError(f"{self.directory} is no cluster and not empty ({others[0]}); name another with --dir")
        self.directory.chmod(0o700)  # another user may have made it

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with (self.directory / ".lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ServiceError(f"another `up` or `down` is at work in {self.directory}; wait for it") from None
            yield


def table(cluster: Cluster) -> str:
    """Return the members as text, one a line: name, what or where it is, pid, state, log."""
    rows: list[tuple[object, ...]] = [("member", "where", "pid", "state", "log")]
    for name, (daemon, alive) in cluster.status().items():
        rows.append((name, daemon.where, daemon.pid, "alive" if alive else "dead", _short(Path(daemon.log))))
    widths = [max(len(str(row[column])) for row in rows) for column in range(5)]
    lines = ["  ".join(str(word).ljust(width) for word, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(line.rstrip() for line in lines)


def _short(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _inherited() -> dict[str, str]:
    """Return our environment without what would lead a member to other servers."""
    others = ("PREFECT_", "AWS_", "RAY_", "MEMMCL_")
    return {name: value for name, value in os.environ.items() if not name.startswith(others)}


def _allowed(state: State, before: str) -> str:
    """Return what runs on the cluster may open: its own store, the hub, and what $MEMMCL_ALLOWED_URLS names here."""
    prefixes = f"s3://memmcl {s3_endpoint(state)} hf:// {os.environ.get(ALLOWED, before)}"
    return " ".join(dict.fromkeys(prefixes.replace(",", " ").split()))


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    parser = argparse.ArgumentParser(prog="cluster.py", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    up = commands.add_parser("up", help="start what does not run; options that are left out stay as they were")
    up.add_argument("--nodes", type=int, help="Ray nodes (2)")
    up.add_argument("--cpus-per-node", type=int, help="CPUs that each node offers (1)")
    up.add_argument("--gpus-per-node", type=int, help="GPUs that each node offers (0)")
    up.add_argument("--prefect-port", type=int, help="port of the Prefect server (4200)")
    up.add_argument("--listen", help=f"address of this machine that the Prefect server listens on ({HOST})")
    up.add_argument("--worker", action=argparse.BooleanOptionalAction, help="run a Prefect worker (yes)")
    up.add_argument("--no-deploy", action="store_true", help="leave `memmcl deploy` to you")
    down = commands.add_parser("down", help="stop all; what they stored stays")
    down.add_argument("--purge", action="store_true", help="remove the directory with all that is stored in it")
    status = commands.add_parser("status", help="show the members; exit code 1 when one is dead")
    for command in (up, down, status):
        command.add_argument("--dir", default=".cluster", help="where everything is kept (.cluster)")
    options = vars(parser.parse_args(arguments))
    try:
        return _run(Cluster(options.pop("dir")), options.pop("command"), options)
    except MemmclError as error:
        print(f"error: {clean(str(error))}", file=sys.stderr)
        return error.exit_code


def _run(cluster: Cluster, command: str, options: dict[str, Any]) -> int:
    if command == "down":
        stopped = cluster.down(**options)
        print(f"stopped {', '.join(stopped)}" if stopped else f"nothing was running in {cluster.directory}")
        return 0
    if command == "up":
        deploy = not options.pop("no_deploy")
        cluster.up(deploy=deploy, **{name: value for name, value in options.items() if value is not None})
    print(table(cluster))
    if command == "up":
        print(f"\nto use it from a shell:  source {shlex.quote(str(_short(cluster.directory / 'env')))}")
        print("the Prefect UI asks for a password: PREFECT_API_AUTH_STRING in that file")
        print(f"settings of a run on it: {' '.join(f'--set {shlex.quote(one)}' for one in cluster.settings)}")
    states = [alive for _, alive in cluster.status().values()]
    return 0 if states and all(states) else 1


if __name__ == "__main__":
    sys.exit(main())
