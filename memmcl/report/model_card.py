"""The README.md of an exported unified model, in the form of a Hugging Face model card."""

from __future__ import annotations

import re

from memmcl.report.markdown import front_matter, loading_code, plain_text, table
from memmcl.report.results import Document, Results, parse_results
from memmcl.report.tables import markdown_table
from memmcl.report.verdict import plus_minus, verdict

GENERATE = """
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
        front_matter(
            base_model,
            results.run.base.licence.lower(),
            ["sentiment-analysis", "model-merging"],
            adapter=adapter,
            language=["en"],
        ),
        _introduction(results, base_model, adapter),
        _scores(results),
        _merge(results),
        _usage(results, base_model, adapter),
        _training_data(results),
        _limits(results),
        _lineage(results),
    )
    return "\n".join(section for section in sections if section)


def _introduction(results: Results, base_model: str, adapter: bool) -> str:
    titles = {subtask.name: plain_text(subtask.title) for subtask in results.subtasks}
    groups = results.names_by_group().items()
    lines = [f"* {plain_text(group)}: {'; '.join(titles[name] for name in names)}" for group, names in groups]
    form = "a PEFT adapter" if adapter else "a full model"
    return (
        f"# {plain_text(results.run.name)}: one sentiment model for {len(results.subtasks)} subtasks\n\n"
        f"{form[0].upper()}{form[1:]} on {plain_text(base_model)}: LoRA experts, one per subtask, merged "
        f"in two stages by search (inside each group of subtasks, then across the groups). "
        "It answers:\n\n" + "\n".join(lines) + "\n"
    )


def _scores(results: Results) -> str:
    summary = verdict(results)
    lines = [f"{plain_text(summary.headline)}."] + [plain_text(statement.text) for statement in summary.statements]
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
    rows = [
        [plain_text(expert), *map(plus_minus, row)]
        for expert, row in zip(merge.experts, merge.coefficients, strict=True)
    ]
    method = f"Method: {plain_text(merge.method)}, on the experts' task vectors."
    return f"## Merge coefficients\n\n{method}\n\n{table(head, rows)}"


def _usage(results: Results, base_model: str, adapter: bool) -> str:
    code, note = loading_code(base_model, adapter=adapter), ""
    prompts = [(subtask.title, subtask.example.prompt) for subtask in results.subtasks if subtask.example]
    if prompts:
        title, prompt = prompts[0]
        code += GENERATE.format(prompt=prompt)
        note = f"\nThe prompt above asks for: {plain_text(title)}. Each subtask has a prompt of its own; "
        note += '`memmcl predict "..."` asks all of them.\n'
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", code)), default=0))
    return f"## Use\n\n{fence}python\n{code}{fence}\n{note}"


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
