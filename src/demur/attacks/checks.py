"""Checks on what an attack is asked for: its classifier, images, goal, eps and numbers; and on how blind it was (R14, R16)."""

import warnings

import torch
from torch import Tensor

from demur.attacks.goals import Evade, Goal
from demur.classifier import Classifier, check_classifier, check_images, check_labels, device_of, evaluating
from demur.errors import DemurError, DemurWarning

BLIND = 0.5  # the share of gradients without use at which the user is told


def given_goal(goal: object) -> Goal:
    """The goal; `Evade()` for None. Raises: DemurError for what is no goal."""
    if goal is None:
        return Evade()
    if not isinstance(goal, Goal):
        raise DemurError(f"a goal is Evade(), Target(classes), AnyError() or ForceReject(), not {goal!r}.")
    return goal


@torch.no_grad()
def check_request(classifier: Classifier, images: Tensor, labels: Tensor, goal: object) -> None:
    """Raise DemurError unless classifier, images (N, C, H, W), labels (N,) and goal fit each other; asks for the scores of one image.

    Warns where the scores are probabilities: a softmax saturates, and gradients through it vanish.
    """
    check_classifier(classifier)
    check_images(images)
    if images.dtype not in (torch.float32, torch.float64):
        raise DemurError(f"attacks need float32 or float64 images, not {images.dtype}.")
    check_labels(labels, len(images), classifier.num_classes)
    goal = given_goal(goal)
    with evaluating(classifier), torch.random.fork_rng():
        scores = classifier(images[:1].to(device_of(classifier, images.device)))
    goal.check(labels, classifier.num_classes, scores.shape[1])
    if not bool(torch.isfinite(scores).all()):
        raise DemurError("the classifier gave NaN or infinite scores for the first image: no decision can be made on it.")
    if bool((scores >= 0).all()) and abs(float(scores.sum()) - 1) < 1e-4:
        warn(
            "the classifier's scores look like probabilities; where they saturate, attacks on their gradients fail without being resisted. "
            "Leave the softmax away: the decision is the same."
        )


def check_bonus(goal: Goal | None, eps: object) -> None:
    """Raise DemurError for a bonus where the smallest change is sought."""
    if eps is None and goal is not None and goal.bonus is not None:
        raise DemurError("an attack that seeks the smallest change follows the boundary alone: a goal's bonus is for attacks with an eps.")


def check_answers(answered: Tensor) -> None:
    """Raise DemurError unless all images were answered (N,) with finite scores at least once."""
    bad = int((~answered).sum())
    if bad:
        raise DemurError(f"the classifier gave only NaN or infinite scores for {bad} of {len(answered)} images: no decision can be made.")


def warn_if_blind(flat: int, gradients: int) -> None:
    """Warn where most gradients were zero or not finite: failure then says nothing of robustness."""
    if gradients and flat >= BLIND * gradients:
        warn(
            f"{flat / gradients:.0%} of the gradients were zero or not finite: the attack was blind, and what it did not find says "
            "nothing. Use another loss or start, square, or StraightThrough."
        )


def warn(message: str) -> None:
    """Warn the caller of the attack."""
    warnings.warn(message, DemurWarning, stacklevel=5)


def check_eps(eps: float | Tensor, count: int, norm: str) -> Tensor:
    """Limits (count,) in float64 of an eps that is one number or one for each image.

    Raises: DemurError if it is no number, negative, not finite, of another shape, or above 1 in Linf, where 1 is all there is.
    """
    try:
        limits = torch.as_tensor(eps, dtype=torch.float64).detach().cpu()
    except (TypeError, ValueError) as error:
        raise DemurError(f"eps must be a number, or a tensor of one for each image, not {eps!r}.") from error
    if limits.ndim > 1 or (limits.ndim == 1 and len(limits) != count):
        raise DemurError(f"eps must be one number, or one for each of the {count} images, not of shape {tuple(limits.shape)}.")
    if not bool(torch.isfinite(limits).all()) or bool((limits < 0).any()):
        raise DemurError("eps must be finite and not negative.")
    if norm == "linf" and bool((limits > 1).any()):
        raise DemurError(f"eps is in the unit of pixels in [0, 1], not {float(limits.max()):g}: write 8 levels of 255 as 8 / 255.")
    return limits.expand(count)


def limited(eps: float | Tensor | None) -> float | Tensor:
    """The eps. Raises: DemurError for None, by which the driver seeks the smallest change."""
    if eps is None:
        raise DemurError("this attack needs an eps, in the unit of [0, 1]; ddn, fmn and carlini_* seek the smallest change.")
    return eps


def check_counts(**counts: int) -> None:
    """Raise DemurError unless each of the named is at least 1."""
    for name, value in counts.items():
        if value < 1:
            raise DemurError(f"{name} must be at least 1, not {value}.")


def check_positive(**numbers: float | None) -> None:
    """Raise DemurError unless each of the named is positive and finite, or None."""
    for name, value in numbers.items():
        if value is not None and not 0 < value < torch.inf:
            raise DemurError(f"{name} must be positive and finite, not {value}.")


def check_fractions(**numbers: float) -> None:
    """Raise DemurError unless each of the named lies between 0 and 1."""
    for name, value in numbers.items():
        if not 0 < value < 1:
            raise DemurError(f"{name} must lie between 0 and 1, not {value}.")
