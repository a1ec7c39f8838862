"""Figures made from outcomes. Pure functions of tensors; all shares are in 0..1."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, stdev

import torch
from torch import Tensor

from demur.classifier import Outcome
from demur.errors import DemurError


@dataclass(frozen=True)
class Rates:
    """How many of `n` images had each outcome. On clean images `rejected` are false rejections; under attack, detections."""

    correct: int
    rejected: int
    wrong: int

    @property
    def n(self) -> int:
        """All images."""
        return self.correct + self.rejected + self.wrong

    @property
    def accuracy(self) -> float:
        """Correct of all: a rejection counts as an error."""
        return self.correct / self.n

    @property
    def coverage(self) -> float:
        """Answered (not rejected) of all."""
        return 1 - self.rejection_rate

    @property
    def selective_accuracy(self) -> float:
        """Correct of those answered; NaN if none was."""
        answered = self.correct + self.wrong
        return self.correct / answered if answered else math.nan

    @property
    def balance(self) -> float:
        """Harmonic mean of selective accuracy and coverage: 2 a c / (a + c); 0 if nothing was answered."""
        answered = self.correct + self.wrong
        return 2 * self.correct * answered / (self.correct * self.n + answered**2) if answered else 0.0

    @property
    def rejection_rate(self) -> float:
        """Rejected of all: the false rejection rate on clean images of the known classes, the detection rate on attacked ones."""
        return self.rejected / self.n

    @property
    def error_rate(self) -> float:
        """Wrong *and accepted* of all: under attack, the attack's success rate."""
        return self.wrong / self.n


def rates(outcomes: Tensor) -> Rates:
    """Count outcomes (N,) of `Outcome`.

    Raises: DemurError if they are no integer tensor, there are none, or other values among them.
    """
    if not isinstance(outcomes, Tensor) or outcomes.is_floating_point() or outcomes.is_complex():
        kind = outcomes.dtype if isinstance(outcomes, Tensor) else type(outcomes).__name__
        raise DemurError(f"rates need outcomes as an integer tensor, as demur.outcomes gives them, not {kind}.")
    if outcomes.ndim != 1 or len(outcomes) == 0:
        raise DemurError(f"rates need outcomes of shape (N,), at least one; got {tuple(outcomes.shape)}.")
    counts = torch.bincount(outcomes.cpu().long().clamp(min=0), minlength=3)
    if len(counts) != 3 or bool((outcomes < 0).any()):
        raise DemurError("outcomes must be 0 (correct), 1 (rejected) or 2 (wrong).")
    return Rates(*(int(counts[outcome]) for outcome in (Outcome.CORRECT, Outcome.REJECTED, Outcome.WRONG)))


def wilson_interval(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Interval of a share, successes of n, that holds the true one with that confidence (Wilson 1927); (0, 1) for n = 0."""
    if not 0 <= successes <= n or not 0 < confidence < 1:
        raise DemurError(f"an interval needs 0 <= successes <= n and a confidence in (0, 1): got {successes} of {n} at {confidence}.")
    if n == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share = successes / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    reach = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    # At 0 and n the bound is exactly 0 and 1; the formula gives it but for rounding.
    return (0.0 if successes == 0 else centre - reach), (1.0 if successes == n else centre + reach)


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation over repetitions (None for a single one)."""

    mean: float
    sd: float | None
    n: int


def spread(values: Sequence[float]) -> Spread:
    """Mean and standard deviation (n - 1) of the repetitions' figures."""
    if not values:
        raise DemurError("a mean needs at least one value.")
    return Spread(fmean(values), stdev(values) if len(values) > 1 else None, len(values))
