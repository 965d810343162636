"""Drives the `memmcl` command from outside, as a user would: real processes, own home, own history, own Ray folder."""

from __future__ import annotations

import base64
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID

import psutil
import yaml
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterParentTaskRunId,
    TaskRunFilter,
    TaskRunFilterFlowRunId,
)
from prefect.states import State

from memmcl.store import ArtifactRef, Manifest, Store

SECONDS = 900.0
"""How long a test waits for anything, however busy the machine; no test is about how long it took."""
MARK = "MEMMCL_TEST_TREE"
COMMAND = Path(sys.executable).with_name("memmcl")
SUBTASKS = ("sent2", "asc", "uabsa", "aste", "irony", "emotion")


def settings(*values: str) -> tuple[str, ...]:
    """Return them as options of a command: `--set` before each."""
    return tuple(word for value in values for word in ("--set", value))


NO_RIVALS = settings("evaluation.joint_lora=false", "evaluation.weak_lora=false")
FEW = (*settings("data.subtasks=[sent2, irony]"), *NO_RIVALS)
"""Two subtasks without rivals."""
ONE_WORKER = settings("ray.workers=1")
"""Where workers are not what a test is about: two import everything twice, which is most of what a small run takes."""
PLANTED = "hunter2hunter2"
OVERRIDDEN = ("--set", f"data.source=https://host/rows?X-Amz-Signature={PLANTED}", "--set", "data.source=embedded")
"""A secret in an argument that a later one replaces: the command is taken, and recorded without it."""
STAGE_EVALUATIONS = 8
LAMBDAS = (0.3, 0.5, 0.7)
LOOPBACK = {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
PASSWORD = "proxy-password-8c41d7e2"
SECRETS = {
    "AWS_ACCESS_KEY_ID": "planted-key-5f0f4f7a",
    "AWS_SECRET_ACCESS_KEY": "planted-secret-77b1c0de",
    "AWS_SESSION_TOKEN": "planted-token-e93c55aa",
    "PREFECT_API_AUTH_STRING": "planted:login-0a64b9f3",
    "HF_TOKEN": "hf_planted-36d2c8b1",
    "https_proxy": f"http://planted:{PASSWORD}@127.0.0.1:9",
    "no_proxy": "127.0.0.1,localhost",
}
"""An environment with a secret of each kind; see `planted`."""


def tiny_config(base: Path) -> dict[str, Any]:
    """Return the settings of a run of all six subtasks that takes seconds of work on the tiny base."""
    return {
        "name": "tiny",
        "model": {"name_or_path": str(base), "dtype": "float32"},
        "data": {"subtasks": list(SUBTASKS), "train_rows": 24, "weak_rows": 8, "test_rows": 8},
        "experts": {
            "steps": 8,
            "batch_size": 4,
            "rank": 4,
            "alpha": 8,
            "adapt_layers": "top-2",
            "learning_rate": 5e-3,
            "warm_start": 0.5,
            "anchor_every": 2,
            "anchor_batch_size": 4,
            "anchor_rows": 4,
            "checkpoint_every": 2,
        },
        "search": {
            "stage1_evaluations": STAGE_EVALUATIONS,
            "stage2_evaluations": STAGE_EVALUATIONS,
            "blocks": 1,
            "population": 4,
            "lambdas": list(LAMBDAS),
        },
        "curriculum": {"own_shots": 2, "budget_tokens": 256},
        "evaluation": {
            "batch_size": 8,
            "max_new_tokens": 8,
            "bootstrap_samples": 100,
            "joint_lora": True,
            "weak_lora": True,
            "interference_rows": 4,
        },
    }


@dataclass(frozen=True, repr=False)
class Ended:
    """A command that ended: exit code and what it printed."""

    code: int
    out: str
    err: str

    def __repr__(self) -> str:
        return f"exit code {self.code}\n--- stdout\n{self.out}\n--- stderr\n{self.err[-8000:]}"


@dataclass
class Running:
    """A command that was started, with everything it starts, however deep and detached."""

    process: subprocess.Popen[bytes]
    mark: str
    output: Path

    def members(self) -> list[psutil.Process]:
        """Return all live processes of the command: those that carry its mark, and all below them."""
        found: dict[int, psutil.Process] = {}
        for process in psutil.process_iter():
            if _marked(process.pid, self.mark):
                found[process.pid] = process
                try:
                    found |= {child.pid: child for child in process.children(recursive=True)}
                except psutil.NoSuchProcess:
                    continue
        return [process for process in found.values() if _alive(process)]

    def sockets(self) -> set[tuple[str, str]]:
        """Return (process, address) of each TCP socket that the command and all that it started listen on now."""
        names = {member.pid: name for member in self.members() if (name := _name(member))}
        return {
            (names[one.pid], one.laddr.ip)
            for one in psutil.net_connections("tcp")
            if one.pid in names and one.status == psutil.CONN_LISTEN
        }

    def kill(self) -> int:
        """SIGKILL the whole tree, until nothing of it is left; return how many processes that took."""
        killed: set[psutil.Process] = set()

        def emptied() -> bool:
            for member in self.members():
                try:
                    member.kill()
                    killed.add(member)
                except psutil.NoSuchProcess:
                    continue
            return not any(_alive(member) for member in killed) and not self.members()

        wait_until(emptied, "the killed tree is gone")
        self.process.wait()
        return len(killed)

    def wait_until(self, condition: Callable[[], Any], what: str) -> None:
        """Poll until `condition` holds; fail when the command ends before."""

        def reached() -> bool:
            if condition():
                return True
            if self.process.poll() is not None:
                raise AssertionError(f"the command ended before {what}: {self.ended()}")
            return False

        wait_until(reached, what)

    def ended(self) -> Ended:
        """Wait for the command itself and return what it said."""
        code = self.process.wait(SECONDS)
        return Ended(code, *self.texts())

    def texts(self) -> tuple[str, str]:
        """Return what the command has said so far, on stdout and on stderr."""
        out, err = ((self.output / name).read_text(errors="replace") for name in ("out", "err"))
        return out, err


@dataclass
class Desk:
    """Where a user works: a home, a working directory, a Prefect history, a Ray folder, and a config file."""

    root: Path
    ray_folder: Path
    config: Path
    server: str | None = None
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def cwd(self) -> Path:
        """The working directory, where the default store and the results land."""
        return self.root / "cwd"

    @property
    def history(self) -> Path:
        """The Prefect database of the servers that commands start here."""
        return self.root / "prefect" / "prefect.db"

    @property
    def store(self) -> Store:
        """The default store of this desk."""
        return Store.open(str(self.cwd / "memmcl-store"))

    @contextmanager
    def started(self, *arguments: str | Path, program: Path = COMMAND) -> Iterator[Running]:
        """Start `memmcl ARGUMENTS`, or another program; whatever is left of it at the end of the block is killed."""
        mark = uuid.uuid4().hex
        output = self.root / "output" / mark
        output.mkdir(parents=True)
        with (output / "out").open("wb") as out, (output / "err").open("wb") as err:
            process = subprocess.Popen(
                [program, *map(str, arguments)],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                cwd=self.cwd,
                env=self._environment(mark),
                start_new_session=True,
            )
        running = Running(process, mark, output)
        try:
            yield running
        finally:
            running.kill()

    def run(self, *arguments: str | Path, program: Path = COMMAND) -> Ended:
        """Run `memmcl ARGUMENTS`, or another program, to its end; nothing that it started may outlive it."""
        with self.started(*arguments, program=program) as running:
            ended = running.ended()
            wait_until(lambda: not running.members(), f"the processes of `{program.name} {arguments[0]}` have ended")
        return ended

    def watch(self, *arguments: str | Path, program: Path = COMMAND) -> Ended:
        """Run to its end as `run` does, and keep what leaves no trace: root/kept, root/sockets.txt.

        kept: all files that it wrote to Ray's and the temporary folder, those that it removed too. sockets.txt: which
        addresses its processes listened on.
        """
        kept = self.root / "kept"
        kept.mkdir(exist_ok=True)
        sockets: set[tuple[str, str]] = set()
        with self.started(*arguments, program=program) as running:

            def ended() -> bool:
                sockets.update(running.sockets())
                for folder in (self.ray_folder, Path(self.environment.get("TMPDIR", self.ray_folder))):
                    keep(folder, kept)
                return running.process.poll() is not None

            wait_until(ended, f"the end of `{program.name} {arguments[0]}`", every=1.0)
            result = running.ended()
            wait_until(lambda: not running.members(), f"the processes of `{program.name} {arguments[0]}` have ended")
        lines = (f"{name} {address}\n" for name, address in sorted(sockets))
        (self.root / "sockets.txt").write_text("".join(lines))
        return result

    def _environment(self, mark: str) -> dict[str, str]:
        chosen = {
            "HOME": str(self.root / "home"),
            "PREFECT_HOME": str(self.root / "prefect"),
            "COLUMNS": "160",
            "RAY_TMPDIR": str(self.ray_folder),
            "OMP_NUM_THREADS": "1",
            MARK: mark,
            "SPT_NOENV": "1",  # or Ray's workers write their titles over their environment, and the mark
        }
        kept = ("PREFECT_", "AWS_", "RAY_", "MEMMCL_", "XDG_")
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(kept)}
        server = {"PREFECT_API_URL": self.server} if self.server else {}
        return inherited | chosen | server | dict(self.environment)


@contextmanager
def desk(
    root: Path, base: Path, *, server: str | None = None, environment: Mapping[str, str] | None = None
) -> Iterator[Desk]:
    """Set up a desk below `root`, with the tiny config on the tiny base. Ray's folder is short (unix sockets)."""
    for name in ("home", "cwd"):
        (root / name).mkdir(parents=True)
    config = root / "tiny.yaml"
    config.write_text(yaml.safe_dump(tiny_config(base)))
    ray_folder = Path(tempfile.mkdtemp(prefix="mm"))
    try:
        yield Desk(root, ray_folder, config, server, environment or {})
    finally:
        shutil.rmtree(ray_folder, ignore_errors=True)


def run_reference(folder: Path, base: Path) -> None:
    """Run the tiny config once, among secrets. desk/out.txt, desk/err.txt: what it printed; ray: what Ray left."""
    root = folder / "desk"
    (root / "tmp").mkdir(parents=True)
    with desk(root, base, environment=_reference_environment(root)) as place:
        ended = place.watch("run", place.config, *OVERRIDDEN)
        assert ended.code == 0, ended
        (root / "out.txt").write_text(ended.out)
        (root / "err.txt").write_text(ended.err)
        shutil.move(place.ray_folder, folder / "ray")


def open_reference(folder: Path) -> Desk:
    """Return the desk of `run_reference`; to read, not to change."""
    root = folder / "desk"
    return Desk(root, folder / "ray", root / "tiny.yaml", environment=_reference_environment(root))


def _reference_environment(root: Path) -> dict[str, str]:
    return {**SECRETS, "TMPDIR": str(root / "tmp")}


@contextmanager
def finished_desk(root: Path, base: Path, *settings: str) -> Iterator[Desk]:
    """Set up a desk at which the run with these settings went through; to read, not to change."""
    with desk(root, base) as place:
        ended = place.run("run", place.config, *settings)
        assert ended.code == 0, ended
        yield place


def wait_until(condition: Callable[[], Any], what: str, every: float = 0.02) -> None:
    """Poll until `condition` holds."""
    deadline = time.monotonic() + SECONDS
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {SECONDS:.0f} s: {what}")
        time.sleep(every)


def one_line(ended: Ended) -> str:
    """Return the error message, having made sure that nothing but it is on stderr."""
    (line,) = ended.err.strip().splitlines()
    assert line.startswith("error: "), ended
    assert "Traceback" not in ended.out
    return line


def ref_of(state: State[ArtifactRef]) -> ArtifactRef:
    """Return what a stage that was called as a function made, or found."""
    assert isinstance(state.data, ArtifactRef)
    return state.data


def manifest(store: Store, kind: str, name: str) -> Manifest:
    """Return the one artifact of this kind and name."""
    (found,) = [one for one in store.list(kind) if one.name == name]
    return found


def lease_holder(store: Store) -> int | None:
    """Return the pid that holds the lease of the store's only run, None while nobody does."""
    for path in store.objects.sizes("pointers/leases"):
        value, _ = store.read_pointer(path.removeprefix("pointers/").removesuffix(".json"))
        return None if value is None else int(value["pid"])
    return None


def frozen(root: Path) -> dict[str, tuple[int, bytes]]:
    """Return every published file of a local store: path -> (inode, content); who writes one again takes a new inode.

    The time of change is none of it: whoever reuses an artifact touches its manifest.
    """
    found = {}
    for folder in ("blobs", "manifests", "logs"):
        for path in (root / folder).rglob("*"):
            if path.is_file():
                found[path.relative_to(root).as_posix()] = (path.stat().st_ino, path.read_bytes())
    return found


def states(history: Path, table: str) -> list[tuple[str, str]]:
    """Return (name, state) of all rows in a Prefect database, `flow_run` or `task_run`, the oldest first."""
    with closing(sqlite3.connect(f"file:{history}?mode=ro", uri=True)) as connection:
        return list(connection.execute(f"select name, state_name from {table} order by created"))


def runs_of(history: Path) -> list[tuple[str, str]]:
    """Return (name, state) of all flow runs, the oldest first; the name of a whole run as its configuration has it."""
    return [(name.partition(":")[0], state) for name, state in states(history, "flow_run")]


def states_below(client: SyncPrefectClient, flow_run: UUID) -> dict[str, set[str]]:
    """Return name -> states of all task runs below a flow run that ended, once none of them is live any more."""

    def read(run_id: UUID) -> dict[str, set[str]]:
        found: dict[str, set[str]] = {}
        of_run = TaskRunFilter(flow_run_id=TaskRunFilterFlowRunId(any_=[run_id]))
        for task in client.read_task_runs(task_run_filter=of_run):
            found.setdefault(task.name, set()).add(task.state_name or "")
            parent = FlowRunFilterParentTaskRunId(any_=[task.id])
            for child in client.read_flow_runs(flow_run_filter=FlowRunFilter(parent_task_run_id=parent)):
                for name, ended in read(child.id).items():
                    found.setdefault(name, set()).update(ended)
        return found

    # Task runs reach the server as events, a little later than they end.
    wait_until(
        lambda: not {"Pending", "Running"} & set().union(*read(flow_run).values()), "nothing below it is live", 0.5
    )
    return read(flow_run)


def read_json(store: Store, artifact: Manifest, file: str) -> Any:
    """Return a JSON file of an artifact."""
    return json.loads(store.read(artifact, file))


def planted(environment: Mapping[str, str] = SECRETS) -> list[str]:
    """Return the secrets of an environment."""
    return [PASSWORD if name == "https_proxy" else value for name, value in environment.items() if name != "no_proxy"]


def keep(folder: Path, kept: Path) -> None:
    """Give each file below `folder` a second name in `kept`, so that its content outlives it."""
    for top, _, names in os.walk(folder):  # which passes over folders that are removed meanwhile
        for path in (Path(top, name) for name in names):
            with suppress(OSError):  # it ended meanwhile, or has its second name
                if path.is_file() and not path.is_symlink():
                    (kept / f"{path.stat().st_ino}-{path.name}").hardlink_to(path)


def traces(secrets: Iterable[str], *folders: Path) -> list[str]:
    """Return each file below the folders that holds one of the secrets, as it is or in base64."""
    wanted = [form for secret in secrets for form in (secret.encode(), base64.b64encode(secret.encode()).rstrip(b"="))]
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    assert files
    found = []
    for path in files:
        with suppress(FileNotFoundError):
            content = path.read_bytes()
            found += [f"{path} holds {one.decode()}" for one in wanted if one in content]
    return found


def _name(process: psutil.Process) -> str:
    try:
        return str(process.name())
    except psutil.NoSuchProcess:
        return ""


def _marked(pid: int, mark: str) -> bool:
    try:
        return f"{MARK}={mark}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:  # it ended, or it is another user's
        return False


def _alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
