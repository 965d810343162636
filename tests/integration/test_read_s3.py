"""Rows on a real S3 server."""

import csv
import io
import json
from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import s3fs
import torch
from seaweed import REGION
from servers import S3Server

from memmcl.adapters.format import CONFIG_FILE, Factors, to_files
from memmcl.adapters.load import read_user_adapter
from memmcl.errors import DataError, ModelError
from memmcl.suite.sources import Reading, RowPools, Source, read_sources
from memmcl.suite.subtasks import SUBTASKS

ASC = SUBTASKS["asc"]
ROWS = [
    {"text": f'It said "{number}",\nthen 😀', "aspect": f"part {number}", "label": ("positive", "neutral")[number % 2]}
    for number in range(300)
]


@pytest.fixture(scope="module")
def storage(s3: S3Server) -> Mapping[str, Any]:
    return {"endpoint_url": s3.endpoint_url, "client_kwargs": {"region_name": REGION}}


@pytest.fixture(scope="module")
def bucket(s3: S3Server, storage: Mapping[str, Any]) -> str:
    """The URL of a folder with the same rows in three formats, and in SentiEval's layout."""
    texts = io.StringIO(newline="")
    writer = csv.DictWriter(texts, ["text", "aspect", "label"])
    writer.writeheader()
    writer.writerows(ROWS)
    table = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(ROWS), table, row_group_size=64)
    lines = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    files = {"a.jsonl": lines, "a.csv": texts.getvalue().encode(), "a.parquet": table.getvalue()}
    files |= {f"suite/sc/asc_lap14/{part}.jsonl": lines for part in ("train", "dev", "test")}
    folder = f"{s3.bucket}/reading"
    fs = s3fs.S3FileSystem(**storage)
    for name, data in files.items():
        fs.pipe_file(f"{folder}/{name}", data)
    return f"s3://{folder}"


def read(url: str, storage: Mapping[str, Any]) -> RowPools:
    return read_sources([ASC], Reading(sources={"asc": Source(path=url)}, storage=storage))


def test_the_same_rows_are_read_from_every_format(bucket: str, storage: Mapping[str, Any]) -> None:
    reads = [read(f"{bucket}/a.{ending}", storage) for ending in ("jsonl", "csv", "parquet", "p*")]
    for found in reads:
        assert found.faults.first == []
        assert sum(len(rows) for rows in found.pools["asc"].values()) == len(ROWS)
        assert found.pools == reads[0].pools
    folder = read(bucket, storage)
    assert folder.faults.counts == {"repeated row": 2 * len(ROWS)}
    assert folder.pools == reads[0].pools


def test_a_directory_in_sentievals_layout_is_read(bucket: str, storage: Mapping[str, Any]) -> None:
    found = read_sources([ASC], Reading(source=f"{bucket}/suite", storage=storage))
    assert found.faults.first == []
    assert {part: len(rows) for part, rows in found.pools["asc"].items()} == dict.fromkeys(
        ("train", "weak", "test"), len(ROWS)
    )
    bad = read_sources([SUBTASKS["asc"]], Reading(source=f"{bucket}/suite", storage=storage, max_characters=5))
    assert bad.faults.first[0].place == f"{bucket}/suite/sc/asc_lap14/train.jsonl, line 1"


def test_what_is_not_there_or_not_ours_is_one_line(
    bucket: str, storage: Mapping[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DataError, match=r"no data file at s3://.*/nowhere\.csv; expected"):
        read(f"{bucket}/nowhere.csv", storage)
    with pytest.raises(DataError, match=r"'s3://.*/nowhere' is not a directory"):
        read_sources([ASC], Reading(source=f"{bucket}/nowhere", storage=storage))
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(DataError, match=r"no access to s3://.*/a\.csv; check the credentials") as caught:
        read(f"{bucket}/a.csv", storage)
    assert "wrong" not in str(caught.value)


def test_an_adapter_is_read(s3: S3Server, storage: Mapping[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    files = to_files(
        {"model.layers.0.x": Factors(torch.ones(2, 3), torch.ones(4, 2), 1.5)}, base_name="b", rank=2, alpha=3
    )
    fs = s3fs.S3FileSystem(**storage)
    for name, data in files.items():
        fs.pipe_file(f"{s3.bucket}/adapters/mine/{name}", data)
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.endpoint_url)
    monkeypatch.setenv("AWS_DEFAULT_REGION", REGION)
    place = f"s3://{s3.bucket}/adapters/mine"
    found = read_user_adapter("mine", place)
    assert (found.files, found.place, found.base_name, found.rank) == (files, place, "b", 2)
    fs.rm(f"{s3.bucket}/adapters/mine/{CONFIG_FILE}")
    with pytest.raises(ModelError, match=r"expert mine: s3://.*/adapters/mine has no adapter_config\.json; give a"):
        read_user_adapter("mine", place)
    with pytest.raises(ModelError, match=r"expert mine: s3://no-such-bucket/mine has no|there is no s3://no-such"):
        read_user_adapter("mine", "s3://no-such-bucket/mine")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(ModelError, match="expert mine: no access to s3://"):
        read_user_adapter("mine", place)
