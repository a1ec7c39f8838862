"""Confidence of an answer, and thresholds of it."""

from torch import Tensor

from demur.classifier import Classifier
from demur.errors import DemurError


def confidences(classifier: Classifier, images: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the confidence and the class of each answer.

    Parameters
    ----------
    classifier : Classifier
        With or without a reject column.
    images : Tensor
        Images (N, C, H, W) in [0, 1].

    Returns
    -------
    confidence : Tensor
        Best class score minus the reject score (N,): negative where the image is rejected. Without
        a reject column, best class score minus the second best.
    classes : Tensor
        Best classes (N,).

    Examples
    --------
    >>> import torch
    >>> classifier = Classifier(torch.nn.Flatten(), num_classes=2)
    >>> confidence, classes = confidences(classifier, torch.tensor([[[[0.25, 0.75, 0.5]]]]))
    >>> confidence.tolist(), classes.tolist()
    ([0.25], [1])
    """
    scores = classifier.scores(images)
    best, classes = scores[:, : classifier.num_classes].topk(2, dim=1)
    rival = scores[:, -1] if scores.shape[1] > classifier.num_classes else best[:, 1]
    return best[:, 0] - rival, classes[:, 0]


def quantile_threshold(best: Tensor, rate: float) -> float:
    """Compute the largest threshold that rejects at most a share of some scores.

    Parameters
    ----------
    best : Tensor
        Scores (n,), rejected below the threshold.
    rate : float
        Largest share that is rejected, in [0, 1].

    Returns
    -------
    float
        The score of rank floor(rate n), counted from 0 from the smallest. A score equal to the
        threshold is accepted, so ties are never rejected in excess (R17).

    Examples
    --------
    >>> import torch
    >>> round(quantile_threshold(torch.tensor([0.1, 0.2, 0.3, 0.4]), 0.5), 3)
    0.3
    """
    ordered = best.sort().values
    return float(ordered[min(len(ordered) - 1, int(rate * len(ordered) + 1e-9))])


def acceptance_threshold(confidence: Tensor, correct: Tensor, share: float = 0.99) -> float:
    """Compute the largest threshold that accepts a share of the correct validation images.

    Parameters
    ----------
    confidence : Tensor
        Confidence (N,) of clean validation images.
    correct : Tensor
        (N,) bool, True where the class is correct.
    share : float, default=0.99
        Share of the correct images to accept, in (0, 1]. Stutz et al. 2020 use 99 %.

    Returns
    -------
    float
        The threshold.

    Raises
    ------
    DemurError
        If no image is correct, or the share is out of range.

    Examples
    --------
    >>> import torch
    >>> confidence = torch.tensor([0.25, 0.5, 0.75, 1.0])
    >>> acceptance_threshold(confidence, torch.tensor([False, True, True, True]), share=1)
    0.5
    """
    if not bool(correct.any()) or not 0 < share <= 1:
        raise DemurError(
            "a threshold needs a share in (0, 1] and at least one image that is classified "
            "correctly."
        )
    return quantile_threshold(confidence[correct], 1 - share)
