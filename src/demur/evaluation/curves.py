"""Curves of the three outcomes against the size of an attack, and against the rejection rate."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from demur.classifier import Classifier, check_classifier
from demur.errors import DemurError
from demur.metrics.outcomes import Rates, rates


@dataclass(frozen=True)
class SecurityCurve:
    """Outcomes of the attacked images at each eps.

    Parameters
    ----------
    eps : tuple of float
        Sizes of the attack, increasing.
    rates : tuple of Rates
        Outcomes at each eps.
    """

    eps: tuple[float, ...]
    rates: tuple[Rates, ...]


def security_curve(outcomes_at: Callable[[float], Tensor], eps: Sequence[float]) -> SecurityCurve:
    """Count the outcomes of attacked images at increasing eps.

    Parameters
    ----------
    outcomes_at : callable
        Attacks at an eps, and returns the outcomes (N,) of the attacked images. At 0 they must be
        the clean images (R2).
    eps : sequence of float
        Sizes of the attack, increasing from 0 or more.

    Returns
    -------
    SecurityCurve
        The outcomes at each eps.

    Raises
    ------
    DemurError
        If eps does not increase, or is negative.

    Examples
    --------
    >>> security_curve(lambda eps: torch.tensor([0, 2 if eps else 0]), [0, 0.1]).rates[1]
    Rates(correct=1, rejected=0, wrong=1)
    """
    if list(eps) != sorted(set(eps)) or not eps or eps[0] < 0:
        raise DemurError(f"a security curve needs increasing eps from 0 up, got {list(eps)}.")
    return SecurityCurve(tuple(eps), tuple(rates(outcomes_at(value)) for value in eps))


class _Shifted(nn.Module):
    def __init__(self, classifier: Classifier, offset: float) -> None:
        super().__init__()
        self.classifier = classifier
        self.offset = offset

    def forward(self, images: Tensor) -> Tensor:
        scores: Tensor = self.classifier(images)
        return torch.cat([scores[:, :-1], scores[:, -1:] + self.offset], dim=1)


def shifted(classifier: Classifier, offset: float) -> Classifier:
    """Add a constant to the reject score of a classifier.

    Parameters
    ----------
    classifier : Classifier
        With a reject column.
    offset : float
        The constant. A positive one makes the classifier reject more.

    Returns
    -------
    Classifier
        A new classifier around the given one.

    Examples
    --------
    >>> classifier = Classifier(nn.Flatten(), num_classes=2)
    >>> shifted(classifier, 0.25).scores(torch.tensor([[[[0.25, 0.75, 0.5]]]])).tolist()
    [[0.25, 0.75, 0.75]]
    """
    check_classifier(classifier)
    return Classifier(_Shifted(classifier, offset), classifier.num_classes)


def offset_for(classifier: Classifier, images: Tensor, rejection_rate: float) -> float:
    """Compute the offset of the reject score for a false rejection rate.

    Parameters
    ----------
    classifier : Classifier
        With a reject column.
    images : Tensor
        Clean images (N, C, H, W) in [0, 1], used neither for training nor for testing (R17).
    rejection_rate : float
        Largest share of these images that is rejected, in [0, 1). Images with equal margins at the
        threshold are all accepted.

    Returns
    -------
    float
        The offset for `shifted`.

    Raises
    ------
    DemurError
        Without a reject column, and for a rate out of range.

    Examples
    --------
    >>> classifier = Classifier(nn.Flatten(), num_classes=2)
    >>> images = torch.rand(20, 1, 1, 3, generator=torch.Generator().manual_seed(0))
    >>> offset = offset_for(classifier, images, rejection_rate=0.1)
    >>> int((shifted(classifier, offset).predict(images) == -1).sum())
    2
    """
    check_classifier(classifier)
    if not 0 <= rejection_rate < 1:
        raise DemurError(f"a rejection rate lies in [0, 1), got {rejection_rate:g}.")
    scores = classifier.scores(images).double()
    if scores.shape[1] == classifier.num_classes:
        raise DemurError("this classifier has no reject column to shift.")
    margins = (scores[:, :-1].amax(1) - scores[:, -1]).sort().values
    threshold = float(margins[int(rejection_rate * len(margins) + 1e-9)])
    # Slightly less: adding it to a float32 score rounds; the image at the threshold is accepted.
    return threshold - 1e-5 * max(1.0, abs(threshold))
