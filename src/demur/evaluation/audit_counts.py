"""Rows of self-tests that count images or average over them: bounds, states and power."""

import math
from collections.abc import Sequence
from functools import cache
from itertools import count as numbers
from typing import Final

from torch import Tensor

from demur.errors import amount
from demur.evaluation.audit_results import CheckRow, State, ThreatRow
from demur.evaluation.records import OUTCOMES
from demur.metrics.intervals import clopper_pearson

CONFIDENCE: Final = 0.95
NORMAL: Final = 1.645
"""The quantile of the normal distribution for a one-sided bound of 95 %."""
WIDE: Final = 0.25
"""An audit with a wider 95 % interval has few images, and says so."""
NAMED: Final = 5
"""Images that a row names."""


def few_images(rows: Sequence[ThreatRow]) -> list[str]:
    """Say that there are few images, where a 95 % interval of a share is wider than `WIDE`.

    Examples
    --------
    >>> low, high = clopper_pearson(5, 5)
    >>> row = ThreatRow("linf:0.1", "evade", 5, 0, 0, 1 - low, 0, 0, 1 - low, 1, low, high)
    >>> few_images([row])[0][:69]
    '5 images are few: the 95 % intervals are up to 52 points wide (at lin'
    """
    widths = [
        (getattr(row, f"{name}_high") - getattr(row, f"{name}_low"), row.n, row, name)
        for row in rows
        for name in reversed(OUTCOMES)
    ]
    width, n, row, name = max(widths, key=lambda one: one[0])
    if width <= WIDE:
        return []
    low, high = (100 * getattr(row, f"{name}_{side}") for side in ("low", "high"))
    where = "without an attack" if row.threat == "clean" else f"at {row.threat}"
    return [
        f"{amount(n, 'image is', 'images are')} few: the 95 % intervals are up to "
        f"{100 * width:.0f} points wide ({where}, {low:.1f} to {high:.1f} % {name}), and the "
        f"self-tests find only gross faults. From {_enough()} images on, no interval is wider than "
        f"{100 * WIDE:.0f} points."
    ]


@cache
def _enough() -> int:
    """Give the number of images from which on no interval is wider than `WIDE`."""

    def width(n: int) -> float:
        low, high = clopper_pearson(n // 2, n)  # the widest of n images
        return high - low

    return next(n for n in numbers(1) if width(n) <= WIDE)


def low_of(count: int, n: int) -> float:
    """Give the one-sided 95 % lower bound of a share."""
    return clopper_pearson(count, n, CONFIDENCE, "lower")[0]


def counted(
    name: str, count: int, n: int, limit: float, text: str, images: Sequence[str] = ()
) -> CheckRow:
    """Make the row of a check that counts images: flagged if the bound exceeds the limit.

    Examples
    --------
    >>> counted("noise", 1, 50, 0.0, "images").state, counted("noise", 1, 50, 0.01, "images").state
    ('flagged', 'passed')
    """
    if not n:
        return CheckRow(name, None, limit, "not_run", f"it counts {text}")
    state: State = "flagged" if low_of(count, n) > limit else "passed"
    few = power(n, limit)
    seen = f"The check would flag {amount(few, 'such image')} or more."
    if few > n:
        seen = f"With {amount(n, 'image')}, the check flags nothing."
    said = f"{count} of {n} {text}. {seen}{named(images)}"
    return CheckRow(name, count / n, limit, state, said)


def named(images: Sequence[str]) -> str:
    """Name some images, for the end of a text."""
    if not images:
        return ""
    more = ", ..." if len(images) > NAMED else ""
    return f" Images: {', '.join(one[:8] for one in images[:NAMED])}{more}."


def power(n: int, limit: float) -> int:
    """Give the smallest count of n that is flagged, or n + 1 if none is.

    Examples
    --------
    >>> power(50, 0.0), power(50, 0.01), power(8, 0.05)
    (1, 3, 3)
    """
    low, high = 0, n + 1
    while low < high:
        middle = (low + high) // 2
        if low_of(middle, n) > limit:
            high = middle
        else:
            low = middle + 1
    return low


def averaged(name: str, values: Tensor, limit: float, text: str) -> CheckRow:
    """Make the row of a check that averages over images (n,): flagged if the one-sided 95 % lower
    bound of the mean exceeds the limit.

    Examples
    --------
    >>> import torch
    >>> averaged("unstable predictions", torch.full((20,), 0.2), 0.1, "the change").state
    'flagged'
    """
    n = len(values)
    mean = float(values.double().mean())
    reach = NORMAL * float(values.double().std()) / math.sqrt(n) if n > 1 else 1.0
    state: State = "flagged" if mean - reach > limit else "passed"
    said = (
        f"{text} is {mean:.3f} on average over {amount(n, 'image')}. The check would flag a mean "
        f"above {limit + reach:.3f}."
    )
    return CheckRow(name, mean, limit, state, said)


def worst_of(rows: Sequence[CheckRow]) -> CheckRow:
    """Give the row that says most against the attacks: one row stands for all threats."""
    order = ("not_applicable", "passed", "not_run", "flagged")
    return max(rows, key=lambda row: (order.index(row.state), row.value or 0.0))
