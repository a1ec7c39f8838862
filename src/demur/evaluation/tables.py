"""Tables of shares: queries over records."""

from dataclasses import dataclass

import polars as pl
import torch

from demur.evaluation.records import ATTACKERS, OUTCOMES, worst_case
from demur.evaluation.results import Measurement, Table
from demur.evaluation.shares import ATTACKED_BY
from demur.metrics import OutcomeShares, Share


@dataclass(frozen=True)
class TableSpec:
    """A table of the shares of outcomes of each model under each attacker.

    Parameters
    ----------
    title : str
    columns : tuple of str
        The outcomes that are shown.
    note : str
    """

    title: str
    columns: tuple[str, ...] = ("correct", "wrong", "rejected")
    note: str = ""

    def table(self, records: pl.DataFrame) -> Table:
        """Make the table: a group for each attacker, a row for each model.

        The last attacker stands for the worst case over all attackers.
        """
        figures = []
        for attacker, title in zip(ATTACKERS, ATTACKED_BY, strict=True):
            chosen = records.filter(pl.col("attacker") == attacker)
            if attacker == ATTACKERS[-1] and not chosen.is_empty():
                chosen = worst_case(records)
            for (model,), rows in chosen.group_by("model", maintain_order=True):
                shares = outcome_shares(rows)
                figures += [
                    _figure(str(model), column, title, shares[column]) for column in self.columns
                ]
        return Table(self.title, figures, self.note)


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


def _figure(row: str, column: str, group: str, share: Share) -> Measurement:
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
