"""Curves: the three outcomes as the attacker is allowed more, and as the classifier rejects more."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from demur.classifier import Classifier, check_classifier
from demur.errors import DemurError
from demur.evaluation.metrics import Rates, rates


@dataclass(frozen=True)
class SecurityCurve:
    """Outcomes of the attacker's attempts at each eps, in the order of `eps`."""

    eps: tuple[float, ...]
    rates: tuple[Rates, ...]


def security_curve(outcomes_at: Callable[[float], Tensor], eps: Sequence[float]) -> SecurityCurve:
    """Count the outcomes of what an attacker would send, as eps grows.

    Args:
        outcomes_at: attacks at an eps, and gives the outcomes (N,) of the attempts.
        eps: increasing, not negative. At 0 every attack must send the clean image (R2).
    """
    if list(eps) != sorted(set(eps)) or not eps or eps[0] < 0:
        raise DemurError(f"a security curve needs increasing eps from 0 up, not {list(eps)}.")
    return SecurityCurve(tuple(eps), tuple(rates(outcomes_at(value)) for value in eps))


class _Shifted(nn.Module):
    def __init__(self, classifier: Classifier, offset: float) -> None:
        super().__init__()
        self.classifier, self.offset = classifier, offset

    def forward(self, images: Tensor) -> Tensor:
        scores: Tensor = self.classifier(images)
        return torch.cat([scores[:, :-1], scores[:, -1:] + self.offset], dim=1)


def shifted(classifier: Classifier, offset: float) -> Classifier:
    """Give the classifier with `offset` added to its reject score: one that rejects more, or less."""
    check_classifier(classifier)
    return Classifier(_Shifted(classifier, offset), classifier.num_classes)


def offset_for(classifier: Classifier, images: Tensor, rejection_rate: float) -> float:
    """Find the offset of the reject score at which no more than that share of these images is rejected, and no smaller share can be.

    Args:
        classifier: with a reject column.
        images: clean images (N, C, H, W) that are neither trained on nor tested with (R17).
        rejection_rate: in [0, 1). With fewer than one image to reject, none is; of images that tie at the threshold, none is.
    """
    check_classifier(classifier)
    if not 0 <= rejection_rate < 1:
        raise DemurError(f"a rejection rate lies in [0, 1), not at {rejection_rate:g}.")
    scores = classifier.scores(images).double()
    if scores.shape[1] == classifier.num_classes:
        raise DemurError("this classifier has no reject column to shift.")
    margins = (scores[:, :-1].amax(1) - scores[:, -1]).sort().values
    threshold = float(margins[int(rejection_rate * len(margins) + 1e-9)])
    # A hair below, since adding it to a float32 score rounds: the image at the threshold is to be accepted.
    return threshold - 1e-5 * max(1.0, abs(threshold))
