"""Metrics that are updated batch by batch, and merged over workers.

Each has `update`, `merge` and `compute`. The order of updates and merges changes nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev
from typing import Literal, Self, TypeVar

import torch
from torch import Tensor

from demur.classifier import Outcome
from demur.errors import DemurError
from demur.metrics.intervals import clopper_pearson, wilson_interval
from demur.metrics.outcomes import rates
from demur.metrics.rejection.detection import auroc

Key = TypeVar("Key")

NAMES = {outcome: outcome.name.lower() for outcome in Outcome}


@dataclass(frozen=True)
class Share:
    """A share of images.

    Parameters
    ----------
    value : float
        The mean over the repetitions, in [0, 1].
    n : int
        Number of different images.
    low, high : float
        Bounds of the 95 % interval over these images.
    sd : float or None
        Standard deviation over the repetitions; None for one.
    repeats : int
        Number of repetitions.
    """

    value: float
    n: int
    low: float
    high: float
    sd: float | None = None
    repeats: int = 1


@dataclass
class OutcomeShares:
    """Shares of the three outcomes.

    An image that is in several repetitions (splits, seeds) counts once in the interval, by its
    mean. More repetitions on the same images give no narrower interval.

    Examples
    --------
    >>> metric = OutcomeShares()
    >>> metric.update(torch.tensor([0, 0, 2]), ["a", "b", "c"], repeat=0)
    >>> metric.update(torch.tensor([0, 2, 2]), ["a", "b", "c"], repeat=1)
    >>> wrong = metric.compute()["wrong"]
    >>> wrong.value, wrong.n, wrong.repeats
    (0.5, 3, 2)
    """

    by_repeat: dict[int, list[int]] = field(default_factory=dict)
    by_image: dict[str, list[int]] = field(default_factory=dict)

    def update(self, outcomes: Tensor, images: Sequence[str], repeat: int = 0) -> None:
        """Count outcomes (N,) of the images with these N names."""
        if len(images) != len(outcomes):
            raise DemurError(f"{len(outcomes)} outcomes need as many names, not {len(images)}.")
        if len(outcomes) == 0:
            return
        found = rates(outcomes)
        counts = self.by_repeat.setdefault(repeat, [0, 0, 0])
        for place, number in enumerate((found.correct, found.rejected, found.wrong)):
            counts[place] += number
        for image, outcome in zip(images, outcomes.tolist(), strict=True):
            self.by_image.setdefault(image, [0, 0, 0])[outcome] += 1

    def merge(self, other: Self) -> None:
        """Add the counts of another one."""
        _add(self.by_repeat, other.by_repeat)
        _add(self.by_image, other.by_image)

    def compute(
        self, method: Literal["wilson", "clopper-pearson"] = "wilson", confidence: float = 0.95
    ) -> dict[str, Share]:
        """Give the share of each outcome, by its name.

        Raises
        ------
        DemurError
            Without images.
        """
        if not self.by_image:
            raise DemurError("shares need at least one image.")
        interval = wilson_interval if method == "wilson" else clopper_pearson
        n = len(self.by_image)
        shares = {}
        for outcome, name in NAMES.items():
            each = [counts[outcome] / sum(counts) for counts in self.by_repeat.values()]
            images = sum(counts[outcome] / sum(counts) for counts in self.by_image.values())
            low, high = interval(min(images, n), n, confidence)
            sd = stdev(each) if len(each) > 1 else None
            shares[name] = Share(fmean(each), n, low, high, sd, len(each))
        return shares


@dataclass
class RejectionFigures:
    """Figures of the reject margin over clean and attacked images.

    Examples
    --------
    >>> metric = RejectionFigures()
    >>> metric.update(clean=torch.tensor([1.0, 2.0]), attacked=torch.tensor([-1.0, 0.5]))
    >>> metric.compute()["auroc"]
    1.0
    """

    clean: list[Tensor] = field(default_factory=list)
    attacked: list[Tensor] = field(default_factory=list)

    def update(self, clean: Tensor | None = None, attacked: Tensor | None = None) -> None:
        """Add reject margins (n,) of clean and of attacked images."""
        if clean is not None:
            self.clean.append(clean.detach().double().cpu())
        if attacked is not None:
            self.attacked.append(attacked.detach().double().cpu())

    def merge(self, other: Self) -> None:
        """Add the margins of another one."""
        self.clean += other.clean
        self.attacked += other.attacked

    def compute(self, threshold: float = 0.0) -> dict[str, float]:
        """Give "false_rejection_rate" and "detection_rate" at a threshold, and "auroc"."""
        if not self.clean or not self.attacked:
            raise DemurError("rejection figures need clean and attacked images.")
        clean = torch.cat(self.clean)
        attacked = torch.cat(self.attacked)
        return {
            "false_rejection_rate": float((clean < threshold).double().mean()),
            "detection_rate": float((attacked < threshold).double().mean()),
            "auroc": auroc(clean, attacked),
        }


@dataclass
class OutcomeCurve:
    """Outcomes at every threshold of the reject margin.

    Examples
    --------
    >>> metric = OutcomeCurve()
    >>> metric.update(torch.tensor([0.5, 2.0]), torch.tensor([False, True]))
    >>> metric.compute([0.0, 1.0])["wrong"]
    [0.5, 0.0]
    """

    margins: list[Tensor] = field(default_factory=list)
    right: list[Tensor] = field(default_factory=list)

    def update(self, margins: Tensor, right: Tensor) -> None:
        """Add reject margins (n,), and whether the best class is the true one (n,)."""
        self.margins.append(margins.detach().double().cpu())
        self.right.append(right.detach().bool().cpu())

    def merge(self, other: Self) -> None:
        """Add the images of another one."""
        self.margins += other.margins
        self.right += other.right

    def compute(self, thresholds: Sequence[float]) -> dict[str, list[float]]:
        """Give the shares of the outcomes, by name, at each threshold."""
        if not self.margins:
            raise DemurError("a curve needs at least one image.")
        margins = torch.cat(self.margins)
        right = torch.cat(self.right)
        accepted = [margins >= threshold for threshold in thresholds]
        return {
            "correct": [float((one & right).double().mean()) for one in accepted],
            "rejected": [float((~one).double().mean()) for one in accepted],
            "wrong": [float((one & ~right).double().mean()) for one in accepted],
        }


def _add(mine: dict[Key, list[int]], theirs: dict[Key, list[int]]) -> None:
    for key, counts in theirs.items():
        before = mine.get(key, [0, 0, 0])
        mine[key] = [one + other for one, other in zip(before, counts, strict=True)]
