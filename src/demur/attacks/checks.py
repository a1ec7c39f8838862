"""Checks on what an attack is asked for: its goal and its eps."""

import torch
from torch import Tensor

from demur.attacks.goals import Evade, Goal
from demur.classifier import Classifier, device_of, evaluating
from demur.errors import DemurError


def given_goal(goal: object) -> Goal:
    """The goal; `Evade()` for None. Raises: DemurError for what is no goal."""
    if goal is None:
        return Evade()
    if not isinstance(goal, Goal):
        raise DemurError(f"a goal is Evade(), Target(classes), AnyError() or ForceReject(), not {goal!r}.")
    return goal


@torch.no_grad()
def check_goal(goal: object, classifier: Classifier, images: Tensor, labels: Tensor) -> None:
    """Raise DemurError unless it is a goal that fits the labels and the classifier's columns."""
    goal = given_goal(goal)
    with evaluating(classifier), torch.random.fork_rng():
        columns = classifier(images[:1].to(device_of(classifier, images.device))).shape[1]
    goal.check(labels, classifier.num_classes, columns)


def check_eps(eps: float | Tensor, count: int) -> Tensor:
    """Limits (count,) in float64 of an eps that is one number or one for each image.

    Raises: DemurError if it is negative, not finite, or of another shape.
    """
    limits = torch.as_tensor(eps, dtype=torch.float64).detach().cpu()
    if limits.ndim > 1 or (limits.ndim == 1 and len(limits) != count):
        raise DemurError(f"eps must be one number, or one for each of the {count} images, not of shape {tuple(limits.shape)}.")
    if not bool(torch.isfinite(limits).all()) or bool((limits < 0).any()):
        raise DemurError("eps must be finite and not negative.")
    return limits.expand(count)


def limited(eps: float | Tensor | None) -> float | Tensor:
    """The eps. Raises: DemurError for None, by which the driver seeks the smallest change."""
    if eps is None:
        raise DemurError("this attack needs an eps, in the unit of [0, 1]; ddn, fmn and carlini_* seek the smallest change.")
    return eps
