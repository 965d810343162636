"""The README.md of a merge of a user's own adapters, in the form of a Hugging Face model card."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from memmcl.report.markdown import front_matter, loading_code, plain_text, render, table

Record = Mapping[str, Any]  # what `merge.json` holds


def merge_card(record: Record) -> str:
    """Return README.md for the merge that `record` describes."""
    base, adapter = record["base"], record["output"]["form"] == "adapter"
    tags, relation = ["merge", "model-merging"], "adapter" if adapter else "merge"
    return render(
        "merge_card.md.j2",
        front=front_matter(base["name"], base["licence"], tags, adapter=adapter, base_model_relation=relation),
        r=record,
        adapter=adapter,
        experts=[expert for expert in record["experts"] if any(expert["coefficients"])],
        coefficients=_coefficients(record),
        code=loading_code(base["name"], adapter=adapter),
        command=_command(record),
    )


def _coefficients(record: Record) -> str:
    blocks = len(record["experts"][0]["coefficients"])
    weights = ["weight"] if blocks == 1 else [f"block {number}" for number in range(1, blocks + 1)]
    head = ["expert", *weights, "rank", "modules", "from", "sha256 of its weights"]
    rows = [
        [
            plain_text(expert["name"]),
            *(f"{value:.6g}" for value in expert["coefficients"]),
            str(expert["rank"]),
            str(expert["modules"]),
            plain_text(expert["place"]),
            expert["sha256"]["adapter_model.safetensors"],
        ]
        for expert in record["experts"]
    ]
    return table(head, rows, left=(0, len(head) - 2, len(head) - 1))


def _command(record: Record) -> str:
    """Return the command that makes the same merge."""
    recipe, output = record["made_from"]["recipe"], record["made_from"]["output"]
    words = ["memmcl", "merge", "--base", record["base"]["name"]]
    for expert in record["experts"]:
        words += ["--expert", f"{expert['name']}={expert['place']}"]
    weights = [repr(expert["coefficients"][0]).removesuffix(".0") for expert in record["experts"]]
    words += ["--weights", ",".join(weights), "--method", recipe["method"]]
    for name, value in recipe["parameters"].items():
        words += ["--param", f"{name}={value}"]
    words += ["--seed", str(recipe["seed"])] if recipe["seed"] is not None else []
    words += ["--rank", str(output["rank"])] if output["rank"] else []
    words += ["--full", "--dtype", output["dtype"]] if output["full"] else []
    words += [word for expert in record["experts"] if expert["texts"] for word in ("--texts", f"{expert['name']}=FILE")]
    return shlex.join([*words, "--out", "DIR"])
