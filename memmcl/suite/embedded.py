"""Reads the corpus that ships with memmcl: original sentences, written and annotated for it.

`corpus/SUBTASK.jsonl` holds rows with a label. `corpus/absa_*.jsonl` holds annotated sentences, rows
`{"text", "quads": [{"aspect", "opinion", "polarity", "category"}]}`; one such sentence serves several
subtasks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.resources import files
from importlib.resources.abc import Traversable

from memmcl.errors import DataError
from memmcl.suite.datasets import Row, example_of, read_rows
from memmcl.suite.examples import Example
from memmcl.suite.subtasks import POLARITIES, Subtask

Quad = tuple[str, str, str]
"""(aspect, opinion, polarity); no subtask of this corpus asks for the category."""


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
    sentences: list[tuple[str, list[Quad]]] | None = None
    examples: dict[str, list[Example]] = {}
    for subtask in subtasks:
        dataset = f"embedded_{subtask.name}"
        if subtask.name in _FROM_QUADS:
            if sentences is None:
                sentences = _read_sentences(corpus)
            make = _FROM_QUADS[subtask.name]
            found = [example for text, quads in sentences for example in make(dataset, text, quads)]
        else:
            rows = _read(corpus, f"{subtask.name}.jsonl")
            found = [example_of(row, subtask, dataset) for row in rows]
        if not found:
            raise DataError(
                f"the embedded corpus has no rows for subtask {subtask.name!r}; "
                f"set data.source to a directory, or leave the subtask out"
            )
        examples[subtask.name] = found
    return examples


def _read(corpus: Traversable, name: str) -> list[Row]:
    file = corpus.joinpath(name)
    return read_rows(file.read_bytes(), f"corpus/{name}") if file.is_file() else []


def _read_sentences(corpus: Traversable) -> list[tuple[str, list[Quad]]]:
    names = sorted(entry.name for entry in corpus.iterdir()) if corpus.is_dir() else []
    annotated = [name for name in names if name.startswith("absa_") and name.endswith(".jsonl")]
    return [(row.string("text"), _quads(row)) for name in annotated for row in _read(corpus, name)]


def _quads(row: Row) -> list[Quad]:
    values = row.values.get("quads")
    if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
        raise DataError(f"{row.source}: expected 'quads' as a list of objects; correct the row")
    quads = []
    for value in values:
        quad = Row(row.source, value)
        polarity = quad.string("polarity")
        if polarity not in POLARITIES:
            raise DataError(
                f"{row.source}: unknown polarity {polarity!r}; "
                f"expected exactly one of {', '.join(POLARITIES)}: correct the row"
            )
        quads.append((quad.string("aspect"), quad.string("opinion"), polarity))
    return quads


def _uabsa(dataset: str, text: str, quads: list[Quad]) -> list[Example]:
    """One example a sentence; no quads give the answer []."""
    return [Example.create(dataset, text, dict.fromkeys((aspect, polarity) for aspect, _, polarity in quads))]


def _aste(dataset: str, text: str, quads: list[Quad]) -> list[Example]:
    """One example a sentence that has quads."""
    return [Example.create(dataset, text, dict.fromkeys(quads))] if quads else []


def _asc(dataset: str, text: str, quads: list[Quad]) -> list[Example]:
    """One example per aspect; an aspect with two polarities has no single label and gives none."""
    polarities: dict[str, set[str]] = {}
    for aspect, _, polarity in quads:
        polarities.setdefault(aspect, set()).add(polarity)
    return [
        Example.create(dataset, text, found.pop(), {"aspect": aspect})
        for aspect, found in polarities.items()
        if len(found) == 1
    ]


_FROM_QUADS: dict[str, Callable[[str, str, list[Quad]], list[Example]]] = {
    "uabsa": _uabsa,
    "aste": _aste,
    "asc": _asc,
}
