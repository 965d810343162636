"""The README.md of a merge of a user's own adapters, in the form of a Hugging Face model card."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from memmcl.report.markdown import front_matter, loading_code, plain_text, table

Record = Mapping[str, Any]
"""What `merge.json` holds."""


def merge_card(record: Record) -> str:
    """Return README.md for the merge that `record` describes."""
    base, adapter = record["base"]["name"], record["output"]["form"] == "adapter"
    relation = "adapter" if adapter else "merge"
    sections = (
        front_matter(
            base, record["base"]["licence"], ["merge", "model-merging"], adapter=adapter, base_model_relation=relation
        ),
        _introduction(record),
        _experts(record),
        _errors(record),
        _search(record),
        f"## Use\n\n```python\n{loading_code(base, adapter=adapter)}```\n",
        _lineage(record),
    )
    return "\n".join(section for section in sections if section)


def _introduction(record: Record) -> str:
    names = [plain_text(expert["name"]) for expert in record["experts"] if any(expert["coefficients"])]
    output, base = record["output"], plain_text(record["base"]["name"])
    form = (
        f"a PEFT adapter of rank {output['rank']}" if output["form"] == "adapter" else f"a model in {output['dtype']}"
    )
    licence = record["base"]["licence"]
    terms = f"The base is under the licence {plain_text(licence)}." if licence else "The licence is that of the base."
    warnings = "".join(f"\n* {plain_text(warning)}" for warning in record["warnings"])
    return (
        f"# {' + '.join(names)} on {base}\n\n"
        f"{form[0].upper()}{form[1:]}: {len(names)} LoRA experts, merged by `{record['method']['name']}`. {terms}\n"
        + (f"\nWarnings:\n{warnings}\n" if warnings else "")
    )


def _experts(record: Record) -> str:
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
    method = record["method"]
    parameters = [
        f"{name} {value:g}" if isinstance(value, float | int) else f"{name} {value}"
        for name, value in method["parameters"].items()
    ]
    line = f"Method `{method['name']}` ({plain_text(method['reference'])})"
    line += f" with {', '.join(parameters)}" if parameters else ""
    line += f"; masks from seed {method['seed']}" if method["seed"] is not None else ""
    return f"## Experts and method\n\n{table(head, rows, left=(0, len(head) - 2, len(head) - 1))}\n{line}.\n"


def _errors(record: Record) -> str:
    errors = record["errors"]
    if errors is None:
        exact = record["output"]["form"] == "adapter"
        return "The adapter is the merge exactly: nothing was compressed.\n" if exact else ""
    worst = errors["worst"]
    return (
        f"The merge was compressed to rank {record['output']['rank']}: the relative error (Frobenius) is "
        f"{errors['mean']:.4f} in the mean over {len(errors['modules'])} modules, {worst['error']:.4f} in the worst, "
        f"`{worst['module']}`.\n"
    )


def _search(record: Record) -> str:
    search = record["search"]
    if search is None:
        return ""
    return (
        "## Search\n\n"
        f"The coefficients are the best of {search['evaluations']} candidates of `{search['strategy']}`, by "
        f"`{search['fitness']}` on {search['rows']} weak rows (candidate {search['winner']}, {search['origin']}); "
        "all of them stand in `candidates.parquet`. On weak rows a winner looks better than it is.\n"
    )


def _lineage(record: Record) -> str:
    base = record["made_from"]["base"]
    lines = [f"* Base: {plain_text(base['name'])}, sha256 of its config.json `{base['config']}`"]
    if base["weights"]:
        lines.append(f"* Weights and tokenizer of the base: `{base['weights']}`")
    for expert in record["experts"]:
        trained_on = f", trained on {plain_text(expert['base_name'])}" if expert["base_name"] else ""
        files = ", ".join(f"{file} `{digest}`" for file, digest in expert["sha256"].items())
        lines.append(f"* Expert {plain_text(expert['name'])}{trained_on}: {files}")
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    lines.append(f"* Versions: {versions}")
    again = "" if record["search"] else f"\nMade by:\n\n    {_command(record)}\n"
    return "## Lineage\n\n" + "\n".join(lines) + "\n" + again


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
