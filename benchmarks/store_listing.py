"""How long commands take that look into a large store.

    python benchmarks/store_listing.py [--manifests N] [--runs N] [--history N] [--s3] [--repeat N]

Makes a store of 20,000 manifests, 5,000 of them runs that name twenty artifacts each, and a champion with a history of
10,000 entries, on this disk or with --s3 on an S3 server (SeaweedFS, `weed`) that is started for it. Then runs each
command in a process of its own, once without an index and --repeat times with what the first left, and prints the
seconds of the first and the median of the others. `version` is what a command takes that looks at nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests" / "helpers"), str(ROOT / "deployments")]

from seaweed import REGION  # noqa: E402
from servers import s3_server  # noqa: E402

from memmcl.store import ArtifactRef, Reign, StageSettings, Store, promote, read_champions  # noqa: E402
from memmcl.store.champion import Champions  # noqa: E402

INPUTS = 20
LOOK_UP = """
import sys
from pathlib import Path
from flows.cli.common import open_store_of, settings_of
from memmcl.api.runs import find_run

find_run(open_store_of(settings_of(None, Path(sys.argv[1]))), sys.argv[2] or "latest")
"""


def main() -> None:
    """Run the benchmark and print a line for each command."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--manifests", type=int, default=20_000)
    parser.add_argument("--runs", type=int, default=5_000)
    parser.add_argument("--history", type=int, default=10_000)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--s3", action="store_true")
    options = parser.parse_args()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        url, settings = str(folder / "store"), {}
        if options.s3:
            server = stack.enter_context(s3_server())
            os.environ.update(server.environment)
            url = f"s3://{server.bucket}/store"
            settings = {"endpoint_url": server.endpoint_url, "region": REGION}
        store = Store.open(url, **settings)
        config = folder / "config.yaml"
        lines = [f"  {name}: {value}" for name, value in {"url": url, **settings}.items()]
        config.write_text("\n".join(["store:", *lines, ""]))
        started = time.perf_counter()
        key = make(store, options.manifests, options.runs, options.history)
        print(f"{options.manifests:,} manifests, {options.runs:,} runs, made in {time.perf_counter() - started:.0f} s")
        for title, command in commands(config, key):
            seconds = [measured(command, folder) for _ in range(1 + options.repeat)]
            print(f"{title:28} first {seconds[0]:6.2f}   then {statistics.median(seconds[1:]):6.2f}", flush=True)


def make(store: Store, manifests: int, runs: int, history: int) -> str:
    """Write the manifests and the champion's history; return the key of a run in the middle."""
    others = [ref("expert", number) for number in range(manifests - runs)]
    with ThreadPoolExecutor(store.objects.backend.parallel) as pool:
        list(pool.map(lambda number: publish(store, others[number], number), range(len(others))))
        list(pool.map(lambda number: publish(store, ref("run", number), number, others), range(runs)))
    reigns = [
        Reign(
            run_id=ref("run", number % runs).key,
            name="run",
            since="2026-01-01T00:00:00+00:00",
            how="promotion",
            why="better than the champion by +0.031 ± 0.011 over 16 subtasks",
            unified=0.5,
            unified_se=0.01,
        )
        for number in range(history)
    ]
    promote(store, Champions("champion", tuple(reigns[:-1]), None), reigns[-1])
    assert len(read_champions(store, "champion").history) == history
    return ref("run", runs // 2).key


def ref(kind: str, number: int) -> ArtifactRef:
    """Return the reference of an artifact that this benchmark makes."""
    key = hashlib.sha256(f"{kind} {number}".encode()).hexdigest()
    return ArtifactRef(kind=kind, key=key, name=f"{kind} {number}")


def publish(store: Store, what: ArtifactRef, number: int, others: list[ArtifactRef] | None = None) -> None:
    """Publish an artifact; with `others` a run that names some of them."""
    inputs = [others[(number * INPUTS + place) % len(others)] for place in range(INPUTS)] if others else []
    store.publish(
        what.kind,
        what.key,
        name=what.name,
        files={"file": b"report" if others else b"rows"},
        inputs=inputs,
        settings=StageSettings({"experts": {"steps": 80, "rank": 8}}),
        seconds=1.0,
        metrics={"loss": [0.5] * 20},
    )


def commands(config: Path, key: str) -> Iterator[tuple[str, list[str]]]:
    """Yield title and command."""
    shared = ["--config", str(config)]
    cli = [sys.executable, "-m", "flows.cli.root"]
    look_up = [sys.executable, "-c", LOOK_UP, str(config)]
    yield "version", [*cli, "version"]
    yield "report: the latest run", [*look_up, ""]
    yield "report RUN, predict --run", [*look_up, key[:8]]
    yield "predict --run champion", [*look_up, "champion"]
    yield "store show KEY", [*cli, "store", "show", key[:12], *shared]
    yield "store ls run", [*cli, "store", "ls", "run", *shared]
    yield "store ls", [*cli, "store", "ls", *shared]
    yield "champion history", [*cli, "champion", "history", *shared]
    yield "store gc --keep-runs 100", [*cli, "store", "gc", "--keep-runs", "100", *shared]


def measured(command: list[str], folder: Path) -> float:
    """Run a command and return the seconds that it took."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "160"}
    started = time.perf_counter()
    ended = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise SystemExit(f"{' '.join(command)}: {ended.stderr}")
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
