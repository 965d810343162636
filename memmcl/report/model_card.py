"""The README.md of an exported unified model, in the form of a Hugging Face model card."""

from __future__ import annotations

import re

from memmcl.report.markdown import front_matter, loading_code, plain_text, render, table
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

    base_model: the id (or path) that the card names as the base. adapter: whether the directory holds a PEFT adapter
    (else a plain transformers model).
    """
    results = parse_results(document)
    tags, licence = ["sentiment-analysis", "model-merging"], results.run.base.licence.lower()
    code = loading_code(base_model, adapter=adapter)
    prompted = next((subtask for subtask in results.subtasks if subtask.example), None)
    if prompted is not None and prompted.example is not None:
        code += GENERATE.format(prompt=prompted.example.prompt)
    return render(
        "model_card.md.j2",
        front=front_matter(base_model, licence, tags, adapter=adapter, language=["en"]),
        r=results,
        base_model=base_model,
        adapter=adapter,
        verdict=verdict(results),
        scores=markdown_table(results),
        coefficients=_coefficients(results),
        prompted=prompted,
        code=code,
        fence="`" * max(3, 1 + max(map(len, re.findall("`+", code)), default=0)),
    )


def _coefficients(results: Results) -> str:
    merge = results.merge
    if merge is None:
        return ""
    head = ["expert", *(f"block {plain_text(block)}" for block in merge.blocks)]
    rows = zip(merge.experts, merge.coefficients, strict=True)
    return table(head, ([plain_text(expert), *map(plus_minus, row)] for expert, row in rows))
