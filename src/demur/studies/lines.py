"""Lines of tables: each column of a line is an evaluation, and its figures are queries."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import polars as pl

from demur.evaluation.on_images import Evaluate
from demur.evaluation.plan import Outputs
from demur.evaluation.records import OUTCOMES, PLACE, worst_case
from demur.evaluation.results import Measurement
from demur.evaluation.tables import measured_share, outcome_shares
from demur.metrics import Rates, wilson_interval


@dataclass(frozen=True)
class Line:
    """A line of a table: its group and row, and the node of each of its columns."""

    group: str
    row: str
    nodes: Mapping[str, Evaluate]


def records_of(lines: Sequence[Line], outputs: Outputs) -> pl.DataFrame:
    """Give the records of all nodes, with the columns "group", "row" and "column"."""
    return pl.concat(
        outputs.records([node]).with_columns(
            group=pl.lit(line.group), row=pl.lit(line.row), column=pl.lit(column)
        )
        for line in lines
        for column, node in line.nodes.items()
    )


def worst_of(found: pl.DataFrame, met: str, name: str) -> pl.DataFrame:
    """Give the worst outcome over all columns, of the images that the column `met` has.

    The result has the column `name`.
    """
    images = found.filter(column=met)
    same = found.join(images, on=["group", "row", *PLACE], how="semi")
    return worst_case(same, ["group", "row", "model"]).with_columns(column=pl.lit(name))


def shares_of(found: pl.DataFrame, outcome: str, called: str = "") -> list[Measurement]:
    """Give the share of an outcome, in %, for each group, row and column.

    The column of the table is `called`, or has the name of the column of the records.
    """
    by = found.group_by("group", "row", "column", maintain_order=True)
    return [
        measured_share(str(row), called or str(column), outcome_shares(part)[outcome], str(group))
        for (group, row, column), part in by
    ]


def flag_share(row: str, column: str, flags: pl.Series, group: str = "") -> Measurement:
    """Give the share of the flags that are set, in %, with its 95 % interval."""
    if flags.is_empty():
        return Measurement(row, column, group, "%", n=0, note="no images")
    n = len(flags)
    low, high = wilson_interval(int(flags.sum()), n)
    share = 100 * int(flags.sum()) / n
    return Measurement(
        row, column, group, "%", measured=share, splits=1, n=n, low=100 * low, high=100 * high
    )


def mean_interval(values: pl.Series) -> tuple[float, float]:
    """Give the normal 95 % interval of a mean; without two values it is unbounded."""
    if len(values) < 2:
        return -math.inf, math.inf
    middle = float(values.to_numpy().mean())
    reach = 1.96 * float(values.to_numpy().std(ddof=1)) / math.sqrt(len(values))
    return middle - reach, middle + reach


def measured_mean(row: str, column: str, values: pl.Series, group: str = "") -> Measurement:
    """Give a mean over images, with its 95 % interval where there are two images."""
    if values.is_empty():
        return Measurement(row, column, group, n=0, note="none")
    mean = float(values.to_numpy().mean())
    if len(values) < 2:
        return Measurement(row, column, group, measured=mean, n=len(values))
    low, high = mean_interval(values)
    return Measurement(row, column, group, measured=mean, n=len(values), low=low, high=high)


def rates_of(found: pl.DataFrame) -> Rates:
    """Count the outcomes."""
    return Rates(*(int((found["outcome"] == name).sum()) for name in OUTCOMES))
