"""The model card: valid front matter, code that parses, the scores and the lineage of the document."""

from __future__ import annotations

import ast
import re

import pytest
import yaml
from report_fixture import results_document

from memmcl.report import markdown_table, model_card

BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"


@pytest.mark.parametrize(("adapter", "library"), [(True, "peft"), (False, "transformers")])
def test_the_front_matter_is_that_of_a_model_card(adapter: bool, library: str) -> None:
    card = model_card(results_document(), base_model=BASE, adapter=adapter)
    empty, head, _ = card.split("---\n", 2)
    fields = yaml.safe_load(head)
    assert empty == ""
    assert fields["base_model"] == BASE
    assert fields["library_name"] == library
    assert fields["license"] == "apache-2.0"
    assert fields["pipeline_tag"] == "text-generation"
    assert ("lora" in fields["tags"]) == adapter


@pytest.mark.parametrize("adapter", [True, False])
@pytest.mark.parametrize("prompt", ["Is it good?\nAnswer:", "```\n''' {x} \"\"\" %s ````", None])
def test_the_code_is_python_and_asks_with_the_prompt_of_the_document(adapter: bool, prompt: str | None) -> None:
    document = results_document()
    document["subtasks"][0]["example"] = prompt and {"prompt": prompt, "answer": "positive"}
    for subtask in document["subtasks"][1:]:
        subtask["example"] = None
    card = model_card(document, base_model=BASE, adapter=adapter)
    fence = re.search(r"^(`{3,})python\n(.*?)^\1\n", card, re.DOTALL | re.MULTILINE)
    assert fence is not None
    tree = ast.parse(fence.group(2))
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert imported == ({"transformers", "peft"} if adapter else {"transformers"})
    strings = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    assert (BASE in strings) == adapter
    assert prompt is None or prompt in strings


def test_scores_coefficients_and_lineage_are_those_of_the_document() -> None:
    document = results_document()
    card = model_card(document, base_model=BASE, adapter=True)
    assert markdown_table(document) in card
    assert "The unified model beats the base model by 0.285 ± 0.019." in card
    assert "falls behind joint LoRA" in card
    for name, row in zip(document["merge"]["experts"], document["merge"]["coefficients"], strict=True):
        assert f"| {name} | {row[0]:.3f} | {row[1]:.3f} |" in card
    for value in (document["run"]["run_id"], document["run"]["base"]["digest"], *document["notes"]):
        assert value in card
    assert all(f"`{d}`" in card for parts in document["data"]["digests"].values() for d in parts.values())


def test_a_card_without_merge_or_comparisons() -> None:
    document = results_document()
    document.update(merge=None, comparisons=[], notes=[])
    card = model_card(document, base_model="a: b\n# not a comment", adapter=False)
    assert "## Merge coefficients" not in card
    assert "was not compared with its base." in card
    assert yaml.safe_load(card.split("---\n", 2)[1])["base_model"] == "a: b\n# not a comment"


def test_names_cannot_become_markup() -> None:
    document = results_document()
    document["run"]["name"] = "<script>x</script> *y*"
    card = model_card(document, base_model=BASE, adapter=True)
    assert "<script" not in card
    assert r"&lt;script&gt;x&lt;/script&gt; \*y\*" in card
