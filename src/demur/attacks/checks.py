"""Checks on what an attack is asked for, and on how blind it was (R14, R16)."""

import warnings
from numbers import Real
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from demur.attacks.book import Regularizer
from demur.attacks.frozen import kernel_machines
from demur.classifier import (
    Classifier,
    check_classifier,
    check_images,
    check_labels,
    device_of,
    evaluating,
)
from demur.classifier.checks import INTEGERS
from demur.errors import DemurError, DemurWarning
from demur.goals import Goal, as_goal

if TYPE_CHECKING:
    from demur.attacks.base import SearchAttack

BLIND = 0.5
"""Share of useless gradients above which the user is warned."""

NO_GRADIENT = (
    "the classifier gives no gradient with respect to its images; "
    "use an attack that needs only scores: Square, RandomNoise or Transfer."
)


@torch.no_grad()
def check_request(classifier: Classifier, images: Tensor, labels: Tensor, goal: object) -> None:
    """Raise DemurError unless classifier, images, labels and goal fit each other.

    This asks for the scores of one image. It warns if the scores look like probabilities: a softmax
    saturates, and gradients vanish in it (R16). It warns of batch statistics, too.
    """
    if torch.is_inference_mode_enabled():
        raise DemurError("leave torch.inference_mode: attacks need gradients.")
    check_classifier(classifier)
    check_images(images)
    if images.dtype not in (torch.float32, torch.float64):
        raise DemurError(f"attacks need float32 or float64 images, not {images.dtype}.")
    check_labels(labels, len(images), classifier.num_classes)
    goal = as_goal(goal)
    with evaluating(classifier), torch.random.fork_rng():
        scores = classifier(images[:1].to(device_of(classifier, images.device)))
    goal.check(labels, classifier.num_classes, scores.shape[1])
    if not bool(torch.isfinite(scores).all()):
        raise DemurError(
            "the classifier gave NaN or infinite scores for the first image: "
            "no decision can be made on it."
        )
    _warn_of_batch_statistics(classifier)
    if _like_probabilities(classifier, scores):
        warn(
            "the classifier's scores look like probabilities; where they saturate, attacks on "
            "their gradients fail although the classifier is not robust. Remove the softmax: "
            "the decision is the same."
        )


def _like_probabilities(classifier: Classifier, scores: Tensor) -> bool:
    """Say whether the scores (1, columns), or those of the classes alone, look like a softmax.

    The probabilities of kernel machines are excepted: R20 holds for them.
    """
    parts = [scores]
    if not kernel_machines(classifier):
        parts.append(scores[:, : classifier.num_classes])
    sums = [float(part.sum()) for part in parts if bool((part >= 0).all())]
    return any(abs(total - 1) < 1e-4 for total in sums)


def _warn_of_batch_statistics(classifier: Classifier) -> None:
    for name, module in classifier.named_modules():
        if isinstance(module, _BatchNorm) and module.running_mean is None:
            warn(
                f"the layer {name!r} normalises by the statistics of the batch: the decision on an "
                "image depends on the images beside it. Use track_running_stats=True."
            )
            return


def check_starting_points(
    points: Tensor | None, images: Tensor, attack: "SearchAttack"
) -> list[Tensor]:
    """Give the starting points of each run, or raise DemurError if they do not fit the images, or
    the attack takes none.
    """
    if points is None:
        return []
    if not attack.takes_starting_points:
        raise DemurError(
            f"{type(attack).__name__} takes no starting points: PGD, APGD and FMN take them."
        )
    if not isinstance(points, Tensor):
        raise DemurError(
            "starting points must be one tensor, such as torch.stack([images, others]), "
            f"not {type(points).__name__}."
        )
    runs = [points] if points.ndim == images.ndim else list(points)
    if len(runs) > attack.restarts:
        raise DemurError(
            f"there are starting points for {len(runs)} runs, but restarts is {attack.restarts}."
        )
    for run in runs:
        check_images(run)
        if run.shape != images.shape:
            raise DemurError(
                f"starting points have shape {tuple(run.shape)}, the images {tuple(images.shape)}."
            )
    return runs


def check_toward(
    toward: Tensor | None, classifier: Classifier, labels: Tensor, goal: Goal
) -> Tensor | None:
    """Give the columns to raise, (N,), or raise DemurError unless the goal wants each of them."""
    if toward is None:
        return None
    known = isinstance(toward, Tensor)
    if not known or toward.dtype not in INTEGERS or toward.shape != labels.shape:
        kind = f"{toward.dtype} of shape {tuple(toward.shape)}" if known else type(toward).__name__
        raise DemurError(
            "toward must be one integer column for each image, a tensor of shape "
            f"({len(labels)},), not {kind}."
        )
    columns = classifier.num_classes + classifier.rejects
    toward = toward.to(labels.device, torch.int64)
    if bool(((toward < 0) | (toward >= columns)).any()):
        raise DemurError(f"toward must lie in 0..{columns - 1}, the columns of the scores.")
    scores = torch.zeros(len(labels), columns, device=labels.device)
    wanted = goal.wanted(scores, labels.to(torch.int64), classifier.num_classes)
    if not bool(wanted.gather(1, toward[:, None]).all()):
        raise DemurError(
            f"toward names a column that {goal} does not want, such as the true class."
        )
    return toward


def check_regularizer(regularizer: Regularizer | None, count: int, smallest: bool) -> None:
    """Raise DemurError if a regularizer does not fit the attack, or has guides of other images."""
    if regularizer is None:
        return
    if smallest:
        raise DemurError(
            "an attack that seeks the smallest change follows the boundary alone: "
            "a regularizer is for attacks with an eps."
        )
    guides = getattr(regularizer, "count", count)
    if guides != count:
        raise DemurError(f"the regularizer has {guides} guide images for {count} images.")


def check_answers(answered: Tensor) -> None:
    """Raise DemurError unless every image (N,) got finite scores at least once."""
    bad = int((~answered).sum())
    if bad:
        raise DemurError(
            f"the classifier gave only NaN or infinite scores for {bad} of {len(answered)} images: "
            "no decision can be made on them."
        )


def warn_if_blind(zero_gradients: int, gradients: int) -> None:
    """Warn if most gradients were zero or not finite: failures then say nothing."""
    if gradients and zero_gradients >= BLIND * gradients:
        warn(
            f"{zero_gradients / gradients:.0%} of the gradients were zero or not finite: "
            "the attack was blind, and its failures say nothing about robustness. "
            "Use another loss, other starting points, Square, or BPDA."
        )


def warn(message: str) -> None:
    """Warn the caller of the attack."""
    warnings.warn(message, DemurWarning, stacklevel=5)


def needs_eps(attack: str) -> DemurError:
    """Make the error for a threat without eps."""
    return DemurError(
        f'{attack} needs an eps in the unit of pixels in [0, 1], for example "linf:8/255"; '
        "DDN, FMN, SigmaZero and CarliniWagner seek the smallest change."
    )


def check_positive(**numbers: float | None) -> None:
    """Raise DemurError unless each value is positive and finite, or None."""
    for name, value in numbers.items():
        if value is not None and not (_is_number(value) and 0 < value < torch.inf):
            raise DemurError(f"{name} must be positive and finite, not {value!r}.")


def check_not_negative(**numbers: float | None) -> None:
    """Raise DemurError unless each value is finite and not negative, or None."""
    for name, value in numbers.items():
        if value is not None and not (_is_number(value) and 0 <= value < torch.inf):
            raise DemurError(f"{name} must be finite and not negative, not {value!r}.")


def check_fractions(**numbers: float) -> None:
    """Raise DemurError unless each value lies between 0 and 1."""
    for name, value in numbers.items():
        if not (_is_number(value) and 0 < value < 1):
            raise DemurError(f"{name} must lie between 0 and 1, not {value!r}.")


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)
