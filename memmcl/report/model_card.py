"""The README.md of an exported unified model, in the form of a Hugging Face model card."""

from __future__ import annotations

import yaml

from memmcl.report.results import Document, Results, parse_results
from memmcl.report.tables import markdown_table, plain_text
from memmcl.report.verdict import plus_minus, verdict

CODE_ADAPTER = """\
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = {base!r}
tokenizer = AutoTokenizer.from_pretrained(base)
model = AutoModelForCausalLM.from_pretrained(base)
model = PeftModel.from_pretrained(model, "path/to/this/directory")
"""
CODE_CONVERTED = """\
from memmcl.backbone.load import resolve_base  # transformers cannot load this base by its name
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = resolve_base({base!r}).directory
tokenizer = AutoTokenizer.from_pretrained(base)
model = AutoModelForCausalLM.from_pretrained(base)
model = PeftModel.from_pretrained(model, "path/to/this/directory")
"""
CODE_FULL = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("path/to/this/directory")
model = AutoModelForCausalLM.from_pretrained("path/to/this/directory")
"""
CODE_ASK = """
inputs = tokenizer({prompt!r}, return_tensors="pt", add_special_tokens=False)
output = model.generate(**inputs, max_new_tokens=64, do_sample=False)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
"""


def model_card(document: Document, *, base_model: str, adapter: bool) -> str:
    """Return README.md for the unified model of `document`.

    `base_model` is the id (or path) that the card names as the base; `adapter` tells whether the directory
    holds a PEFT adapter (else a plain transformers model).

    Raises:
        DataError: `document` does not follow the schema.
    """
    results = parse_results(document)
    sections = (
        _front_matter(results, base_model, adapter),
        _introduction(results, base_model, adapter),
        _scores(results),
        _merge(results),
        _usage(results, base_model, adapter),
        _training_data(results),
        _limits(results),
        _lineage(results),
    )
    return "\n".join(section for section in sections if section)


def _front_matter(results: Results, base_model: str, adapter: bool) -> str:
    fields = {
        "base_model": base_model,
        "library_name": "peft" if adapter else "transformers",
        "license": results.run.base.licence.lower(),
        "pipeline_tag": "text-generation",
        "language": ["en"],
        "tags": ["sentiment-analysis", "model-merging", *(["lora"] if adapter else []), "memmcl"],
    }
    return f"---\n{yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)}---\n"


def _introduction(results: Results, base_model: str, adapter: bool) -> str:
    groups: dict[str, list[str]] = {}
    for subtask in results.subtasks:
        groups.setdefault(subtask.group, []).append(plain_text(subtask.title))
    subtasks = "\n".join(f"* {plain_text(group)}: {'; '.join(titles)}" for group, titles in groups.items())
    form = "a PEFT adapter" if adapter else "a full model"
    return (
        f"# {plain_text(results.run.name)}: one sentiment model for {len(results.subtasks)} subtasks\n\n"
        f"{form[0].upper()}{form[1:]} on {plain_text(base_model)}: LoRA experts, one per subtask, merged "
        f"in two stages by search (inside each group of subtasks, then across the groups). "
        f"It answers:\n\n{subtasks}\n"
    )


def _scores(results: Results) -> str:
    told = verdict(results)
    lines = [f"{plain_text(told.headline)}."] + [plain_text(statement.text) for statement in told.statements]
    rows = ", ".join(f"{plain_text(s.name)} {s.rows.test}" for s in results.subtasks)
    return (
        f"## Results\n\n{' '.join(lines)}\n\n{markdown_table(results)}\n"
        f"Untouched test rows ({rows}); ± is one bootstrap standard error over rows. "
        f"Bold: the best of a column and all within one standard error of it, experts left out.\n"
    )


def _merge(results: Results) -> str:
    merge = results.merge
    if merge is None:
        return ""
    head = ["expert", *(f"block {plain_text(block)}" for block in merge.blocks)]
    lines = [head, ["---", *("---:" for _ in merge.blocks)]]
    for expert, row in zip(merge.experts, merge.coefficients, strict=True):
        lines.append([plain_text(expert), *(plus_minus(value) for value in row)])
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    method = f"Method: {plain_text(merge.method)}, on the experts' task vectors."
    return f"## Merge coefficients\n\n{method}\n\n{table}\n"


def _usage(results: Results, base_model: str, adapter: bool) -> str:
    converted = base_model.startswith("pypi:") or base_model.endswith(".gguf")
    code = (CODE_CONVERTED if converted else CODE_ADAPTER).format(base=base_model) if adapter else CODE_FULL
    shown = next((subtask for subtask in results.subtasks if subtask.example), None)
    told = ""
    if shown is not None and shown.example is not None:
        code += CODE_ASK.format(prompt=shown.example.prompt)
        told = f"\nThe prompt above asks for: {plain_text(shown.title)}. Each subtask has a prompt of its own; "
        told += '`memmcl predict "..."` asks all of them.\n'
    fence = "`" * max(3, 1 + _longest_run(code))
    return f"## Use\n\n{fence}python\n{code}{fence}\n{told}"


def _longest_run(text: str) -> int:
    longest = run = 0
    for character in text:
        run = run + 1 if character == "`" else 0
        longest = max(longest, run)
    return longest


def _training_data(results: Results) -> str:
    lines = [
        f"* {plain_text(s.name)}: {s.rows.train} training rows; {s.rows.weak} weak rows for the search"
        for s in results.subtasks
    ]
    return f"## Training data\n\nSource: {plain_text(results.data.source)}.\n\n" + "\n".join(lines) + "\n"


def _limits(results: Results) -> str:
    lines = [
        "* Measured on the test rows above and nothing else; other domains and languages may score lower.",
        "* Standard errors hold the test rows' share of the variance, not that of training or of the search.",
        "* It answers in the format of its prompts and is not made for free chat.",
        "* It inherits the biases of its base model and of the training rows.",
        *(f"* {plain_text(note)}" for note in results.notes),
    ]
    return "## Limits\n\n" + "\n".join(lines) + "\n"


def _lineage(results: Results) -> str:
    run = results.run
    versions = ", ".join(f"{plain_text(package)} {plain_text(version)}" for package, version in run.versions.items())
    lines = [
        f"* Run `{run.run_id}`, seed {run.seed}, {run.created:%Y-%m-%d}",
        f"* Base: {plain_text(run.base.name)}, sha256 `{run.base.digest}`",
        f"* Versions: {versions}",
        *(
            f"* Data {plain_text(name)}, {plain_text(part)}: `{digest}`"
            for name, parts in results.data.digests.items()
            for part, digest in parts.items()
        ),
    ]
    return "## Lineage\n\n" + "\n".join(lines) + "\n"
