"""Selective prediction: the errors among the images that a model is surest of."""

import torch
from torch import Tensor

from demur.errors import DemurError


def risk_coverage(confidence: Tensor, correct: Tensor) -> Tensor:
    """Compute the risk at each coverage: the share of errors among the k surest images.

    El-Yaniv & Wiener 2010. Images of equal confidence are accepted in a random order: the risk is
    its mean over these orders.

    Parameters
    ----------
    confidence : Tensor of shape (N,)
        Larger is surer.
    correct : Tensor of shape (N,), bool
        Whether the best class is the true one.

    Returns
    -------
    Tensor of shape (N,), float64
        The risk at coverage 1 / N, 2 / N, ..., 1.

    Raises
    ------
    DemurError
        If there is no image, the shapes differ, or a confidence is NaN.

    Examples
    --------
    >>> sure, right = torch.tensor([0.9, 0.8, 0.7, 0.6]), torch.tensor([True, True, False, True])
    >>> risk_coverage(sure, right)
    tensor([0.0000, 0.0000, 0.3333, 0.2500], dtype=torch.float64)
    """
    if confidence.ndim != 1 or confidence.shape != correct.shape or not len(confidence):
        raise DemurError(
            "a risk-coverage curve needs a confidence and a verdict for each of some images, got "
            f"{tuple(confidence.shape)} and {tuple(correct.shape)}."
        )
    if bool(confidence.isnan().any()):
        raise DemurError("a confidence is NaN.")
    levels, place = torch.unique(confidence, return_inverse=True)  # in ascending order
    wrong = torch.zeros(len(levels), dtype=torch.float64)
    wrong.index_add_(0, place, (~correct.bool()).double())
    count = torch.bincount(place, minlength=len(levels)).double()
    # Each image of a level stands for the mean error of the level.
    each = (wrong / count)[place]
    errors = each[confidence.argsort(descending=True, stable=True)].cumsum(0)
    return errors / torch.arange(1, len(errors) + 1, dtype=torch.float64)


def aurc(confidence: Tensor, correct: Tensor) -> float:
    """Compute the area under the risk-coverage curve: the mean risk over all coverages.

    Geifman, Uziel & El-Yaniv 2019. 0 is best; a model that knows nothing of its errors has its
    error rate.

    Parameters
    ----------
    confidence, correct
        As in `risk_coverage`.

    Examples
    --------
    >>> aurc(torch.tensor([0.9, 0.1]), torch.tensor([True, False]))
    0.25
    """
    return float(risk_coverage(confidence, correct).mean())
