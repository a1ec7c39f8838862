"""Figures for classifiers that reject: pure functions of what was found, one value an image; all shares are in 0..1.

Confidence is what rejection compares with its threshold: an image is accepted where it is at least that. For a classifier with a
reject column, `confidences` gives the best class score less the reject score. Thresholds come from clean validation images alone.
Attacked images must come from an attacker who knows the threshold that they are judged at: an attack that stops at its first success
ends just above its own threshold, and is rejected by any higher one. Where one attack is judged at many thresholds (`separability`),
let it go on to the largest loss: a goal with a confidence that is never reached.
"""

from collections.abc import Callable, Sequence

import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

from demur.classifier import Classifier, Outcome
from demur.defenses.neural_rejection import quantile_threshold
from demur.errors import DemurError
from demur.evaluation.metrics import Rates


def confidences(classifier: Classifier, images: Tensor) -> tuple[Tensor, Tensor]:
    """By how much the best class wins against rejection (N,), and which class that is (N,); rejected is where the former is negative.

    Without a reject column it is by how much the best class wins against the second.
    """
    scores = classifier.scores(images)
    best, classes = scores[:, : classifier.num_classes].topk(2, dim=1)
    rival = scores[:, -1] if scores.shape[1] > classifier.num_classes else best[:, 1]
    return best[:, 0] - rival, classes[:, 0]


def accuracy_or_rejection(found: Rates, eps: float) -> float:
    """Correct or rejected of all; on clean images, at eps 0, a rejection is an error (Sotgiu et al. 2020, sec. 4)."""
    return found.accuracy if eps == 0 else found.accuracy + found.rejection_rate


def acceptance_threshold(confidence: Tensor, correct: Tensor, share: float = 0.99) -> float:
    """The largest threshold that accepts at least that share of the correctly classified clean validation images (CCAT: 99 %)."""
    if not bool(correct.any()) or not 0 < share <= 1:
        raise DemurError("a threshold needs a share in (0, 1] and at least one image that is classified correctly.")
    return quantile_threshold(confidence[correct], 1 - share)


def robust_error(
    clean_wrong: Tensor, clean_confidence: Tensor, attacked_wrong: Tensor, attacked_confidence: Tensor, threshold: float
) -> float:
    """Confidence-thresholded robust test error: errors among images that are accepted, clean or attacked (Stutz et al. 2020, eq. 10).

    Args:
        clean_wrong, clean_confidence: (N,). attacked_wrong, attacked_confidence: (N,), or (A, N) for A attacks, the worst of
            which counts, image by image.

    NaN where no image is accepted, clean or attacked.
    """
    shape = (-1, len(clean_wrong))
    attacked_wrong, attacked = attacked_wrong.reshape(shape), attacked_confidence.reshape(shape) >= threshold
    clean = clean_confidence >= threshold
    errors = (clean_wrong & clean) | (attacked_wrong & attacked).any(0)
    accepted = clean | attacked.any(0)
    return float(errors.sum() / accepted.sum()) if bool(accepted.any()) else float("nan")


def false_acceptance(attacked_wrong: Tensor, attacked_confidence: Tensor, threshold: float) -> float:
    """Accepted errors of all attacked images (N,): the false positive rate of Stutz et al. 2020."""
    return float((attacked_wrong & (attacked_confidence >= threshold)).double().mean())


def detection_rate(validation_confidence: Tensor, attacked_confidence: Tensor, false_rejection_rate: float) -> float:
    """Share of attacked images (M,) that are rejected where at most that share of clean validation images (N,) is."""
    return float((attacked_confidence < quantile_threshold(validation_confidence, false_rejection_rate)).double().mean())


def accepted_accuracy(validation_confidence: Tensor, correct: Tensor, confidence: Tensor, share: float = 0.95) -> float:
    """Accuracy of what is accepted where that share of clean validation images is (TPR-95, with a threshold not set on the attack).

    `correct` and `confidence` are (N,), of attacked images. NaN where none is accepted.
    """
    accepted = confidence >= quantile_threshold(validation_confidence, 1 - share)
    return float(correct[accepted].double().mean()) if bool(accepted.any()) else float("nan")


def separability(clean_confidence: Tensor, attacked_confidence: Tensor) -> float:
    """Area under the ROC curve of telling clean images from successful attacks by confidence. NaN if there is none of a kind."""
    if not len(clean_confidence) or not len(attacked_confidence):
        return float("nan")
    kinds = torch.cat([torch.ones(len(clean_confidence)), torch.zeros(len(attacked_confidence))])
    return float(roc_auc_score(kinds.numpy(), torch.cat([clean_confidence, attacked_confidence]).cpu().numpy()))


def error_with_rejection(broken: Tensor, rejected_at: Tensor, eps: float, alphas: Sequence[float]) -> list[float]:
    """R_eps(f, alpha): an accepted error within eps, or a rejection within alpha eps (Chen et al. 2023, eq. 1), for each alpha.

    Args:
        broken: (N,) bool, an accepted error was found within eps. rejected_at: (N,) the size of the smallest change that was found
            to be rejected: 0 where the clean image is, infinite where none was found.

    1 - R_eps(f, 0) is the "robustness with reject": correct and accepted when clean, and then correct or rejected.
    """
    if not eps > 0 or any(not 0 <= alpha <= 1 for alpha in alphas):
        raise DemurError("R_eps(f, alpha) needs a positive eps, and every alpha in [0, 1].")
    return [float((broken | (rejected_at <= alpha * eps)).double().mean()) for alpha in alphas]


def total_robust_loss(broken: Tensor, rejected_at: Tensor, loss: Callable[[Tensor], Tensor]) -> float:
    """Mean of 1 where an accepted error was found, and else of what a rejection costs at its radius (Chen et al. 2023, eq. 3).

    `loss` maps radii (N,) to costs in [0, 1] that do not grow with the radius: `step_loss`, `ramp_loss`.
    """
    return float(torch.where(broken, 1.0, loss(rejected_at).double()).mean())


def step_loss(eps: float, alpha: float) -> Callable[[Tensor], Tensor]:
    """A rejection within alpha eps costs 1, a farther one nothing."""
    return lambda radius: (radius <= alpha * eps).double()


def ramp_loss(eps: float, power: float) -> Callable[[Tensor], Tensor]:
    """A rejection costs (1 - radius / eps) ** power, and nothing beyond eps."""
    return lambda radius: (1 - radius.double() / eps).clamp(min=0) ** power


def implied_robust_accuracy(clean_outcomes: Tensor, broken: Tensor) -> float:
    """Share (of N) that is correct and accepted when clean, and never wrong and accepted within eps.

    Tramer 2022, theorem 4: from such a detector a (slow) classifier without rejection can be made that is as accurate within
    eps / 2. Far more than the best that is known there means that the attack is likely too weak.
    """
    return float(((clean_outcomes == Outcome.CORRECT) & ~broken).double().mean())
