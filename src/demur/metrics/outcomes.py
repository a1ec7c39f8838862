"""Counts of the three outcomes. All shares are in [0, 1]."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

import torch
from torch import Tensor

from demur.classifier import Outcome
from demur.errors import DemurError


@dataclass(frozen=True)
class Rates:
    """Number of images with each outcome.

    Parameters
    ----------
    correct : int
        Images that were classified correctly and accepted.
    rejected : int
        Rejected images: false rejections of clean images, detections of attacked images.
    wrong : int
        Images that were classified wrongly and accepted.

    Examples
    --------
    >>> found = Rates(correct=7, rejected=2, wrong=1)
    >>> found.accuracy, found.selective_accuracy
    (0.7, 0.875)
    """

    correct: int
    rejected: int
    wrong: int

    @property
    def n(self) -> int:
        """Number of all images."""
        return self.correct + self.rejected + self.wrong

    @property
    def accuracy(self) -> float:
        """Correct images over all images: a rejection counts as an error."""
        return self.correct / self.n

    @property
    def coverage(self) -> float:
        """Accepted images over all images."""
        return 1 - self.rejection_rate

    @property
    def selective_accuracy(self) -> float:
        """Correct images over accepted images; NaN if none was accepted."""
        accepted = self.correct + self.wrong
        return self.correct / accepted if accepted else math.nan

    @property
    def selective_f1(self) -> float:
        """Harmonic mean of selective accuracy and coverage; 0 if no image was accepted."""
        accepted = self.correct + self.wrong
        if not accepted:
            return 0.0
        return 2 * self.correct * accepted / (self.correct * self.n + accepted**2)

    @property
    def rejection_rate(self) -> float:
        """Rejected images over all images.

        This is the false rejection rate on clean images of the known classes, and the detection
        rate on attacked images.
        """
        return self.rejected / self.n

    @property
    def error_rate(self) -> float:
        """Wrong and accepted images over all images: the success rate of an attack."""
        return self.wrong / self.n


def rates(outcomes: Tensor) -> Rates:
    """Count outcomes.

    Parameters
    ----------
    outcomes : Tensor
        Integers (N,) of `demur.Outcome`, N at least 1.

    Returns
    -------
    Rates
        The number of images with each outcome.

    Raises
    ------
    DemurError
        For other values, shapes and types.

    Examples
    --------
    >>> rates(torch.tensor([0, 0, 1, 2]))
    Rates(correct=2, rejected=1, wrong=1)
    """
    if not isinstance(outcomes, Tensor) or outcomes.is_floating_point() or outcomes.is_complex():
        kind = outcomes.dtype if isinstance(outcomes, Tensor) else type(outcomes).__name__
        raise DemurError(
            f"rates need outcomes as an integer tensor, as from demur.outcomes, got {kind}."
        )
    if outcomes.ndim != 1 or len(outcomes) == 0:
        raise DemurError(
            f"rates need outcomes of shape (N,), at least one, got {tuple(outcomes.shape)}."
        )
    counts = torch.bincount(outcomes.cpu().long().clamp(min=0), minlength=3)
    if len(counts) != 3 or bool((outcomes < 0).any()):
        raise DemurError("outcomes must be 0 (correct), 1 (rejected) or 2 (wrong).")
    return Rates(
        correct=int(counts[Outcome.CORRECT]),
        rejected=int(counts[Outcome.REJECTED]),
        wrong=int(counts[Outcome.WRONG]),
    )


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation over repetitions.

    Parameters
    ----------
    mean : float
        Mean.
    sd : float or None
        Standard deviation with n - 1; None for one repetition.
    n : int
        Number of repetitions.
    """

    mean: float
    sd: float | None
    n: int


def spread(values: Sequence[float]) -> Spread:
    """Compute mean and sample standard deviation of the figures of repetitions.

    Parameters
    ----------
    values : sequence of float
        One figure for each repetition, at least one.

    Returns
    -------
    Spread
        Mean and standard deviation.

    Raises
    ------
    DemurError
        If there is no value.

    Examples
    --------
    >>> spread([1.0, 2.0, 3.0])
    Spread(mean=2.0, sd=1.0, n=3)
    """
    if not values:
        raise DemurError("a mean needs at least one value.")
    return Spread(fmean(values), stdev(values) if len(values) > 1 else None, len(values))
