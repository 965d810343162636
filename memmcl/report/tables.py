"""The results as tables: Parquet files for analysis, a terminal table, Markdown."""

from __future__ import annotations

import io
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

from pydantic import BaseModel

from memmcl.report import markdown, schema
from memmcl.report.markdown import plain_text
from memmcl.report.results import Document, parse_results
from memmcl.report.verdict import leaders, plus_minus

if TYPE_CHECKING:
    import pyarrow as pa
    from rich.table import Table

MEAN = "mean"


def write_tables(document: Document) -> dict[str, bytes]:
    """Return Parquet files by name: scores, interference, candidates, contexts and experts (`.parquet`).

    Each has its columns and types even without rows. In candidates, `genome` is a list of doubles, `values` a
    map from subtask to retention, `fitness` null where the candidate failed. In experts, `loss` and `anchor` are
    lists of doubles, `validation` a list of (step, loss). The same document gives the same bytes.
    """
    import pyarrow as pa

    results = parse_results(document)
    candidates = {
        **_columns(schema.SearchResult, "stage", "group"),
        **_columns(
            schema.CandidateResult, "index", "origin", "parents", "genome", "fitness", "stopped", "rows", "values"
        ),
        **{f"seconds_{name}": pa.float64() for name in schema.CandidateSeconds.model_fields},
        "reused": pa.bool_(),
        "winner": pa.bool_(),
    }
    rows = [
        {
            **dict(candidate),
            "stage": search.stage,
            "group": search.group,
            "values": list(candidate.values.items()),
            **{f"seconds_{name}": seconds for name, seconds in candidate.seconds},
            "winner": candidate.index == search.winner,
        }
        for search in results.searches
        for candidate in search.candidates
    ]
    return {
        "scores.parquet": _parquet(_columns(schema.SubtaskScore), results.scores),
        "interference.parquet": _parquet(_columns(schema.Interference), results.interference),
        "candidates.parquet": _parquet(candidates, rows),
        "contexts.parquet": _parquet(_columns(schema.ContextResult), results.curriculum.contexts),
        "experts.parquet": _parquet(_columns(schema.ExpertResult), results.experts),
    }


def _columns(model: type[BaseModel], *names: str) -> dict[str, pa.DataType]:
    """Return the Arrow types of these fields of a model, by default of all."""
    return {name: _arrow_type(model.model_fields[name].annotation) for name in names or model.model_fields}


def _arrow_type(annotation: Any) -> pa.DataType:
    """Return the Arrow type for a field of `memmcl.report.schema`; what may be None is a nullable column."""
    import pyarrow as pa

    scalars = {str: pa.string(), int: pa.int64(), float: pa.float64(), bool: pa.bool_()}
    if annotation in scalars:
        return scalars[annotation]
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return pa.struct(_columns(annotation))
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return pa.string()
    if origin is dict:
        return pa.map_(*map(_arrow_type, arguments))
    return pa.list_(_arrow_type(arguments[0])) if origin is tuple else _arrow_type(arguments[0])


def _parquet(columns: dict[str, pa.DataType], rows: Iterable[BaseModel | dict[str, Any]]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    values = [row.model_dump() if isinstance(row, BaseModel) else row for row in rows]
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(values, schema=pa.schema(list(columns.items()))), buffer, compression="zstd")
    return buffer.getvalue()


def results_table(document: Document, width: int = 100) -> Table:
    """Return the test scores for a terminal of `width` columns, mean ± standard error, the leaders in bold.

    The first form that fits is taken: models x subtasks, subtasks x models, the same two without standard
    errors, at last subtasks x those models that are the base, unified or a rival.
    """
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    results = parse_results(document)
    columns: list[str | None] = [*(subtask.name for subtask in results.subtasks), None]
    models: list[str | None] = [model.name for model in results.models]
    few: list[str | None] = [m.name for m in results.models if m.name == "base" or m.kind in ("unified", "rival")]
    whole = ((columns, models), (models, columns))
    forms = [(heads, lines, with_se) for with_se in (True, False) for heads, lines in whole]
    forms += [(few or models, columns, with_se) for with_se in (True, False)]

    def size(heads: list[str | None], lines: list[str | None], with_se: bool) -> int:
        return min(22, max(len(line or MEAN) for line in lines)) + len(heads) * (11 if with_se else 8)

    heads, lines, with_se = next((form for form in forms if size(*form) <= width), forms[-1])
    turned = lines is columns
    best = {column: leaders(results, column) for column in columns}
    unified = [model.name for model in results.models if model.kind == "unified"]

    def cell(model: str | None, column: str | None) -> Text:
        score = results.value_of(model or "", column)
        if score is None:
            return Text("–", style="dim")
        numbers = (f"{value:.3f}".removeprefix("0") for value in (score if with_se else score[:1]))
        return Text("±".join(numbers), "bold" if model in best[column] else "")

    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    table.add_column("subtask" if turned else "model", no_wrap=True, max_width=22, overflow="ellipsis")
    for head in heads:
        table.add_column(Text(head or MEAN), justify="right", no_wrap=True, max_width=9 if with_se else 6)
    for line in lines:
        name = Text(line or MEAN, style="" if line else "bold")
        if not turned and line in unified:
            name.stylize("green")
        table.add_row(name, *(cell(head, line) if turned else cell(line, head) for head in heads))
    return table


def markdown_table(document: Document) -> str:
    """Return the test scores as a Markdown table: a row a model, their mean and a column a subtask, leaders in bold."""
    results = parse_results(document)
    columns: list[str | None] = [None, *(subtask.name for subtask in results.subtasks)]
    best = {column: leaders(results, column) for column in columns}
    heads = ["model", MEAN, *(f"{plain_text(s.name)}<br>{plain_text(s.metric)}" for s in results.subtasks)]
    rows = []
    for model in results.models:
        numbers = {column: plus_minus(*(results.value_of(model.name, column) or (None,))) for column in columns}
        bold = (f"**{text}**" if model.name in best[column] else text for column, text in numbers.items())
        rows.append([plain_text(model.title), *bold])
    return markdown.table(heads, rows)
