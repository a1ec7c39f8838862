"""Cells of the tables of `harden.py`."""

from typing import Any

import polars as pl

from demur.evaluation.scoring import Row
from demur.metrics import clopper_pearson, paired_p_value


def percent(share: float) -> str:
    """Write a share in %."""
    return f"{100 * share:.1f}"


def wrong_of(records: pl.DataFrame) -> pl.Series:
    """Say for each image whether it is wrong and accepted."""
    return records.sort("index")["outcome"] == "wrong"


def clean_cells(records: pl.DataFrame) -> list[str]:
    """Give accuracy, coverage, and wrong-and-accepted images, of clean images."""
    count = records.height
    found = {kind: int((records["outcome"] == kind).sum()) for kind in ("correct", "rejected")}
    wrong = int(wrong_of(records).sum())
    shares = (found["correct"], count - found["rejected"], wrong)
    return [percent(one / count) for one in shares]


def attacked_cell(records: pl.DataFrame, baseline: pl.DataFrame | None) -> str:
    """Give the share that is wrong and accepted, and the difference from the baseline."""
    wrong = wrong_of(records)
    count = int(wrong.sum())
    low, high = clopper_pearson(count, len(wrong))
    said = f"{percent(count / len(wrong))} [{percent(low)}, {percent(high)}]"
    if baseline is None:
        return said
    before = wrong_of(baseline)
    gained, lost = int((wrong & ~before).sum()), int((before & ~wrong).sum())
    way: Any = "less" if gained < lost else "greater"
    chance = min(1.0, 2 * paired_p_value(gained, lost, len(wrong), alternative=way))
    shown = "p < 0.001" if chance < 0.001 else f"p = {chance:.2g}"
    return f"{said}; {100 * (gained - lost) / len(wrong):+.1f} ({shown})"


def ratio_cell(row: Row) -> str:
    """Give a ratio with the smallest and the largest one."""
    return f"{row.value:.2f} ({row.low:.2f} to {row.high:.2f})"


def equal_cell(row: Row) -> str:
    """Give the number of equal decisions."""
    return "no" if row.value is None or row.n is None else f"{round(row.value * row.n)} of {row.n}"
