"""Counts of cases: what was valid, what was refused in one line, and what failed."""

import random
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from demur.errors import DemurError, DemurWarning

Case = Callable[[random.Random], str]
"""One random case: gives a label for the counts. It raises AssertionError if demur is wrong."""


@dataclass
class Counts:
    """What became of the cases of one part."""

    valid: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        """Give the counts in one line, and each failure."""
        valid = sum(self.valid.values())
        refused = sum(self.refused.values())
        total = valid + refused + len(self.failures)
        line = f"{total} cases: {valid} valid, {refused} refused, {len(self.failures)} failed"
        return "\n".join([line, *self.failures])


def count_cases(case: Case, seed: int, cases: int | None, seconds: float) -> Counts:
    """Run cases until there are enough, or the time is over.

    Parameters
    ----------
    case : callable
    seed : int
        Case i draws from `random.Random(f"{seed} {i}")`, so that each can be repeated alone.
    cases : int or None
        None runs until the time is over.
    seconds : float

    Returns
    -------
    Counts
    """
    counts = Counts()
    end = time.monotonic() + seconds
    number = 0
    while (cases is None or number < cases) and time.monotonic() < end:
        run_case(case, seed, number, counts)
        number += 1
    return counts


def run_case(case: Case, seed: int, number: int, counts: Counts) -> None:
    """Run one case, and count what became of it."""
    source = random.Random(f"{seed} {number}")
    label = "?"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("ignore", DemurWarning)
            label = case(source)
    except DemurError as error:
        text = str(error)
        if "\n" in text or not text.strip():
            counts.failures.append(f"case {number}: a message of no or several lines: {text!r}")
        counts.refused[text.split(":")[0][:60]] += 1
    except Exception as error:
        place = traceback.format_exc().strip().splitlines()
        inside = [line.strip() for line in place if "File " in line][-2:]
        counts.failures.append(f"case {number}: {type(error).__name__}: {error} | {inside}")
    else:
        counts.valid[label] += 1
