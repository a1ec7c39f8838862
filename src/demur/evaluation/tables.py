"""Tables of shares: queries over records."""

from collections.abc import Sequence

import polars as pl
import torch

from demur.evaluation.records import ATTACKERS, OUTCOMES, worst_case
from demur.evaluation.results import Measurement, Table
from demur.evaluation.shares import ATTACKED_BY
from demur.metrics import OutcomeShares, Share


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
