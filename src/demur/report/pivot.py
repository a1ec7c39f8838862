"""Tidy rows (one figure a row) to the lines and columns of a table, for the page and for the terminal alike."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from demur.errors import DemurError
from demur.evaluation.results import Measurement

OUTCOMES = ("correct", "rejected", "wrong")
"""The columns that are outcomes, in the order of demur.Outcome."""


@dataclass(frozen=True)
class Line:
    """One line of a pivoted table: its figures by column. A column that has no figure here is not in `cells`."""

    group: str
    row: str
    cells: dict[str, Measurement] = field(default_factory=dict)


def pivot(rows: Iterable[Measurement | Mapping[str, Any]]) -> tuple[list[str], list[Line]]:
    """Give the columns and the lines of a table in order of first appearance; lines of a group stand together.

    `rows` are Figures, or mappings of the same fields (the rows of results.json).
    Raises: DemurError if two rows claim the same cell; pydantic's ValidationError if a mapping is no Measurement.
    """
    columns: dict[str, None] = {}
    groups: dict[str, dict[str, Line]] = {}
    for given in rows:
        figure = given if isinstance(given, Measurement) else Measurement(**given)
        columns.setdefault(figure.column)
        lines = groups.setdefault(figure.group, {})
        line = lines.setdefault(figure.row, Line(figure.group, figure.row))
        if figure.column in line.cells:
            place = " / ".join(part for part in (figure.group, figure.row, figure.column) if part)
            raise DemurError(
                f"the table has two figures for {place!r}. Give each (group, row, column) once."
            )
        line.cells[figure.column] = figure
    # Outcomes stand in one order everywhere, in the places that the table gives to outcomes.
    ordered = iter(sorted(columns.keys() & set(OUTCOMES), key=OUTCOMES.index))
    names = [next(ordered) if column in OUTCOMES else column for column in columns]
    return names, [line for lines in groups.values() for line in lines.values()]


def number(value: float, unit: str = "") -> str:
    """Write a figure as every table shows it: counts whole and grouped, measures with decimals, tiny ones in short."""
    size = abs(value)
    if size >= 1e9:
        text = f"{size:.3g}"
    elif size >= 1000 or (unit == "" and size == int(size)):
        text = f"{size:,.0f}"
    elif 0 < size < 0.005:
        text = f"{size:.2g}"
    else:
        text = f"{size:.2f}" if unit else f"{size:.3f}"
    return f"−{text}" if value < 0 else text
