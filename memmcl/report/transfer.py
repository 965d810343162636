"""How experts transfer: to other subtasks (interference), and into merged models (retention, NAI)."""

from __future__ import annotations

from dataclasses import dataclass

from memmcl.evolve.fitness import nai
from memmcl.report.results import Results
from memmcl.report.schema import BASE, Interference, Model, Retention


@dataclass(frozen=True)
class RetentionRow:
    """What one merged model keeps of the experts: by subtask, and over all subtasks with the three scores.

    Over all subtasks both numbers are ratios of mean scores: in a mean of ratios, one subtask whose expert scores near
    zero or near the base would outweigh all others. None where the denominator is zero.
    """

    model: Model
    by_subtask: dict[str, Retention]
    retention: float | None
    nai: float | None


def retention_rows(results: Results) -> tuple[RetentionRow, ...]:
    """Return what each merged model with a retention keeps, in the order of the document's models."""
    rows = []
    for model in results.models:
        by_subtask = {row.subtask: row for row in results.retention if row.model == model.name}
        if by_subtask:
            rows.append(RetentionRow(model, by_subtask, *_over_all(results, model.name)))
    return tuple(rows)


@dataclass(frozen=True)
class Matrix:
    """The base and the experts, one a row, on the test rows of subtasks, one a column, in the curriculum's order.

    cells by (row, column); gains: by (expert, column), its score less the base's on the same subtask. Both may have
    missing entries.
    """

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    cells: dict[tuple[str, str], Interference]
    gains: dict[tuple[str, str], float]

    @property
    def own(self) -> tuple[tuple[str, str], ...]:
        """The cells of experts on their own subtasks."""
        return tuple((name, name) for name in self.rows if (name, name) in self.cells)

    @property
    def span(self) -> str:
        """How many test rows were scored for a cell, as "60" or "48 to 60"."""
        counts = {cell.n for cell in self.cells.values()}
        return " to ".join(map(str, sorted({min(counts), max(counts)})))

    def gain(self, *, own: bool, expert: str | None = None) -> float | None:
        """Return the mean gain over the base on the experts' own or on other subtasks; of all experts, or of one."""
        gains = [gain for (row, column), gain in self.gains.items() if (row == column) == own and expert in (None, row)]
        return sum(gains) / len(gains) if gains else None


def interference(results: Results) -> Matrix | None:
    """Return the matrix of `results.interference`, the base on top; None without any."""
    cells = {(cell.expert, cell.subtask): cell for cell in results.interference}
    if not cells:
        return None
    names = results.curriculum_names()
    gains = {
        (row, column): cell.score - cells[BASE, column].score
        for (row, column), cell in cells.items()
        if row != BASE and (BASE, column) in cells
    }
    rows, columns = ({place[side] for place in cells} for side in (0, 1))
    return Matrix(
        tuple(name for name in (BASE, *names) if name in rows),
        tuple(name for name in names if name in columns),
        cells,
        gains,
    )


def _over_all(results: Results, merged: str) -> tuple[float | None, float | None]:
    expert = next((model.name for model in results.models if model.kind == "expert"), "")
    scores = [
        [score.score for name in (merged, BASE, expert) if (score := results.score_of(name, subtask.name))]
        for subtask in results.subtasks
    ]
    whole = [row for row in scores if len(row) == 3]
    if not whole:
        return None, None
    merged_mean, base_mean, expert_mean = (sum(column) / len(whole) for column in zip(*whole, strict=True))
    retention = merged_mean / expert_mean if expert_mean > 0 else None
    return retention, nai(merged_mean, base_mean, expert_mean)
