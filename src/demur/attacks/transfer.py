"""Attack a classifier by way of another one, whose gradients are at hand."""

from collections.abc import Callable

from torch import Tensor

from demur.attacks.driver import AttackResult, Problem, drive
from demur.attacks.goals import Evade, Goal
from demur.attacks.norms import ball_of
from demur.classifier import Classifier, check_classifier
from demur.errors import DemurError


def transfer(
    classifier: Classifier,
    images: Tensor,
    labels: Tensor,
    *,
    surrogate: Classifier,
    attack: Callable[..., AttackResult],
    norm: str = "linf",
    goal: Goal | None = None,
    batch_size: int = 128,
) -> AttackResult:
    """Attack the surrogate, and try what came of it on the classifier: a black box needs to answer once for each image.

    Args:
        surrogate: a classifier of the same classes, with gradients; trained on other data, or on the black box' own answers.
        attack: of the surrogate, with all but goal and images filled in: `partial(attacks.pgd, norm="linf", eps=0.3)`. One that
            looks for high confidence (`partial(attacks.carlini_l2, confidence=10)`) transfers better. It keeps to its eps itself.
        norm: in which `distance` is measured: give the attack's.
        goal: `Evade()` if None, for both.

    Images (N, C, H, W) in [0, 1], labels (N,). The result is the classifier's: `forwards` are its answers, and what the surrogate
    answered is not counted. Raises: DemurError if the surrogate has other classes, or for input that does not fit.
    """
    goal = goal or Evade()
    check_classifier(surrogate)
    check_classifier(classifier)
    if surrogate.num_classes != classifier.num_classes:
        raise DemurError(f"the surrogate has {surrogate.num_classes} classes, the classifier {classifier.num_classes}.")
    attempts = attack(surrogate, images, labels, goal=goal).attempts

    def repeat(problem: Problem) -> None:
        problem.evaluate(problem.start)

    return drive(
        repeat, classifier, images, labels, goal=goal, norm=norm, eps=ball_of(norm).largest(images), start=attempts, batch_size=batch_size
    )
