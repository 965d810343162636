"""`memmcl merge search` on a real Ray: the pipeline's search on adapters and rows that a user brings."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny import corpus, labelled_rows, naive_logprob, plain_model, probe_logits, tokenizer_of, write_adapter

from flows.cli import merge_search
from memmcl.adapters.format import WEIGHTS_FILE
from memmcl.search.local import LocalDriver
from memmcl.store import Store
from tasks.search.queue import RayQueue

pytestmark = pytest.mark.timeout(900)
Call = Callable[..., tuple[int, str, str]]
EVALUATIONS = 11
KEPT = 4
SEEDS = ["base", "expert:sent2", "expert:other", "uniform", *(f"arithmetic:{x:g}" for x in (0.3, 0.7, 1, 1.3))]


@pytest.fixture(scope="module")
def brought(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> dict[str, Path]:
    """The folders of two adapters; to read, not to change."""
    root = tmp_path_factory.mktemp("brought")
    return {
        "sent2": write_adapter(root / "sent2", tiny_base, seed=0, layers=(3,)),
        "other": write_adapter(root / "other", tiny_base, seed=1),
    }


PAIRS = [(f"Mood of {row.text}\n=", f" {row.gold}") for row in corpus("emotion", 5)]


@pytest.fixture(scope="module")
def weak(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of two subtasks, one of which an expert is called like, and pairs."""
    rows = labelled_rows("sent2", "irony")
    rows += [{"prompt": prompt, "answer": answer} for prompt, answer in PAIRS]
    path = tmp_path_factory.mktemp("weak") / "weak.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def call(command_line: Call) -> Call:
    """Run the command in this process, in an empty directory; what it leaves there is checked by the test."""
    return partial(command_line, "merge", "search")


@pytest.fixture
def given(tiny_base: Path, brought: dict[str, Path], weak: Path) -> list[object]:
    """The arguments of a call that would be right, but for --out."""
    experts = [word for name, place in brought.items() for word in ("--expert", f"{name}={place}")]
    settings = ["--set", "model.dtype=float32", "--set", "search.population=4"]
    return ["--base", tiny_base, *experts, "--weak", weak, "--evaluations", EVALUATIONS, "--workers", 1, *settings]


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the command search in this process, without Ray."""
    monkeypatch.setattr(merge_search, "_driver", lambda settings: LocalDriver())


def result(folder: str) -> dict[str, Any]:
    """Return what a search made, but for where its store lay."""
    record: dict[str, Any] = json.loads(Path(folder, "merge.json").read_text())
    del record["search"]["store"], record["files"]
    return record


def refused(call: Call, code: int, words: list[object], *expected: str) -> None:
    ended, _, err = call(*words)
    assert ended == code, err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    for part in expected:
        assert part in err
    assert not Path("m").exists()


def test_a_search_and_one_that_was_killed_find_the_same(
    local_ray: None,
    call: Call,
    given: list[object],
    brought: dict[str, Path],
    tiny_base: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    code, out, err = call(*given, "--store", "one", "--out", "merged")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == "weak rows      6 of irony, 5 of pairs, 6 of sent2"
    head = next(number for number, line in enumerate(lines) if line.split()[:1] == ["candidate"])
    assert lines[head].split() == ["candidate", "fitness", "irony", "pairs", "sent2"]
    record = result("merged")
    found = record["search"]
    shown = [line.split()[0] for line in lines[head + 1 : head + 9]]
    assert sorted([*shown[:-1], found["origin"].removeprefix("seed:")]) == sorted(SEEDS) or shown == SEEDS
    assert any(line.strip().startswith("winner (") for line in lines)
    assert lines[-1] == "candidates     merged/candidates.parquet"

    table = pq.read_table("merged/candidates.parquet").to_pylist()
    assert [row["origin"].removeprefix("seed:") for row in table[: len(SEEDS)]] == SEEDS
    assert len(table) == found["evaluations"] == EVALUATIONS
    (winner,) = [row for row in table if row["winner"]]
    assert winner["fitness"] == found["best"] == max(row["fitness"] for row in table if not row["stopped"])
    coefficients = {one["name"]: one["coefficients"][0] for one in record["experts"]}
    assert dict(winner["genome"]) == {f"{name}/0": value for name, value in coefficients.items()}
    check_retention(table, found["held_to"], tiny_base, brought)
    made = PeftModel.from_pretrained(plain_model(tiny_base), "merged").eval()
    assert (probe_logits(made) - probe_logits(summed(tiny_base, brought, coefficients))).abs().max() < 2e-4

    handed_out = []
    put = RayQueue.put
    monkeypatch.setattr(RayQueue, "put", lambda *given: handed_out.append(given[1]) or put(*given))
    as_if_killed(Path("one"), Path("two"), found["key"])
    code, out, err = call(*given, "--store", "two", "--out", "again")
    assert (code, err) == (0, "")
    assert result("again") == record
    assert len(handed_out) == EVALUATIONS - KEPT - len([row for row in table[KEPT:] if row["reused"]])
    handed_out.clear()
    code, out, _ = call(*given, "--store", "two", "--out", "again")
    assert (code, handed_out) == (0, [])
    assert "again is there already, made with the same arguments; it is:" in out
    refused(call, 2, [*given, "--seed", 1, "--store", "two", "--out", "again"], "again holds what other arguments made")


def as_if_killed(whole: Path, left: Path, key: str) -> None:
    """Make a store like the one that a kill after a few candidates leaves."""
    shutil.copytree(whole, left)
    (left / "manifests" / "search" / f"{key}.json").unlink()
    (searched,) = (left / "logs" / "searches").iterdir()
    for path in sorted(searched.iterdir())[KEPT:]:
        path.unlink()
    assert len(Store.open(str(left)).records(f"searches/{searched.name}")) == KEPT


def summed(base: Path, brought: dict[str, Path], coefficients: dict[str, float]) -> torch.nn.Module:
    """Return the plain model with PEFT's own deltas added in float64."""
    model = plain_model(base)
    for name, place in brought.items():
        for module, layer in PeftModel.from_pretrained(plain_model(base), place).get_base_model().named_modules():
            if hasattr(layer, "get_delta_weight"):
                weight = model.get_submodule(module).weight
                added = coefficients[name] * layer.get_delta_weight("default").detach().double()
                weight.data = (weight.data.double() + added).float()
    return model


def check_retention(table: list[dict[str, Any]], held_to: dict[str, str], base: Path, brought: dict[str, Path]) -> None:
    """Compare the retention of seeds on pairs with likelihoods of plain models, row by row."""
    tokenizer = tokenizer_of(base)
    rows = [
        (
            tokenizer.encode(prompt, add_special_tokens=False),
            [*tokenizer.encode(answer, add_special_tokens=False), tokenizer.eos_token_id],
        )
        for prompt, answer in PAIRS
    ]
    alone = {
        "base": plain_model(base),
        **{f"expert:{name}": summed(base, {name: place}, {name: 1.0}) for name, place in brought.items()},
    }
    tokens = sum(len(answer) for _, answer in rows)
    logliks = {name: sum(naive_logprob(model, *row) for row in rows) / tokens for name, model in alone.items()}
    best = max(logliks, key=lambda name: logliks[name])
    assert held_to["pairs"] == best.removeprefix("expert:")
    assert held_to["sent2"] == "sent2"
    for row in table[:3]:
        expected = min(1.2, np.exp(logliks[row["origin"].removeprefix("seed:")] - logliks[best]))
        assert dict(row["values"])["pairs"] == pytest.approx(expected, rel=1e-4)


def test_another_method_in_blocks_with_a_subtask_of_ones_own(
    in_this_process: None, call: Call, given: list[object], weak: Path, tmp_path: Path
) -> None:
    lines = [json.loads(line) for line in weak.read_text().splitlines()]
    rows = [row | {"expert": "other"} for row in lines if row.get("subtask") == "irony"]
    rows += [
        {"subtask": "mood", "text": row["text"], "label": "light"} for row in lines if row.get("subtask") == "sent2"
    ]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "run.yaml").write_text(
        "data:\n  subtasks: [mood]\n  custom:\n    - {name: mood, group: SC, instruction: Dark or light, "
        "labels: [dark, light], data: {path: none.csv}}\n"
    )
    words = [*given, "--weak", tmp_path / "own.jsonl", "--config", tmp_path / "run.yaml"]
    words += ["--method", "ties", "--param", "density=0.4", "--set", "search.genes={scale: [0.5, 1.5]}"]
    words += ["--evaluations", 9, "--blocks", 2, "--store", "store", "--out", "merged"]
    code, out, err = call(*words, "--rank", 3)
    assert (code, err) == (0, "")
    assert "weak rows      6 of irony:other, 6 of mood" in out
    assert "method         ties, density 0.4, scale" in out
    assert "relative error" in out
    record = json.loads(Path("merged", "merge.json").read_text())
    assert record["search"]["held_to"]["irony:other"] == "other"
    assert [len(one["coefficients"]) for one in record["experts"]] == [2, 2]
    assert record["made_from"]["recipe"]["parameters"]["density"] == 0.4
    genome = pq.read_table("merged/candidates.parquet").to_pylist()[0]["genome"]
    assert [name for name, _ in genome] == ["sent2/0", "sent2/1", "other/0", "other/1", "scale"]


def test_rows_without_labels_are_held_to_what_their_expert_expects(
    in_this_process: None, call: Call, given: list[object], weak: Path, tmp_path: Path
) -> None:
    lines = [json.loads(line) for line in weak.read_text().splitlines() if "subtask" in line]
    bare = [{"subtask": row["subtask"], "text": row["text"]} for row in lines]
    rows = [row | ({"expert": "other"} if row["subtask"] == "irony" else {}) for row in bare]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [*given, "--weak", tmp_path / "rows.jsonl", "--fitness", "agree", "--store", "store", "--out", "merged"]
    code, _, err = call(*words)
    assert (code, err) == (0, "")
    table = pq.read_table("merged/candidates.parquet").to_pylist()
    values = {row["origin"].removeprefix("seed:"): dict(row["values"]) for row in table}
    assert values["expert:sent2"]["sent2"] == pytest.approx(1, abs=1e-6)
    assert values["expert:other"]["irony:other"] == pytest.approx(1, abs=1e-6)
    assert values["base"]["sent2"] < 0.9999
    assert all(0 <= value <= 1 for row in table for value in dict(row["values"]).values())
    store = Store.open("store")
    for one in store.list("reference"):
        document = json.loads(store.read(one.ref, "reference.json"))
        assert [document["expert"][kind] for kind in ("loglik", "choice", "score")] == [None] * 3
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in bare))
    words[-1] = "m"
    refused(call, 2, words, "rows of irony name none; call an expert like the subtask")
    refused(call, 1, [*words, "--fitness", "loglik"], "no column 'label'")


def test_where_no_merge_beats_the_base_none_is_written(
    in_this_process: None, call: Call, given: list[object], brought: dict[str, Path], weak: Path, tmp_path: Path
) -> None:
    nothing = shutil.copytree(brought["other"], tmp_path / "nothing")
    tensors = load_file(nothing / WEIGHTS_FILE)
    save_file({name: torch.zeros_like(tensor) for name, tensor in tensors.items()}, nothing / WEIGHTS_FILE)
    rows = [line for line in weak.read_text().splitlines() if "subtask" in line]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    words = [*given[:2], "--expert", f"irony={nothing}", *given[8:], "--weak", tmp_path / "rows.jsonl"]
    code, out, err = call(*words, "--weak", tmp_path / "rows.jsonl", "--fitness", "metric", "--out", "m")
    assert code == 1
    assert "winner (base)" in out
    assert err.startswith("error: the base alone does best on these rows, so that there is nothing to write; ")
    assert not Path("m").exists()


@pytest.mark.parametrize(
    ("more", "code", "expected"),
    [
        (["--fitness", "metric"], 2, "--fitness: pairs of prompt and answer have no metric"),
        (["--fitness", "agree"], 2, "--fitness: pairs of prompt and answer have no metric, and no labels to agree on"),
        (["--store", "memory://x"], 2, "--store: workers are processes of their own and cannot see memory://x"),
        (["--weak", "none.jsonl"], 1, "no data file at none.jsonl"),
        (["--method", "ties"], 2, "give --rank R for the nearest adapter of that rank, or --full"),
        (["--method", "glue"], 2, "--method: input should be 'linear', 'ties'"),
        (["--param", "density=1"], 2, "--param: linear takes no parameter; got 'density'"),
        (["--set", "search.genes={density: [0, 1]}"], 2, "linear takes no parameter; got 'density'"),
        (["--set", "data.max_prompt_tokens=16"], 2, "--set data.max_prompt_tokens is 16, but the"),
        (["--workers", 9], 2, "search.lookahead (4) must be at least --workers (9)"),
        (["--expert", "base=none"], 2, "base is what the base itself is called; give the expert another name"),
        (["--expert", "a=none"], 1, "expert a: there is no none"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_mistakes_show_before_anything_starts(
    call: Call, given: list[object], more: list[object], code: int, expected: str
) -> None:
    refused(call, code, [*given, *more, "--out", "m"], expected)


def test_names_and_folders_that_are_taken(call: Call, given: list[object], brought: dict[str, Path]) -> None:
    refused(call, 2, [*given, "--expert", f"base={brought['other']}", "--out", "m"], "base is what the base itself is")
    Path("mine").mkdir()
    Path("mine", "notes").write_text("mine")
    refused(call, 2, [*given, "--out", "mine"], "mine holds other files")
    refused(call, 2, given[:6], "expected --base, --expert and --out, got no --out")
    refused(call, 2, [*given[:6], "--out", "m"], "expected --weak, a file of weak rows, got none")
