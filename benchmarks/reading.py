"""How much memory it takes to read a Parquet file of many rows from the store.

    python benchmarks/reading.py [--rows N] [--store URL [--endpoint URL]]

Writes a file of 200,000 rows, about 120 characters of text each, in row groups of 20,000, and reads it through
`read_sources` in a process of its own. Without --store an S3 server (SeaweedFS, `weed`) is started for it. Prints rows,
seconds and the most memory that the reading process ever held, and the same of a process that imports all that the
other does and reads ten rows.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests" / "helpers"), str(ROOT / "deployments")]

import fsspec  # noqa: E402
import pyarrow as pa  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402
from seaweed import REGION  # noqa: E402
from servers import s3_server  # noqa: E402

GROUP_ROWS = 20_000
FEW = 10
LIMIT_MB = 500

_READER = r"""
import json, re, sys, time
from pathlib import Path

from memmcl.suite.sources import Reading, Source, read_sources
from memmcl.suite.subtasks import SUBTASKS

url, storage = sys.argv[1], json.loads(sys.argv[2])
started = time.monotonic()
read = read_sources([SUBTASKS["sent2"]], Reading(sources={"sent2": Source(path=url)}, storage=storage))
kept = sum(len(rows) for rows in read.pools["sent2"].values())
print(json.dumps({
    "rows": kept + read.dropped.total() + len(read.faults),
    "kept": kept,
    "faults": len(read.faults),
    "seconds": time.monotonic() - started,
    "megabytes": int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024,
}))
"""


def main() -> None:
    """Run the benchmark and print its two lines; exit with 1 when the limit is passed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--store", help="folder for the file: a directory or s3://bucket/folder; default: an S3 server")
    parser.add_argument("--endpoint", help="address of the S3 server of --store")
    arguments = parser.parse_args()
    with ExitStack() as stack:
        if arguments.store is None:
            server = stack.enter_context(s3_server())
            os.environ.update(server.environment)
            folder, endpoint = f"s3://{server.bucket}/benchmark", server.endpoint_url
        else:
            folder, endpoint = arguments.store.rstrip("/"), arguments.endpoint
        storage = {"endpoint_url": endpoint, "client_kwargs": {"region_name": REGION}} if endpoint else {}
        few = measure(folder, FEW, storage)
        many = measure(folder, arguments.rows, storage)
    sys.exit(f"more than {LIMIT_MB} MB" if max(few, many) > LIMIT_MB else 0)


def measure(folder: str, rows: int, storage: Mapping[str, object]) -> float:
    """Write `rows` rows, read them in a fresh process, remove them; print and return its peak memory in MB."""
    url = f"{folder}/reading-{rows}.parquet"
    fs, path = fsspec.url_to_fs(url, **(storage if url.startswith("s3://") else {}))
    if not url.startswith("s3://"):
        fs.makedirs(str(Path(path).parent), exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="mmr") as scratch:
        local = Path(scratch, "rows.parquet")
        size = write(local, rows)
        fs.put_file(str(local), path)
    try:
        command = [sys.executable, "-c", _READER, url, json.dumps(storage)]
        ended = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    finally:
        fs.rm_file(path)
    told = json.loads(ended.stdout)
    assert told["rows"] == rows, told
    print(
        f"{told['rows']:>7} rows, {size / 2**20:5.1f} MB: {told['kept']} kept, {told['faults']} faults, "
        f"{told['seconds']:.1f} s, peak {told['megabytes']:.0f} MB",
        flush=True,
    )
    return float(told["megabytes"])


def write(path: Path, rows: int) -> int:
    """Write a Parquet file of invented rows, group by group, and return its size in bytes."""
    generator = random.Random(0)
    words = ["".join(generator.choices("abcdefghijklmnopqrstuvwxyz", k=generator.randint(2, 9))) for _ in range(20_000)]
    schema = pa.schema([("text", pa.string()), ("label", pa.string()), ("unused", pa.string())])
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, rows, GROUP_ROWS):
            numbers = range(start, min(start + GROUP_ROWS, rows))
            texts = [f"{' '.join(generator.choices(words, k=17))} {number}" for number in numbers]
            labels = [("positive", "negative")[number % 2] for number in numbers]
            writer.write_table(pa.table({"text": texts, "label": labels, "unused": texts[::-1]}, schema=schema))
    return path.stat().st_size


if __name__ == "__main__":
    main()
