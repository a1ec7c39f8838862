"""Shares of outcomes as figures of a table and series of a curve, with their intervals."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from demur.evaluation.results import Measurement, Series
from demur.metrics import Rates, spread, wilson_interval

Printed = tuple[float, float | None]
"""What a paper prints: a mean, and its sd if it has one."""

UNKNOWN: Printed = (math.nan, None)

FRONT = "Outcomes of each model under each attacker"
"""Title of the table from which comparisons of runs are made. Its groups are attackers, its rows
models.
"""

ATTACKED_BY = ("no attack", "defence-unaware", "defence-aware", "strongest ensemble")
"""The attackers of that table, from the weakest to the strongest."""

OUTCOMES: dict[str, Callable[[Rates], int]] = {
    "correct": lambda found: found.correct,
    "wrong": lambda found: found.wrong,
    "rejected": lambda found: found.rejected,
}


def share(
    row: str,
    column: str,
    counts: Sequence[tuple[int, int]],
    *,
    group: str = "",
    paper: Printed = UNKNOWN,
    note: str = "",
) -> Measurement:
    """Make a figure in % from (successes, n) of each repetition.

    It has the mean and the sd over the repetitions, and the 95 % Wilson interval of all their
    images. The interval is for these models; the sd says how much models differ.
    """
    figure = Measurement(
        row=row,
        column=column,
        group=group,
        unit="%",
        paper=None if math.isnan(paper[0]) else paper[0],
        paper_sd=paper[1],
    )
    if not all(n for _, n in counts):
        return replace(figure, n=0, note="no images")
    over = spread([100 * successes / n for successes, n in counts])
    total, n = sum(successes for successes, _ in counts), sum(n for _, n in counts)
    low, high = (100 * bound for bound in wilson_interval(total, n))
    return replace(
        figure, measured=over.mean, sd=over.sd, splits=over.n, n=n, low=low, high=high, note=note
    )


def written(eps: float) -> str:
    """An eps of Linf as the field writes it: 8/255, or .3 as it is."""
    levels = round(255 * eps, 6)
    return f"{levels:g}/255" if levels == int(levels) and levels < 64 else f"{eps:g}"


def series(name: str, points: Sequence[Rates]) -> Series:
    """The outcomes at each x of a curve."""

    def of(outcome: str) -> list[float]:
        return [OUTCOMES[outcome](point) / point.n for point in points]

    return Series(name, of("correct"), of("rejected"), of("wrong"), points[0].n)
