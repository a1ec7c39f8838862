"""Security evaluation: outcomes against the size of the attack, as queries over records."""

import math
from collections.abc import Mapping, Sequence

import polars as pl

from demur.evaluation.records import OUTCOMES, PLACE, SCHEMA, worst_case
from demur.evaluation.results import Curve, Table
from demur.evaluation.shares import ATTACKED_BY, series
from demur.evaluation.tables import measured_share, outcome_shares
from demur.metrics import Rates

NEAR = 1 + 1e-6
"""A change of at most this many times eps counts as one within eps: sizes are rounded."""


def at_each_eps(
    records: pl.DataFrame, sizes: Sequence[float], titles: Mapping[str, str], size: str = "l2"
) -> pl.DataFrame:
    """Give the outcomes of each image at each eps.

    Parameters
    ----------
    records : polars.DataFrame
        The clean images and all attacks that count for the strongest ensemble.
    sizes : sequence of float
    titles : mapping of str to str
        What to call the attackers "defence-unaware" and "defence-aware".
    size : str, default "l2"
        The column with the size of a change.

    Returns
    -------
    polars.DataFrame
        As from `worst_case`, with the columns "title" and "at". What the defence-aware attacker
        breaks within less, it breaks within more. The strongest ensemble is the worst outcome over
        all records with a change within eps. At 0 there is no attack.
    """
    aware = pl.col("attacker") == "defence-aware"
    parts = []
    for eps in sizes:
        here = pl.col("eps") == eps
        earlier = aware & (pl.col("eps") < eps) & (pl.col("outcome") == "wrong")
        chosen = {
            title: (pl.col("attacker") == attacker) & (here | earlier)
            for attacker, title in titles.items()
        }
        chosen[ATTACKED_BY[-1]] = pl.col(size) <= eps * NEAR
        for title, rows in chosen.items():
            worst = worst_case(records.filter(rows if eps else pl.col("attacker") == "none"))
            parts.append(worst.with_columns(title=pl.lit(title), at=pl.lit(eps)))
    return pl.concat(parts)


def smallest_changes(records: pl.DataFrame, size: str = "l2") -> pl.DataFrame:
    """Give for each model and image the outcome "clean", and in the columns "wrong" and "rejected"
    the smallest change that was found to such an answer; infinite where none was.
    """
    least = {
        name: pl.col(size).filter(pl.col("outcome") == name).min().fill_null(math.inf)
        for name in ("wrong", "rejected")
    }
    clean = pl.col("outcome").filter(pl.col("attacker") == "none").first()
    return records.group_by(["model", *PLACE], maintain_order=True).agg(clean=clean, **least)


def lenient(points: pl.DataFrame) -> pl.DataFrame:
    """Count the rejection of an attacked image as correct, that of a clean image not."""
    fine = (pl.col("at") > 0) & (pl.col("outcome") == "rejected")
    outcome = pl.when(fine).then(pl.lit("correct")).otherwise(pl.col("outcome").cast(pl.String))
    return points.with_columns(outcome=outcome.cast(SCHEMA["outcome"]))


def eps_table(title: str, points: pl.DataFrame, outcome: str, note: str = "") -> Table:
    """Make a table of the shares of an outcome: a group for each attacker, a line for each model,
    a column for each eps.
    """
    rows = [
        measured_share(str(row), f"eps {eps:g}", outcome_shares(part)[outcome], str(group))
        for (group, row, eps), part in points.group_by(
            ["title", "model", "at"], maintain_order=True
        )
    ]
    return Table(title, rows, note)


def eps_curve(title: str, points: pl.DataFrame, note: str = "", label: str = "eps (L2)") -> Curve:
    """Make a curve with a line for each model and attacker."""
    lines = []
    for (model,), rows in points.group_by("model", maintain_order=True):
        for (attacker,), part in rows.group_by("title", maintain_order=True):
            at = part.sort("at", maintain_order=True).group_by("at", maintain_order=True)
            lines.append(series(f"{model}, {attacker}", [counts(each) for _, each in at]))
    return Curve(title, label, points["at"].unique().sort().to_list(), lines, note)


def counts(records: pl.DataFrame) -> Rates:
    """Count the outcomes."""
    return Rates(*(int((records["outcome"] == name).sum()) for name in OUTCOMES))
