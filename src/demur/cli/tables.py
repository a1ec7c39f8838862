"""Tables of results for the terminal."""

from typing import TYPE_CHECKING

from rich.table import Table

if TYPE_CHECKING:
    from demur.evaluation.results import Measurement


def table_of(title: str, rows: "list[Measurement]") -> Table:
    """A results table for the terminal: measured, and the paper's figure in brackets."""
    from demur.report import pivot

    columns, lines = pivot(rows)
    table = Table(
        title=title,
        title_justify="left",
        caption="[the paper's figure]" if any(row.paper is not None for row in rows) else None,
    )
    grouped = any(line.group for line in lines)
    if grouped:
        table.add_column("", overflow="fold")
    table.add_column("", overflow="fold")
    for column in columns:
        table.add_column(column, justify="right", overflow="fold")
    above = None
    for line in lines:
        cells = [_cell(line.cells[column]) if column in line.cells else "" for column in columns]
        head = [line.group if line.group != above else ""] if grouped else []
        if above not in (None, line.group):
            table.add_section()
        above = line.group
        table.add_row(*head, line.row, *cells)
    return table


def _cell(figure: "Measurement") -> str:
    from demur.report import number

    if figure.measured is None:
        text = figure.note or "—"
    else:
        text = number(figure.measured, figure.unit) + (
            f" ± {number(figure.sd, figure.unit)}" if figure.sd is not None else ""
        )
    return text if figure.paper is None else f"{text} [{number(figure.paper, figure.unit)}]"
