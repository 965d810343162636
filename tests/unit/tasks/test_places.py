"""Where a run's rows lie, and that they stay what they were while it starts."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import make_sixteen

from memmcl.backbone.resident import Base
from memmcl.config import RunConfig, parse_config
from memmcl.errors import ConfigError, DataError
from memmcl.suite.configured import read_splits
from tasks.run.runtime import Run
from tasks.stages.data import check_unchanged, rows_digest
from tasks.stages.opening import check_place

OWN = {"name": "own", "group": "SC", "instruction": "Which?", "labels": ["a", "b"]}


def run_of(config: RunConfig, rows: str) -> Run:
    base = Base(name="b", digest="d", licence=None, dtype="float32", device="cpu", layers=2, split=0)
    return Run(id="0" * 64, config=config, base=base, store={}, command="", rows=rows)


def test_rows_that_change_while_a_run_starts_are_refused(tmp_path: Path) -> None:
    data = make_sixteen(tmp_path / "rows")
    config = parse_config({"data": {"source": str(data), "subtasks": ["irony"]}})
    run = run_of(config, rows_digest(read_splits(config), None))
    check_unchanged(run, read_splits(config), None)
    file = data / "mast" / "irony" / "train.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[1:]))
    with pytest.raises(DataError, match="rows changed while run 00000000 was starting; start it again"):
        check_unchanged(run, read_splits(config), None)


@pytest.mark.parametrize(
    ("data", "setting"),
    [
        ({"source": "rows"}, r"data\.source"),
        ({"subtasks": ["irony"], "sources": {"irony": {"path": "a.csv"}}}, r"data\.sources\.irony\.path"),
        (
            {"subtasks": ["own"], "custom": [OWN | {"data": {"train": "/a.csv", "test": "b.csv"}}]},
            r"data\.custom\.0\.data\.test",
        ),
    ],
)
def test_a_deployment_reads_no_relative_place(
    data: dict[str, object], setting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = parse_config({"data": data, "store": {"url": "s3://bucket/store"}})
    check_place(config)  # a person's own run may
    monkeypatch.setenv("PREFECT__RUNTIME__DEPLOYMENT__ID", "some-deployment")
    with pytest.raises(ConfigError, match=f"{setting} of a deployment must be absolute"):
        check_place(config)


def test_a_deployment_reads_no_relative_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT__RUNTIME__DEPLOYMENT__ID", "some-deployment")
    experts = {"anchor_source": "texts", "anchor_texts": "texts.txt"}
    with pytest.raises(ConfigError, match=r"experts\.anchor_texts of a deployment must be absolute"):
        check_place(parse_config({"experts": experts, "store": {"url": "s3://bucket/store"}}))


def test_a_deployment_reads_absolute_places_and_data_sets_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT__RUNTIME__DEPLOYMENT__ID", "some-deployment")
    hub = {"dataset": "someone/stance", "train": "train[:90%]"}
    check_place(
        parse_config(
            {
                "data": {
                    "source": "s3://bucket/rows",
                    "subtasks": ["stance", "irony"],
                    "sources": {"stance": hub, "irony": {"path": "/data/*.csv"}},
                },
                "store": {"url": "/store"},
            }
        )
    )
