"""Reads the corpus that ships with memmcl: original sentences, written and annotated for it.

`corpus/SUBTASK.jsonl` holds rows with a label. `corpus/absa_*.jsonl` holds annotated sentences, rows
`{"text", "domain", "quads": [{"aspect", "opinion", "polarity", "category"}], "serves"}`; one such sentence serves
UABSA, ASTE, ASQP and ASC, or only the subtasks that `serves` names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import NamedTuple

from memmcl.errors import DataError, short
from memmcl.suite.examples import Example
from memmcl.suite.faults import Fault
from memmcl.suite.files import json_rows
from memmcl.suite.rows import PLAIN, Row, RowError, example_of, text_of
from memmcl.suite.subtasks import POLARITIES, Subtask

DINING = ("restaurant", "cafe")
"""The domains whose quads have ASQP's categories."""

UNNAMED = "NULL"
"""The aspect of an opinion about something that the sentence does not name."""


class Quad(NamedTuple):
    """One opinion of a sentence, its parts in the order of an ASQP tuple."""

    category: str
    aspect: str
    opinion: str
    polarity: str


class Sentence(NamedTuple):
    """An annotated sentence; `serves` names the subtasks that may use it, None for all."""

    text: str
    domain: object
    quads: list[Quad]
    serves: list[str] | None


def read_embedded(subtasks: Sequence[Subtask]) -> dict[str, list[Example]]:
    """Return subtask name -> examples, not split; the data sets are called "embedded_SUBTASK".

    Raises:
        DataError: the corpus has no rows for a subtask.
    """
    return read_corpus(files("memmcl.suite").joinpath("corpus"), subtasks)


def read_corpus(corpus: Traversable, subtasks: Sequence[Subtask]) -> dict[str, list[Example]]:
    """Do what `read_embedded` does with another folder.

    Raises:
        DataError: no rows for a subtask, or a row that cannot be used.
    """
    sentences: list[Sentence] | None = None
    examples: dict[str, list[Example]] = {}
    for subtask in subtasks:
        dataset = f"embedded_{subtask.name}"
        if subtask.name in _FROM_QUADS:
            if sentences is None:
                sentences = _read_sentences(corpus)
            make = _FROM_QUADS[subtask.name]
            serving = [one for one in sentences if one.serves is None or subtask.name in one.serves]
            found = [example for sentence in serving for example in make(dataset, sentence)]
        else:
            found = [_example(row, subtask, dataset) for row in _read(corpus, f"{subtask.name}.jsonl")]
        if not found:
            raise DataError(
                f"the embedded corpus has no rows for subtask {subtask.name!r}; "
                f"set data.source to a directory, or leave the subtask out"
            )
        examples[subtask.name] = found
    return examples


def _read(corpus: Traversable, name: str) -> list[Row]:
    file = corpus.joinpath(name)
    rows = []
    for row in json_rows(file.read_bytes().splitlines(), f"corpus/{name}") if file.is_file() else ():
        if isinstance(row, Fault):
            raise DataError(str(row))
        rows.append(row)
    return rows


def _example(row: Row, subtask: Subtask, dataset: str) -> Example:
    try:
        return example_of(row, subtask, dataset)
    except RowError as error:
        raise DataError(str(row.fault(error))) from error


def _read_sentences(corpus: Traversable) -> list[Sentence]:
    names = sorted(entry.name for entry in corpus.iterdir()) if corpus.is_dir() else []
    annotated = [name for name in names if name.startswith("absa_") and name.endswith(".jsonl")]
    return [_sentence(row) for name in annotated for row in _read(corpus, name)]


def _sentence(row: Row) -> Sentence:
    try:
        text = text_of(row, PLAIN)
    except RowError as error:
        raise DataError(str(row.fault(error))) from error
    values = row.values.get("quads")
    if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
        raise DataError(f"{row.place}: expected 'quads' as a list of objects; correct the row")
    return Sentence(
        text, row.values.get("domain"), [_quad(value, row.place) for value in values], row.values.get("serves")
    )


def _quad(values: dict[str, object], place: str) -> Quad:
    parts = []
    for name in Quad._fields:
        value = values.get(name)
        if not isinstance(value, str) or not value.strip():
            raise DataError(f"{place}: {name!r} must be a non-empty string, got {short(value)}; correct the row")
        parts.append(value)
    quad = Quad(*parts)
    if quad.polarity not in POLARITIES:
        raise DataError(
            f"{place}: unknown polarity {quad.polarity!r}; "
            f"expected exactly one of {', '.join(POLARITIES)}: correct the row"
        )
    return quad


def _is_named(quads: Iterable[Quad]) -> bool:
    """Return whether the sentence names every aspect, so that its spans alone are the whole annotation."""
    return all(quad.aspect != UNNAMED for quad in quads)


def _uabsa(dataset: str, sentence: Sentence) -> list[Example]:
    """One example a sentence that names all its aspects; no quads give the answer []."""
    if not _is_named(sentence.quads):
        return []
    pairs = dict.fromkeys((quad.aspect, quad.polarity) for quad in sentence.quads)
    return [Example.create(dataset, sentence.text, pairs)]


def _aste(dataset: str, sentence: Sentence) -> list[Example]:
    """One example a sentence that has quads and names all its aspects."""
    if not sentence.quads or not _is_named(sentence.quads):
        return []
    triplets = dict.fromkeys((quad.aspect, quad.opinion, quad.polarity) for quad in sentence.quads)
    return [Example.create(dataset, sentence.text, triplets)]


def _asqp(dataset: str, sentence: Sentence) -> list[Example]:
    """One example a sentence about a restaurant or cafe that has quads."""
    if not sentence.quads or sentence.domain not in DINING:
        return []
    return [Example.create(dataset, sentence.text, dict.fromkeys(sentence.quads))]


def _asc(dataset: str, sentence: Sentence) -> list[Example]:
    """One example per named aspect; an aspect with two polarities has no single label and gives none."""
    polarities: dict[str, set[str]] = {}
    for quad in sentence.quads:
        if quad.aspect != UNNAMED:
            polarities.setdefault(quad.aspect, set()).add(quad.polarity)
    return [
        Example.create(dataset, sentence.text, found.pop(), {"aspect": aspect})
        for aspect, found in polarities.items()
        if len(found) == 1
    ]


_FROM_QUADS: dict[str, Callable[[str, Sentence], list[Example]]] = {
    "uabsa": _uabsa,
    "aste": _aste,
    "asqp": _asqp,
    "asc": _asc,
}
