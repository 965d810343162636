"""What notebooks show of results: numbers in short, and small tables as HTML."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape


def numbers(values: Iterable[float]) -> str:
    """Return coefficients with at most four digits each."""
    return ", ".join(f"{value:.4g}" for value in values)


def html_table(heads: Sequence[str], rows: Iterable[Sequence[object]], caption: str = "") -> str:
    """Return a table; every cell is escaped."""
    head = "".join(f"<th>{escape(one)}</th>" for one in heads)
    body = "".join("<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    title = f"<caption>{escape(caption)}</caption>" if caption else ""
    return f"<table>{title}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
