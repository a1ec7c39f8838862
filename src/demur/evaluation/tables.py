"""Tables of shares: queries over records."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import polars as pl
import torch

from demur.evaluation.on_images import Evaluate
from demur.evaluation.plan import Outputs
from demur.evaluation.records import ATTACKERS, OUTCOMES, SCHEMA, worst_case
from demur.evaluation.results import Measurement, Series, Table
from demur.evaluation.scoring import Row
from demur.evaluation.shares import ATTACKED_BY
from demur.metrics import OutcomeShares, Share, spread

Quantity = Callable[[pl.DataFrame, Measurement], Measurement]
"""Fills in a figure of a table from the records that belong to it."""


def by_attacker(records: pl.DataFrame) -> pl.DataFrame:
    """Give the outcomes of each attacker, named in the column "group" as tables name them.

    Parameters
    ----------
    records : polars.DataFrame

    Returns
    -------
    polars.DataFrame
        Columns "group", "model", "outcome" and those that name an image; the rows of the weakest
        attacker come first. The last attacker stands for the worst case over all attackers.
    """
    parts = []
    for attacker, title in zip(ATTACKERS, ATTACKED_BY, strict=True):
        chosen = records.filter(pl.col("attacker") == attacker)
        if attacker == ATTACKERS[-1] and not chosen.is_empty():
            chosen = records
        parts.append(worst_case(chosen).with_columns(group=pl.lit(title)))
    return pl.concat(parts)


def outcome_table(
    title: str,
    records: pl.DataFrame,
    *,
    row: str = "model",
    group: str | None = "group",
    columns: Sequence[str] = ("correct", "wrong", "rejected"),
    note: str = "",
) -> Table:
    """Make a table of the shares of outcomes, in %, with their intervals.

    Parameters
    ----------
    title : str
    records : polars.DataFrame
        With the columns "outcome", "repeat" and "image", and those of `row` and `group`.
    row, group : str
        The columns of records that name a line of the table, and a group of lines. Lines stand in
        the order of the records.
    columns : sequence of str
        The outcomes that are shown.
    note : str

    Returns
    -------
    Table
        Without figures of a paper: see `demur.studies.reported`.
    """
    figures = []
    by = [row] if group is None else [group, row]
    for names, rows in records.group_by(by, maintain_order=True):
        shares = outcome_shares(rows)
        figures += [
            measured_share(
                str(names[-1]), column, shares[column], "" if group is None else str(names[0])
            )
            for column in columns
        ]
    return Table(title, figures, note)


def outcome_shares(records: pl.DataFrame) -> dict[str, Share]:
    """Give the shares of the outcomes of some records, by name.

    Each image counts once in the interval, whatever the number of repetitions.

    Examples
    --------
    >>> from demur.evaluation.records import SCHEMA
    >>> rows = [{"repeat": 0, "image": "ab", "outcome": "wrong"}]
    >>> kinds = {name: SCHEMA[name] for name in ("repeat", "image", "outcome")}
    >>> outcome_shares(pl.DataFrame(rows, schema=kinds))["wrong"].value
    1.0
    """
    metric = OutcomeShares()
    for repeat, rows in records.group_by("repeat", maintain_order=True):
        outcomes = torch.from_numpy(rows["outcome"].to_physical().cast(pl.Int64).to_numpy().copy())
        metric.update(outcomes, rows["image"].to_list(), int(str(repeat[0])))
    found = metric.compute()
    return {name: found[name] for name in OUTCOMES}


def measured_share(row: str, column: str, share: Share, group: str = "") -> Measurement:
    """Make a figure of a table from a share, in %."""
    return Measurement(
        row=row,
        column=column,
        group=group,
        unit="%",
        measured=round(100 * share.value, 10),
        sd=None if share.sd is None else 100 * share.sd,
        splits=share.repeats,
        n=share.n,
        low=100 * share.low,
        high=100 * share.high,
    )


def figures(
    records: pl.DataFrame,
    columns: Mapping[str, Quantity],
    *,
    row: str = "model",
    group: str | None = None,
) -> list[Measurement]:
    """Make figures of a table: one for each row, and each of the columns.

    Parameters
    ----------
    records : polars.DataFrame
    columns : mapping of str to Quantity
        See `share_of` and `mean_of`.
    row, group : str
        The columns of records that name a row of the table, and a group of rows.
    """
    by = [row] if group is None else [group, row]
    return [
        quantity(rows, Measurement(str(names[-1]), column, str(names[0]) if group else ""))
        for names, rows in records.group_by(by, maintain_order=True)
        for column, quantity in columns.items()
    ]


def share_of(*outcomes: str, among: pl.Expr | None = None, column: str = "outcome") -> Quantity:
    """Measure the share of images with one of these outcomes, in %, with its interval.

    Parameters
    ----------
    outcomes : str
    among : polars.Expr, optional
        Counts some records only.
    column : str
        "outcome" or "stored_outcome".
    """

    def quantity(records: pl.DataFrame, place: Measurement) -> Measurement:
        chosen = records if among is None else records.filter(among)
        if chosen.is_empty():
            return replace(place, unit="%", note="no images")
        one = pl.lit(outcomes[0], dtype=SCHEMA["outcome"])
        merged = pl.when(pl.col(column).is_in(outcomes)).then(one).otherwise(column)
        share = outcome_shares(chosen.with_columns(outcome=merged))[outcomes[0]]
        return measured_share(place.row, place.column, share, place.group)

    return quantity


def mean_of(value: pl.Expr, unit: str = "", among: pl.Expr | None = None) -> Quantity:
    """Measure a value of the records of each repetition: its mean and sd over the repetitions.

    Parameters
    ----------
    value : polars.Expr
        An aggregation, such as `pl.col("l2").median()`.
    unit : str
    among : polars.Expr, optional
        Counts some records only.
    """

    def quantity(records: pl.DataFrame, place: Measurement) -> Measurement:
        chosen = records if among is None else records.filter(among)
        found = chosen.group_by("repeat", maintain_order=True).agg(value=value)["value"].to_list()
        if not found:
            return replace(place, unit=unit, note="none was found")
        over = spread(found)
        n = records["image"].n_unique()
        return replace(place, unit=unit, measured=over.mean, sd=over.sd, splits=over.n, n=n)

    return quantity


def outcome_series(records: pl.DataFrame, name: pl.Expr, x: str) -> list[Series]:
    """Make the series of a curve: the outcomes at each value of the column `x`, in their order.

    `name` gives the name of the series that a record belongs to.
    """
    found = []
    named = records.with_columns(series=name)
    for (series,), rows in named.group_by("series", maintain_order=True):
        points = [outcome_shares(part) for _, part in rows.group_by(x, maintain_order=True)]
        shares = {outcome: [point[outcome].value for point in points] for outcome in OUTCOMES}
        found.append(Series(str(series), **shares, n=points[0][OUTCOMES[0]].n))
    return found


def lookup(table: Table) -> dict[str, dict[str, dict[str, float]]]:
    """Give the measured figures of a table by group, row and column; NaN where there is none."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for one in table.rows:
        row = found.setdefault(one.group, {}).setdefault(one.row, {})
        row[one.column] = math.nan if one.measured is None else one.measured
    return found


def measured_rows(found: Sequence[Row], group: str = "", unit: str = "") -> list[Measurement]:
    """Make figures of a table from rows of a `Measure` that are called "ROW: COLUMN"."""
    figures = []
    for one in found:
        row, _, column = one.name.rpartition(": ")
        figure = Measurement(row, column, group, unit, measured=one.value, n=one.n)
        figures.append(replace(figure, low=one.low, high=one.high))
    return figures


def share_table(
    title: str,
    records: pl.DataFrame,
    *,
    row: str = "model",
    column: str = "column",
    group: str = "group",
    outcome: str = "correct",
    note: str = "",
) -> Table:
    """Make a table of the shares of one outcome, in %, with their intervals.

    As `outcome_table`, but a column of the records names the columns of the table.
    """
    figures = []
    for names, rows in records.group_by([group, row, column], maintain_order=True):
        own_group, own_row, own_column = map(str, names)
        share = outcome_shares(rows)[outcome]
        figures.append(measured_share(own_row, own_column, share, own_group))
    return Table(title, figures, note)


def series_of(name: str, points: Sequence[pl.DataFrame]) -> Series:
    """Make a series of a curve from the records at each x."""
    shares = [outcome_shares(point) for point in points]
    each = {outcome: [share[outcome].value for share in shares] for outcome in OUTCOMES}
    return Series(name, **each, n=shares[0]["correct"].n)


@dataclass(frozen=True)
class Case:
    """A node with what tables say of it: values of further columns of its records."""

    node: Evaluate
    labels: Mapping[str, str | float]


def labelled(outputs: Outputs, cases: Sequence[Case]) -> pl.DataFrame:
    """Give the records of some nodes, with a column for each of their labels."""
    frames = []
    for case in cases:
        columns = [pl.lit(value).alias(name) for name, value in case.labels.items()]
        frames.append(outputs.records([case.node]).with_columns(columns))
    return pl.concat(frames)
