"""The threshold of a hardened model, set on held-out images."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from demur.classifier import Classifier
from demur.data import to_float
from demur.errors import DemurError, amount
from demur.metrics.intervals import clopper_pearson
from demur.metrics.rejection.limits import just_below

AT_ONCE = 64


@dataclass(frozen=True)
class ThresholdRule:
    """How the threshold is set.

    Parameters
    ----------
    false_rejection_rate : float in [0, 1), default 0.02
        The largest share of held-out images that is rejected.
    max_wrong : float in (0, 1), optional
        In place of that: the smallest threshold with which the share of images that are answered
        wrong and accepted is at most so large, with this `confidence`.
    confidence : float in (0, 1), default 0.95

    Raises
    ------
    DemurError
        If a number is out of range.

    Examples
    --------
    >>> ThresholdRule(max_wrong=0.01).confidence
    0.95
    """

    false_rejection_rate: float = 0.02
    max_wrong: float | None = None
    confidence: float = 0.95

    def __post_init__(self) -> None:
        if not 0 <= self.false_rejection_rate < 1:
            raise DemurError(
                f"false_rejection_rate must be in [0, 1), not {self.false_rejection_rate}."
            )
        if self.max_wrong is not None and not 0 < self.max_wrong < 1:
            raise DemurError(f"max_wrong must be above 0 and below 1, not {self.max_wrong}.")
        if not 0 < self.confidence < 1:
            raise DemurError(f"confidence must be above 0 and below 1, not {self.confidence}.")


def check_enough(n: int, rule: ThresholdRule) -> None:
    """Raise DemurError if n held-out images cannot set a threshold by the rule.

    A false rejection rate must allow the rejection of one of them, or else the threshold lies below
    all their scores and rejects by no evidence; a rate of 0 asks for that. Of `max_wrong`, the
    Clopper-Pearson bound of no wrong image must be small enough.
    """
    if rule.max_wrong is not None:
        high = clopper_pearson(0, n, rule.confidence, "upper")[1]
        if high > rule.max_wrong:
            needed = math.ceil(math.log(1 - rule.confidence) / math.log1p(-rule.max_wrong))
            raise DemurError(
                f"no threshold keeps wrong and accepted images below {rule.max_wrong:g} with "
                f"confidence {rule.confidence:g}: even without any of them, "
                f"{amount(n, 'held-out image bounds', 'held-out images bound')} their share by "
                f"{high:.3g} only. It takes at least {needed}."
            )
        return
    rate = rule.false_rejection_rate
    if rate > 0 and int(rate * n + 1e-9) < 1:
        raise DemurError(
            f"{amount(n, 'held-out image is', 'held-out images are')} too few to set a threshold: "
            f"a false rejection rate of {100 * rate:g} % allows a rejection from "
            f"{math.ceil(1 / rate - 1e-9):,} held-out images on. Give more images (a fifth of them "
            "is held out), or a larger --false-rejection-rate."
        )


def set_threshold(
    classifier: Classifier, images: Tensor, labels: Tensor, rule: ThresholdRule
) -> str:
    """Set the threshold of a rejecting classifier on held-out images.

    Parameters
    ----------
    classifier : Classifier
        With a reject column. Its threshold is changed.
    images : Tensor of shape (n, C, H, W), uint8
        Images that nothing was fitted on (R17).
    labels : Tensor of shape (n,)
    rule : ThresholdRule

    Returns
    -------
    str
        A sentence that says what was reached.

    Raises
    ------
    DemurError
        If there are too few images, see `check_enough`.

    Notes
    -----
    The number of images that are wrong and accepted falls as the threshold rises. So the smallest
    threshold whose Clopper-Pearson bound holds is the end of a fixed sequence of tests, from the
    strictest threshold downwards (Angelopoulos et al. 2021, Learn then Test, sec. 3.2). The bound
    holds at the given confidence although many thresholds are looked at.
    """
    check_enough(len(images), rule)
    chunks = torch.split(images, 4 * AT_ONCE)
    scores = torch.cat([classifier.scores(to_float(part), AT_ONCE) for part in chunks])
    wrong = scores[:, : classifier.num_classes].argmax(1) != labels
    acceptance = torch.cat(
        [
            classifier._acceptance_of(to_float(part), some)
            for part, some in zip(chunks, torch.split(scores, 4 * AT_ONCE), strict=True)
        ]
    )
    order = acceptance.sort().values
    if rule.max_wrong is None:
        first = float(order[int(rule.false_rejection_rate * len(order) + 1e-9)])
    else:
        first = _first_accepted(order, acceptance[wrong], rule.max_wrong, rule.confidence)
    classifier._accept_from(just_below(order, first))
    decided = torch.cat([classifier.predict(to_float(part), AT_ONCE) for part in chunks])
    return _said(decided, labels, rule)


def _first_accepted(order: Tensor, wrong: Tensor, largest: float, confidence: float) -> float:
    """Give the smallest acceptance from which on the bound of wrong and accepted images holds."""
    n = len(order)
    allowed = -1
    while clopper_pearson(allowed + 1, n, confidence, "upper")[1] <= largest:
        allowed += 1
    if len(wrong) <= allowed:
        return float(order[0])
    refused = wrong.sort(descending=True).values[allowed]
    above = order[order > refused]
    return float(above[0]) if len(above) else math.inf


def _said(decided: Tensor, labels: Tensor, rule: ThresholdRule) -> str:
    n = len(labels)
    rejected = int((decided == -1).sum())
    wrong = int(((decided != labels) & (decided != -1)).sum())
    images = amount(n, "held-out image sets", "held-out images set")
    text = f"{images} the threshold: {100 * rejected / n:.3g} % of them are rejected"
    if rule.max_wrong is None:
        return f"{text}, where {100 * rule.false_rejection_rate:g} % were allowed."
    high = clopper_pearson(wrong, n, rule.confidence, "upper")[1]
    none = " No image is accepted." if rejected == n else ""
    return (
        f"{text}, {amount(wrong, 'is', 'are')} wrong and accepted. With confidence "
        f"{rule.confidence:g}, their share is at most {100 * high:.3g} % for images drawn like "
        f"these.{none}"
    )
