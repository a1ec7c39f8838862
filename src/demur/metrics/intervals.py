"""Confidence intervals for shares."""

import math
from statistics import NormalDist
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import special, stats

from demur.errors import DemurError

Side = Literal["two-sided", "lower", "upper"]
Alternative = Literal["less", "greater"]

_OUTSIDE: Final = 1e-5
"""How sure the share of discordant pairs is within the range that a paired test searches."""
_GRID: Final = 49
"""Shares of discordant pairs that are searched."""
_TIE: Final = 1e-9
_STEPS: Final = 15  # halvings of a range of at most 2


def wilson_interval(successes: float, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Compute the Wilson score interval of a share (Wilson 1927).

    Parameters
    ----------
    successes : float
        Number of successes, in 0..n. It is no integer where each image counts by its mean over
        repetitions.
    n : int
        Number of trials. For 0 the interval is (0, 1).
    confidence : float, default=0.95
        Confidence level, in (0, 1).

    Returns
    -------
    low, high : float
        Bounds of the share.

    Raises
    ------
    DemurError
        For values out of range.

    Examples
    --------
    >>> low, high = wilson_interval(90, 100)
    >>> round(low, 3), round(high, 3)
    (0.826, 0.945)
    """
    _check(successes, n, confidence)
    if n == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share = successes / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    reach = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    # Without rounding errors, the bound is exactly 0 for no success and 1 for n successes.
    low = 0.0 if successes == 0 else centre - reach
    high = 1.0 if successes == n else centre + reach
    return low, high


def clopper_pearson(
    successes: float, n: int, confidence: float = 0.95, side: Side = "two-sided"
) -> tuple[float, float]:
    """Compute the exact interval of a share (Clopper and Pearson 1934).

    Parameters
    ----------
    successes : float
        Number of successes, in 0..n.
    n : int
        Number of trials. For 0 the interval is (0, 1).
    confidence : float, default=0.95
        Confidence level, in (0, 1).
    side : {"two-sided", "lower", "upper"}, default="two-sided"
        "lower" and "upper" give one-sided bounds: the other bound is 0 or 1.

    Returns
    -------
    low, high : float
        Bounds of the share.

    Raises
    ------
    DemurError
        For values out of range.

    Examples
    --------
    >>> low, high = clopper_pearson(0, 59, side="upper")
    >>> low, round(high, 3)
    (0.0, 0.05)
    """
    _check(successes, n, confidence)
    if side not in ("two-sided", "lower", "upper"):
        raise DemurError(f"side must be two-sided, lower or upper, not {side!r}.")
    tail = (1 - confidence) / (2 if side == "two-sided" else 1)
    low = 0.0
    high = 1.0
    if n and successes > 0 and side != "upper":
        low = float(stats.beta.ppf(tail, successes, n - successes + 1))
    if n and successes < n and side != "lower":
        high = float(stats.beta.ppf(1 - tail, successes + 1, n - successes))
    return low, high


def paired_p_value(
    gained: int, lost: int, n: int, difference: float = 0.0, alternative: Alternative = "less"
) -> float:
    """Test the difference of two shares that were measured on the same n things.

    The difference is (share of the second measurement) - (share of the first one). Things that are
    in both shares, or in none, say nothing about it: `gained` and `lost` count the others.

    For a difference of 0 this is McNemar's exact test (McNemar 1947): given gained + lost, `gained`
    is binomial. For other differences it is the exact unconditional test of Hsueh, Liu and Chen
    (2001) and Sidik (2003): outcomes are ordered by the score statistic of Tango (1998), and the
    p-value is the largest one over the unknown share of discordant pairs. Deviation: this share is
    searched within its Clopper-Pearson interval only, and the probability that the interval is
    wrong, 1e-5, is added to the p-value (Berger and Boos 1994).

    Parameters
    ----------
    gained, lost : int
        Number of things that only the second, and only the first measurement counts.
    n : int
        Number of things, at least gained + lost and 1.
    difference : float, default=0.0
        The difference that is tested, in (-1, 1).
    alternative : {"less", "greater"}, default="less"
        "less" gives evidence that the true difference is below `difference`.

    Returns
    -------
    float
        The p-value.

    Raises
    ------
    DemurError
        For values out of range.

    Examples
    --------
    >>> round(paired_p_value(1, 9, 200), 4)
    0.0107
    >>> round(paired_p_value(0, 0, 300, difference=0.01), 3)
    0.049
    """
    if alternative not in ("less", "greater"):
        raise DemurError(f"alternative must be less or greater, not {alternative!r}.")
    if min(gained, lost) < 0 or n < 1 or gained + lost > n or not -1 < difference < 1:
        raise DemurError(
            "a paired test needs 0 <= gained + lost <= n, n >= 1 and a difference in (-1, 1), "
            f"got {gained} and {lost} of {n} at {difference}."
        )
    if alternative == "greater":  # the same question with the measurements exchanged
        gained, lost, difference = lost, gained, -difference
    if difference == 0:
        return float(special.bdtr(gained, gained + lost, 0.5))
    return _unconditional(gained, lost, n, difference)


def paired_bounds(gained: int, lost: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Compute the two one-sided bounds of a difference of paired shares.

    Each bound inverts `paired_p_value`, and is rounded outwards by at most 2 ** -14.

    Parameters
    ----------
    gained, lost, n : int
        As in `paired_p_value`. For n = 0 the bounds are (-1, 1).
    confidence : float, default=0.95
        Confidence level of each bound, in (0, 1).

    Returns
    -------
    low, high : float
        Bounds of the difference, in [-1, 1].

    Raises
    ------
    DemurError
        For values out of range.

    Examples
    --------
    >>> low, high = paired_bounds(6, 4, 500)
    >>> round(low, 3), round(high, 3)
    (-0.007, 0.016)
    """
    _check(gained + lost, n, confidence)
    if n == 0:
        return -1.0, 1.0
    high = _upper_bound(gained, lost, n, 1 - confidence)
    return -_upper_bound(lost, gained, n, 1 - confidence), high


def _upper_bound(gained: int, lost: int, n: int, tail: float) -> float:
    """Halve the range in which the smallest rejected difference lies."""
    accepted = (gained - lost) / n
    rejected = 1.0
    for _ in range(_STEPS if accepted < rejected else 0):
        middle = (accepted + rejected) / 2
        if paired_p_value(gained, lost, n, middle) <= tail:
            rejected = middle
        else:
            accepted = middle
    return rejected


def _unconditional(gained: int, lost: int, n: int, difference: float) -> float:
    """Give the largest probability of outcomes that say "less" as much as the observed one."""
    pairs = np.arange(n + 1)  # possible numbers of discordant pairs
    observed = float(_score(np.array(gained), np.array(lost), n, difference))
    first = np.zeros(n + 1, dtype=np.int64)  # for each, how many values of `gained` say so: the
    end = pairs + 1  # score rises with `gained`, so that these are the first ones
    while bool((first < end).any()):
        middle = (first + end) // 2
        extreme = _score(middle, pairs - middle, n, difference) <= observed + _TIE
        open_ = first < end
        first = np.where(open_ & extreme, middle + 1, first)
        end = np.where(open_ & ~extreme, middle, end)
    low, high = clopper_pearson(gained + lost, n, 1 - _OUTSIDE)
    smallest = abs(difference)  # with fewer discordant pairs, the difference is smaller
    if high > smallest:
        # The square root of a share has an error that depends on n only: even steps miss no peak.
        start = math.sqrt(max(low - smallest, 0.0))
        shares = smallest + np.linspace(start, math.sqrt(high - smallest), _GRID) ** 2
    elif difference > 0:
        return _OUTSIDE
    else:
        shares = np.array([high])  # the difference that is nearest to the tested one: all are lost
    return min(1.0, float(_probabilities(first, n, shares, difference).max()) + _OUTSIDE)


def _probabilities(
    extreme: NDArray[np.int64], n: int, shares: NDArray[np.float64], difference: float
) -> NDArray[np.float64]:
    """Sum over the numbers of discordant pairs that are likely, for each share of such pairs."""
    reach = 8 * math.sqrt(n * shares.max() * (1 - shares.min())) + 30  # all but less than 1e-12
    start = max(0, math.floor(n * shares.min() - reach))
    pairs = np.arange(start, min(n, math.ceil(n * shares.max() + reach)) + 1)
    ways = special.gammaln(n + 1) - special.gammaln(pairs + 1) - special.gammaln(n - pairs + 1)
    share = shares[:, None]
    chances = np.exp(ways + special.xlogy(pairs, share) + special.xlog1py(n - pairs, -share))
    upward = np.clip((1 + difference / share) / 2, 0, 1)
    cases = extreme[pairs]
    below = np.where(cases > 0, special.bdtr(np.maximum(cases - 1, 0), pairs, upward), 0.0)
    found: NDArray[np.float64] = (chances * below).sum(1)
    return found


def _score(
    gained: NDArray[np.int64], lost: NDArray[np.int64], n: int, difference: float
) -> NDArray[np.float64]:
    """Compute the score statistic of Tango (1998, eq. 11) for a difference that is not 0."""
    linear = difference * (2 * n - gained + lost) - gained - lost
    constant = 8 * n * lost * difference * (1 - difference)
    only_first = (np.sqrt(np.maximum(linear * linear + constant, 0)) - linear) / (4 * n)
    variance = n * np.maximum(2 * only_first + difference * (1 - difference), 1e-300)
    score: NDArray[np.float64] = (gained - lost - n * difference) / np.sqrt(variance)
    return score


def _check(successes: float, n: int, confidence: float) -> None:
    if not 0 <= successes <= n or not 0 < confidence < 1:
        raise DemurError(
            "an interval needs 0 <= successes <= n and a confidence in (0, 1), "
            f"got {successes} of {n} at {confidence}."
        )
