"""Errors, detections and accuracy at a threshold of the confidence, and over all thresholds."""

import torch
from torch import Tensor

from demur.metrics.outcomes import Rates
from demur.metrics.rejection.thresholds import quantile_threshold


def accuracy_or_rejection(found: Rates, eps: float) -> float:
    """Share of images that are correct or rejected (Sotgiu et al. 2020, sec. 4).

    Parameters
    ----------
    found : Rates
        Outcomes at `eps`.
    eps : float
        Size of the attack. At 0 (clean images) a rejection counts as an error.

    Returns
    -------
    float
        The share.

    Examples
    --------
    >>> found = Rates(correct=5, rejected=3, wrong=2)
    >>> accuracy_or_rejection(found, eps=0), accuracy_or_rejection(found, eps=0.1)
    (0.5, 0.8)
    """
    return found.accuracy if eps == 0 else found.accuracy + found.rejection_rate


def robust_error(
    clean_wrong: Tensor,
    clean_confidence: Tensor,
    attacked_wrong: Tensor,
    attacked_confidence: Tensor,
    threshold: float,
) -> float:
    """Compute the confidence-thresholded robust test error (Stutz et al. 2020, eq. 10).

    It is the share of errors among images that are accepted when clean or when attacked.

    Parameters
    ----------
    clean_wrong, clean_confidence : Tensor
        Errors (N,) bool and confidence (N,) of the clean images.
    attacked_wrong, attacked_confidence : Tensor
        The same of the attacked images, (N,), or (A, N) for A attacks, of which the worst counts
        for each image.
    threshold : float
        Smallest confidence that is accepted.

    Returns
    -------
    float
        The error; NaN if no image is accepted.

    Examples
    --------
    >>> wrong = torch.tensor([False, False])
    >>> robust_error(wrong, torch.ones(2), ~wrong, torch.tensor([0.25, 0.75]), threshold=0.5)
    0.5
    """
    shape = (-1, len(clean_wrong))
    attacked = attacked_confidence.reshape(shape) >= threshold
    clean = clean_confidence >= threshold
    errors = (clean_wrong & clean) | (attacked_wrong.reshape(shape) & attacked).any(0)
    accepted = clean | attacked.any(0)
    return float(errors.sum() / accepted.sum()) if bool(accepted.any()) else float("nan")


def false_positive_rate(
    attacked_wrong: Tensor, attacked_confidence: Tensor, threshold: float
) -> float:
    """Compute the share of accepted errors among attacked images (Stutz et al. 2020).

    Parameters
    ----------
    attacked_wrong, attacked_confidence : Tensor
        Errors (N,) bool and confidence (N,) of the attacked images.
    threshold : float
        Smallest confidence that is accepted.

    Returns
    -------
    float
        The share.

    Examples
    --------
    >>> false_positive_rate(torch.tensor([True, True]), torch.tensor([0.2, 0.8]), threshold=0.5)
    0.5
    """
    return float((attacked_wrong & (attacked_confidence >= threshold)).double().mean())


def tpr_at_fpr(
    validation_confidence: Tensor, attacked_confidence: Tensor, false_rejection_rate: float
) -> float:
    """Compute the detection rate of attacked images at a false rejection rate.

    Parameters
    ----------
    validation_confidence : Tensor
        Confidence (N,) of clean validation images, which set the threshold.
    attacked_confidence : Tensor
        Confidence (M,) of attacked images.
    false_rejection_rate : float
        Largest share of validation images that is rejected, in [0, 1].

    Returns
    -------
    float
        Share of the attacked images that is rejected.

    Examples
    --------
    >>> tpr_at_fpr(torch.tensor([0.4, 0.6, 0.8, 1.0]), torch.tensor([0.1, 0.5, 0.9]), 0.25)
    0.6666666666666666
    """
    threshold = quantile_threshold(validation_confidence, false_rejection_rate)
    return float((attacked_confidence < threshold).double().mean())


def accepted_accuracy(
    validation_confidence: Tensor, correct: Tensor, confidence: Tensor, share: float = 0.95
) -> float:
    """Compute the accuracy on accepted attacked images (TPR-95 for a share of 95 %).

    Unlike in TPR-95, the threshold is not set on attacked images.

    Parameters
    ----------
    validation_confidence : Tensor
        Confidence (M,) of clean validation images, which set the threshold.
    correct, confidence : Tensor
        Correctness (N,) bool and confidence (N,) of the attacked images.
    share : float, default=0.95
        Share of the validation images to accept.

    Returns
    -------
    float
        The accuracy; NaN if no attacked image is accepted.

    Examples
    --------
    >>> correct = torch.tensor([True, False])
    >>> accepted_accuracy(torch.tensor([0.5, 1.0]), correct, torch.tensor([0.75, 0.25]))
    1.0
    """
    accepted = confidence >= quantile_threshold(validation_confidence, 1 - share)
    return float(correct[accepted].double().mean()) if bool(accepted.any()) else float("nan")


def auroc(clean_confidence: Tensor, attacked_confidence: Tensor) -> float:
    """Compute the area under the ROC curve between clean images and successful attacks.

    Parameters
    ----------
    clean_confidence : Tensor
        Confidence (N,) of clean images.
    attacked_confidence : Tensor
        Confidence (M,) of successful attacks.

    Returns
    -------
    float
        Probability that a clean image has the larger confidence; NaN if N or M is 0.

    Examples
    --------
    >>> auroc(torch.tensor([0.6, 0.8]), torch.tensor([0.5, 0.7]))
    0.75
    """
    from sklearn.metrics import roc_auc_score

    if not len(clean_confidence) or not len(attacked_confidence):
        return float("nan")
    kinds = torch.cat([torch.ones(len(clean_confidence)), torch.zeros(len(attacked_confidence))])
    confidence = torch.cat([clean_confidence, attacked_confidence]).cpu()
    return float(roc_auc_score(kinds.numpy(), confidence.numpy()))
