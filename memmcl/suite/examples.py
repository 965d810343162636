"""One row of a data set, and many of them as a Parquet table."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from memmcl import seeds
from memmcl.errors import DataError

Tuples = tuple[tuple[str, ...], ...]
Gold = str | Tuples

_COLUMNS = ("id", "dataset", "text", "gold", "fields")


class Fields(Mapping[str, str]):
    """What a question needs beside the text: an immutable, hashable mapping, equal to a dict of its items."""

    __slots__ = ("_pairs",)

    def __init__(self, fields: Mapping[str, str] | None = None) -> None:
        self._pairs = tuple(sorted((fields or {}).items()))

    def __getitem__(self, name: str) -> str:
        return dict(self._pairs)[name]

    def __iter__(self) -> Iterator[str]:
        return (key for key, _ in self._pairs)

    def __len__(self) -> int:
        return len(self._pairs)

    def __hash__(self) -> int:
        return hash(self._pairs)

    def __repr__(self) -> str:
        return repr(dict(self._pairs))


@dataclass(frozen=True, slots=True)
class Example:
    """One question with its gold answer. Hashable; make it with `Example.create`.

    id: 16 hex characters, the digest of (dataset, text, fields): the question without its answer.
    gold: a label, or a tuple of tuples of strings.
    fields: any mapping of strings; stored as `Fields`.
    """

    id: str
    dataset: str
    text: str
    gold: Gold
    fields: Mapping[str, str]

    def __post_init__(self) -> None:
        object.__setattr__(self, "fields", Fields(self.fields))

    @classmethod
    def create(
        cls, dataset: str, text: str, gold: str | Iterable[Sequence[str]], fields: Mapping[str, str] | None = None
    ) -> Example:
        """Return the example with its id filled in; lists in `gold` become tuples."""
        pairs = Fields(fields)
        return cls(seeds.digest([dataset, text, sorted(pairs.items())])[:16], dataset, text, _gold(gold), pairs)

    @property
    def answer(self) -> str:
        """The text a model should produce: the label, or the tuples as a Python list ("[]" for none)."""
        return self.gold if isinstance(self.gold, str) else format_tuples(self.gold)


def format_tuples(tuples: Iterable[tuple[str, ...]]) -> str:
    """Return SentiEval's text of `tuples`, as `[('pizza', 'positive'), ('wait', 'negative')]`."""
    return repr(list(tuples))


def normalised(text: str) -> str:
    """Return the content of `text`: its lower-case letters and digits, or all of it if it has none."""
    return "".join(character for character in text.lower() if character.isalnum()) or text


def drawing_order(example: Example) -> tuple[str, str, str]:
    """Return the key by which rows are drawn: a hash of data set, content and fields, then text and answer.

    It depends on the row alone, so added rows do not move the others.
    """
    fields = sorted(example.fields.items())
    return seeds.digest([example.dataset, normalised(example.text), fields]), example.text, example.answer


def to_table(examples: Sequence[Example]) -> bytes:
    """Return `examples` as a Parquet file: string columns id, dataset, text, gold (JSON), fields (JSON)."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    json_of = partial(json.dumps, ensure_ascii=False)
    rows = [(one.id, one.dataset, one.text, json_of(one.gold), json_of(dict(one.fields))) for one in examples]
    named = [dict(zip(_COLUMNS, row, strict=True)) for row in rows]
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(named, schema=pa.schema([(name, pa.string()) for name in _COLUMNS])), sink)
    return sink.getvalue()


def from_table(data: bytes) -> list[Example]:
    """Return the examples that `to_table` wrote, in the same order. Raises DataError for any other bytes."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        rows = pq.read_table(io.BytesIO(data), columns=list(_COLUMNS)).to_pylist()
        return [
            Example(**row | {"gold": _gold(json.loads(row["gold"])), "fields": json.loads(row["fields"])})
            for row in rows
        ]
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"expected a Parquet table of examples with the columns {', '.join(_COLUMNS)}; "
            f"got {len(data)} bytes that do not read as one ({type(error).__name__}); make the splits again"
        ) from error


def _gold(value: str | Iterable[Sequence[str]]) -> Gold:
    return value if isinstance(value, str) else tuple(tuple(item) for item in value)
