"""Where the seconds of a run go that are not work: a DAG of sixteen subtasks whose work is next to nothing.

    python benchmarks/orchestration.py [--repeat N]

A tiny random Llama, one training step an expert, the fewest candidates, eight rows a part. `memmcl run` is timed from
outside; the table is read from the run's Prefect history and from the manifests of its store. "Work" is what stages
spend in their core functions: what manifests and, for searches, the records of candidates say. Tasks that ran side by
side share the clock, so their work counts in wall time: the union of their intervals; that of candidates, which say how
long they took but not when, is shared out evenly over the workers. All else is orchestration.
"""

from __future__ import annotations

import argparse
import json
import os
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "helpers"))

import yaml  # noqa: E402
from tiny import make_sixteen, make_tiny_base  # noqa: E402

from memmcl.store import Manifest, Store  # noqa: E402
from memmcl.suite.subtasks import SUBTASKS  # noqa: E402

Interval = tuple[float, float]
WORKERS = 2


def main() -> None:
    """Run the benchmark and print one table per repetition."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeat", type=int, default=1, help="how many runs, each in an empty store")
    for number in range(parser.parse_args().repeat):
        with tempfile.TemporaryDirectory(prefix="mmo") as folder:
            print(f"run {number + 1}")
            measure(Path(folder))


def measure(root: Path) -> None:
    """Run sixteen subtasks below `root` and print where the seconds went."""
    config = root / "sixteen.yaml"
    base, data = make_tiny_base(root / "base"), make_sixteen(root / "data")
    config.write_text(yaml.safe_dump(settings(base, data)))
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "RAY_"))},
        "PREFECT_HOME": str(root / "prefect"),
        "HOME": str(root),
        "OMP_NUM_THREADS": "1",
    }
    started = time.time()
    command = [str(Path(sys.executable).with_name("memmcl")), "run", str(config)]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    ended = time.time()
    if done.returncode:
        sys.exit(done.stderr[-4000:])
    history = read_history(root / "prefect" / "prefect.db")
    report(started, ended, history, Store.open(str(root / "memmcl-store")))


def settings(base: Path, data: Path) -> dict[str, object]:
    """Return a run of all subtasks with the least work that still is a run."""
    return {
        "name": "sixteen",
        "model": {"name_or_path": str(base), "dtype": "float32"},
        "data": {
            "source": str(data),
            "subtasks": list(SUBTASKS),
            "train_rows": 8,
            "weak_rows": 4,
            "test_rows": 4,
            "on_overlap": "drop",
            "max_prompt_tokens": 512,
        },
        "experts": {
            "steps": 1,
            "batch_size": 2,
            "rank": 2,
            "adapt_layers": "top-1",
            "anchor_batch_size": 2,
            "anchor_rows": 2,
        },
        "search": {"stage1_evaluations": 4, "stage2_evaluations": 4, "population": 4, "lambdas": [0.5]},
        "curriculum": {"contexts": ["zero-shot"]},
        "ray": {"workers": WORKERS},
        "evaluation": {"max_new_tokens": 1, "bootstrap_samples": 100, "joint_lora": False},
    }


def read_history(database: Path) -> dict[str, Interval]:
    """Return start and end of every flow run, and of the task runs by kind, from the Prefect database."""
    found: dict[str, Interval] = {}
    with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
        for table in ("flow_run", "task_run"):
            rows = connection.execute(f"select name, start_time, end_time from {table} where start_time is not null")
            for name, start, end in rows:
                found[f"{table}:{name}"] = (_seconds(start), _seconds(end))
    return found


def report(started: float, ended: float, history: dict[str, Interval], store: Store) -> None:
    """Print the table."""
    flows = {name.partition(":")[2]: span for name, span in history.items() if name.startswith("flow_run:")}
    (main_flow,) = [span for name, span in flows.items() if name.startswith("sixteen")]
    manifests = store.list()
    work = {
        "experts": union(intervals(manifests, "expert", "reference")),
        "merge": searched(store) + union(intervals(manifests, "unified")),
        "evaluation": union(intervals(manifests, "gate", "evaluation")),
    }
    rows = [("imports, reading data and base, Prefect server", main_flow[0] - started, 0.0)]
    before = main_flow[0]
    for name, label in (("experts", "Ray start, splits"), ("merge", ""), ("evaluation", "difficulty")):
        start, end = flows[name]
        rows.append((label or f"before {name}", start - before, 0.0))
        rows.append(
            (
                f"sub-flow {name}: {sum(k.startswith('task_run:') for k in history)} task runs in all"
                if name == "experts"
                else f"sub-flow {name}",
                end - start,
                work[name],
            )
        )
        before = end
    rows.append(("report", main_flow[1] - before, 0.0))
    rows.append(("Ray and server stop, results shown", ended - main_flow[1], 0.0))
    wall, worked = ended - started, sum(row[2] for row in rows)
    print(f"{'where':58} {'wall':>7} {'work':>7} {'orchestration':>14}")
    for label, seconds, busy in [*rows, ("total", wall, worked)]:
        print(f"{label:58} {seconds:7.1f} {busy:7.1f} {seconds - busy:14.1f}")
    print(json.dumps({"wall": round(wall, 1), "work": round(worked, 1), "orchestration": round(wall - worked, 1)}))


def intervals(manifests: Iterable[Manifest], *kinds: str) -> list[Interval]:
    """Return when the artifacts of these kinds were made, from start to end."""
    made = [(datetime.fromisoformat(one.created).timestamp(), one.seconds) for one in manifests if one.kind in kinds]
    return [(end - seconds, end) for end, seconds in made]


def searched(store: Store) -> float:
    """Return the seconds that candidates took, on each of the workers."""
    documents = [json.loads(store.read(one, "search.json")) for one in store.list("search")]
    spent = [entry["seconds"] for document in documents for entry in document["candidates"]]
    return sum(seconds["merge"] + seconds["evaluate"] for seconds in spent) / WORKERS


def union(spans: list[Interval]) -> float:
    """Return the seconds that any of the spans covers."""
    covered, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        covered += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return covered


def _seconds(text: str) -> float:
    return datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()


if __name__ == "__main__":
    main()
