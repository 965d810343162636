"""The front door: what a notebook does with it, on the tiny base; and that both drivers find the same winner."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import ray
from tiny import labelled_rows, write_adapter

import memmcl
from memmcl.errors import ConfigError, UsageError
from memmcl.search.local import LocalDriver
from tasks.search.driver import RayDriver

SETTINGS: dict[str, Any] = {"model": {"dtype": "float32", "device": "cpu"}, "search": {"population": 4}}


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> dict[str, str]:
    """The folders of two adapters; to read, not to change."""
    root = tmp_path_factory.mktemp("experts")
    return {name: str(write_adapter(root / name, tiny_base, seed=seed)) for seed, name in enumerate(("sent2", "other"))}


@pytest.fixture(scope="module")
def weak(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Rows of two subtasks, one of which an expert is called like."""
    path = tmp_path_factory.mktemp("weak") / "weak.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in labelled_rows("sent2", "irony")))
    return str(path)


def test_a_merge_is_saved_once(tiny_base: Path, experts: dict[str, str], tmp_path: Path) -> None:
    merge = memmcl.merge_experts(str(tiny_base), experts, weights={"other": 0.5})
    assert repr(merge) == f"Merge(linear of sent2=1, other=0.5 on {tiny_base})"
    assert "<td>0.5</td>" in merge._repr_html_()
    record = merge.save(tmp_path / "out")
    assert {one["name"]: one["coefficients"] for one in record["experts"]} == {"sent2": [1.0], "other": [0.5]}
    assert merge.save(tmp_path / "out") == record, "found, not made again"
    with pytest.raises(UsageError, match="holds what other arguments made"):
        memmcl.merge_experts(str(tiny_base), experts).save(tmp_path / "out")


@pytest.mark.parametrize(
    ("more", "error", "said"),
    [
        ({"method": "ties"}, UsageError, "give a rank for the nearest adapter of that rank, or full for the whole"),
        ({"method": "glue"}, ConfigError, "glue"),
        ({"sed": 1}, UsageError, "unknown option 'sed'; known ones: dtype, texts, text_tokens, seed"),
        ({"weights": [1.0]}, UsageError, "weights has 1 numbers for 2 experts"),
        ({"weights": {"third": 1.0}}, UsageError, "weights names third, which is no expert"),
        ({"weights": [0, 0]}, UsageError, "all weights are zero"),
        ({"rank": 4, "full": True}, UsageError, "rank makes an adapter and full a whole model"),
        ({"method": "regmean", "full": True}, UsageError, "regmean needs unlabelled texts of each expert"),
    ],
)
def test_arguments_that_do_not_go_together(
    tiny_base: Path, experts: dict[str, str], more: dict[str, Any], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        memmcl.merge_experts(str(tiny_base), experts, **more)


def test_ray_and_this_process_find_the_same(
    tiny_base: Path, experts: dict[str, str], weak: str, tmp_path: Path
) -> None:
    seen = []
    here = memmcl.search_merge(
        str(tiny_base), experts, weak, evaluations=11, settings=SETTINGS, on_result=lambda *one: seen.append(one)
    )
    assert len(seen) == len(here.candidates) - sum(here.candidates["reused"].to_pylist())
    try:
        settings = {**SETTINGS, "ray": {"workers": 2}}
        config = memmcl.api.searching.parse_config(settings)
        there = memmcl.search_merge(
            str(tiny_base),
            experts,
            weak,
            evaluations=11,
            settings=config,
            store=str(tmp_path / "store"),
            driver=RayDriver(config.ray),
        )
    finally:
        ray.shutdown()
    for name in ("genome", "fitness", "values", "origin", "winner"):
        assert here.candidates[name] == there.candidates[name], name
    assert (here.best, here.fitness, here.references) == (there.best, there.fitness, there.references)
    again = memmcl.search_merge(
        str(tiny_base),
        experts,
        weak,
        evaluations=11,
        settings=config,
        store=str(tmp_path / "store"),
        driver=LocalDriver(),
    )
    assert again.document == there.document, "found in the store"


def test_what_a_search_found_is_shown_and_saved(
    tiny_base: Path, experts: dict[str, str], weak: str, tmp_path: Path
) -> None:
    settings = {**SETTINGS, "search": {"population": 4, "bounds": [0.0, 1.5], "lambdas": [0.3, 0.7]}}
    found = memmcl.search_merge(str(tiny_base), experts, weak, evaluations=9, settings=settings)
    assert repr(found).startswith(f"SearchResult(fitness {found.fitness:.4f} of 9 candidates: sent2")
    assert "<svg" in found._repr_html_()
    assert found.winner.fitness == found.fitness
    assert any(any(row) for row in found.best.values()), "the winner is not the base"
    record = found.save(tmp_path / "out")
    assert record["search"]["best"] == found.fitness
    assert pq.read_table(tmp_path / "out" / "candidates.parquet").num_rows == 9
