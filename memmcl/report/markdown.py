"""Markdown of the model cards: escaped text, tables, front matter, and the code that loads a model."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jinja2
import yaml

from memmcl.text import one_line

_LOAD_ADAPTER = """\
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = {base}
tokenizer = AutoTokenizer.from_pretrained(base)
model = AutoModelForCausalLM.from_pretrained(base)
model = PeftModel.from_pretrained(model, "path/to/this/directory")
"""
_RESOLVE = "from memmcl.backbone.load import resolve_base  # transformers cannot load this base by its name\n"
_LOAD_MODEL = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("path/to/this/directory")
model = AutoModelForCausalLM.from_pretrained("path/to/this/directory")
"""


def plain_text(text: str) -> str:
    """Return `text` on one line, Markdown and HTML escaped, fit for the beginning of a line or of a table's cell."""
    escaped = html.escape(one_line(text), quote=False)
    escaped = re.sub(r"([\\`*_\[\]|~])", r"\\\1", escaped)
    return re.sub(r"^(\d*)([#+\-.)=])", r"\1\\\2", escaped)


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, left: Sequence[int] = (0,)) -> str:
    """Return a table of escaped cells; the columns at the places `left` are flush left, the others flush right."""
    rule = ["---" if place in left else "---:" for place in range(len(head))]
    return "".join("| " + " | ".join(line) + " |\n" for line in (head, rule, *rows))


def render(template: str, **context: Any) -> str:
    """Return a Markdown template of this package, filled; its filter `md` is `plain_text`."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("memmcl.report", ""),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["md"] = plain_text
    return environment.get_template(template).render(context)


def front_matter(base: str, licence: str | None, tags: Sequence[str], *, adapter: bool, **more: Any) -> str:
    """Return the YAML head of a Hugging Face model card; more: fields that are not in every card."""
    fields: Mapping[str, Any] = {
        "base_model": base,
        "library_name": "peft" if adapter else "transformers",
        **({"license": licence} if licence else {}),
        "pipeline_tag": "text-generation",
        **more,
        "tags": [*tags, *(["lora"] if adapter else []), "memmcl"],
    }
    return f"---\n{yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)}---\n"


def loading_code(base: str, *, adapter: bool) -> str:
    """Return the Python code that loads what lies beside a card: an adapter on `base`, or a whole model."""
    if not adapter:
        return _LOAD_MODEL
    if base.startswith("pypi:") or base.endswith(".gguf"):
        return _RESOLVE + _LOAD_ADAPTER.format(base=f"resolve_base({base!r}).directory")
    return _LOAD_ADAPTER.format(base=repr(base))
