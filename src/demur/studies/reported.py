"""Figures that a paper prints, beside those that were measured."""

import csv
from collections.abc import Iterable
from dataclasses import dataclass, replace
from importlib.resources import files

import polars as pl

from demur.evaluation.plan import Outputs
from demur.evaluation.results import Measurement, Table
from demur.evaluation.shares import share


@dataclass(frozen=True)
class Reported:
    """One figure of a paper.

    Parameters
    ----------
    table, group, row, column : str
        Where it stands beside ours: title of the table, and its place there.
    value : float
    sd : float or None
        Standard deviation, where the paper has one.
    unit : str
    source : str
        Table, figure or section of the paper, with its page.
    """

    table: str
    group: str
    row: str
    column: str
    value: float
    sd: float | None
    unit: str
    source: str


def read_reported(study: str) -> list[Reported]:
    """Read `reported.csv` of a study's folder.

    Parameters
    ----------
    study : str
        Name of the folder, for example "smoothing".

    Returns
    -------
    list of Reported
    """
    text = (files("demur.studies") / study / "reported.csv").read_text(encoding="utf-8")
    return [
        Reported(
            row["table"],
            row["group"],
            row["row"],
            row["column"],
            float(row["value"]),
            float(row["sd"]) if row["sd"] else None,
            row["unit"],
            row["source"],
        )
        for row in csv.DictReader(text.splitlines())
    ]


def beside(table: Table, reported: Iterable[Reported], *, missing: bool = False) -> Table:
    """Put a paper's figures beside the measured ones.

    Parameters
    ----------
    table : Table
    reported : iterable of Reported
        Figures of other tables are left out.
    missing : bool, default False
        Whether figures of the paper that were not measured get a line too.

    Returns
    -------
    Table

    Examples
    --------
    >>> figure = Reported("Table I", "", "plain", "correct", 99.6, None, "%", "Table I, page 4")
    >>> table = Table("Table I", [Measurement("plain", "correct", unit="%", measured=98.0)])
    >>> beside(table, [figure]).rows[0].paper
    99.6
    """
    figures = {
        (one.group, one.row, one.column): one for one in reported if one.table == table.title
    }
    rows = []
    for row in table.rows:
        figure = figures.pop((row.group, row.row, row.column), None)
        rows.append(row if figure is None else replace(row, paper=figure.value, paper_sd=figure.sd))
    if missing:
        rows += [
            Measurement(one.row, one.column, one.group, one.unit, paper=one.value, paper_sd=one.sd)
            for one in figures.values()
        ]
    return replace(table, rows=rows)


def read_texts(study: str) -> dict[str, str]:
    """Read `texts.csv` of a study's folder: notes and sentences of a report, by name.

    `str.format` fills in the figures.
    """
    text = (files("demur.studies") / study / "texts.csv").read_text(encoding="utf-8")
    return {row["name"]: row["text"] for row in csv.DictReader(text.splitlines())}


def measured(outputs: Outputs, node: str, group: str = "") -> list[Measurement]:
    """Make figures of a table from the measurements of a node that are named "ROW: COLUMN". Those
    in the column "accuracy" are shares of n images.
    """
    rows = []
    found = outputs.measurements().filter(pl.col("node") == node)
    for name, value, n in found.select("name", "value", "n").iter_rows():
        row, _, column = name.partition(": ")
        if column == "accuracy":
            counted = share(row, column, [(round(value * n), n)], group=group)
            rows.append(replace(counted, measured=100 * value))
        elif column:
            rows.append(Measurement(row, column, group, measured=value, n=n))
    return rows
