"""Reads the corpus that ships with memmcl: original sentences, written and annotated for it.

`corpus/SUBTASK.jsonl` holds rows with a label. `corpus/absa_*.jsonl` holds annotated sentences, rows
`{"text", "domain", "quads": [{"aspect", "opinion", "polarity", "category"}], "serves"}`; one such sentence serves
UABSA, ASTE, ASQP and ASC, or only the subtasks that `serves` names.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.resources import files
from importlib.resources.abc import Traversable

from memmcl.errors import DataError, short
from memmcl.suite.faults import Fault
from memmcl.suite.files import json_rows
from memmcl.suite.rows import Row
from memmcl.suite.subtasks import Subtask

DINING = ("restaurant", "cafe")  # the domains whose quads have ASQP's categories

UNNAMED = "NULL"  # the aspect of an opinion about something that the sentence does not name

_ANNOTATED = ("uabsa", "aste", "asqp", "asc")
_QUAD = ("category", "aspect", "opinion", "polarity")


def corpus_rows(subtask: Subtask, corpus: Traversable | None = None) -> list[Row]:
    """Return the rows of a subtask in the corpus, or another folder. Raises DataError for none, or a broken one."""
    corpus = corpus or files("memmcl.suite").joinpath("corpus")
    if subtask.name in _ANNOTATED:
        names = sorted(entry.name for entry in corpus.iterdir() if entry.name.endswith(".jsonl"))
        annotated = [row for name in names if name.startswith("absa_") for row in _read(corpus, name)]
        rows = [row for sentence in annotated for row in _rows_of_sentence(sentence, subtask)]
    else:
        rows = list(_read(corpus, f"{subtask.name}.jsonl"))
    if not rows:
        raise DataError(
            f"the embedded corpus has no rows for subtask {subtask.name!r}; "
            f"set data.source to a directory, or leave the subtask out"
        )
    return rows


def _read(corpus: Traversable, name: str) -> Iterator[Row]:
    file = corpus.joinpath(name)
    for row in json_rows(file.read_bytes().splitlines(), f"corpus/{name}") if file.is_file() else ():
        if isinstance(row, Fault):
            raise DataError(str(row))
        yield row


def _rows_of_sentence(sentence: Row, subtask: Subtask) -> Iterator[Row]:
    """Yield a row per named aspect with one polarity (ASC), or one row with all tuples; none where it does not serve.

    UABSA and ASTE need every aspect named, so that the spans alone are the whole annotation; only UABSA takes a
    sentence without opinions. ASQP takes sentences about restaurants and cafes.
    """
    quads, values = _quads(sentence), sentence.values
    if subtask.name not in (values.get("serves") or _ANNOTATED):
        return
    if subtask.name == "asc":
        polarities: dict[str, set[str]] = {}
        for quad in quads:
            polarities.setdefault(quad["aspect"], set()).add(quad["polarity"])
        for aspect, labels in polarities.items():
            if aspect != UNNAMED and len(labels) == 1:
                yield Row(sentence.place, {"text": values.get("text"), "aspect": aspect, "label": labels.pop()})
        return
    if subtask.name == "asqp":
        serves = bool(quads) and values.get("domain") in DINING
    else:
        serves = bool(quads or subtask.name == "uabsa") and all(quad["aspect"] != UNNAMED for quad in quads)
    if serves:
        tuples = dict.fromkeys(tuple(quad[name] for name in subtask.tuple_fields) for quad in quads)
        yield Row(sentence.place, {"text": values.get("text"), "label": list(tuples)})


def _quads(sentence: Row) -> list[dict[str, str]]:
    quads = sentence.values.get("quads")
    if not isinstance(quads, list) or not all(isinstance(quad, dict) for quad in quads):
        raise DataError(f"{sentence.place}: expected 'quads' as a list of objects; correct the row")
    for name, value in ((name, quad.get(name)) for quad in quads for name in _QUAD):
        if not isinstance(value, str) or not value.strip():
            raise DataError(
                f"{sentence.place}: {name!r} must be a non-empty string, got {short(value)}; correct the row"
            )
    return quads
