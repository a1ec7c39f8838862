"""The attack of the smoothing paper: steps of a fixed length towards a chosen class, until it is reached."""

from dataclasses import replace

from torch import Tensor

from demur.attacks.checks import check_counts, check_positive, given_goal
from demur.attacks.driver import AttackResult, GradientPrecision, Problem, drive
from demur.attacks.goals import Goal
from demur.attacks.norms import L2
from demur.classifier import Classifier, check_images


def normalized_gradient(
    classifier: Classifier,
    images: Tensor,
    labels: Tensor,
    *,
    goal: Goal,
    step_size: float = 0.1,
    steps: int = 1000,
    region: Tensor | None = None,
    batch_size: int = 128,
    precision: GradientPrecision = "auto",
) -> AttackResult:
    """Step along the gradient of the cross-entropy, brought to the Euclidean length `step_size`, until the goal is reached.

    Smoothing paper, sec. 2, with the faults of its listing resolved: it descends the cross-entropy of the target (there the
    probability is climbed, whose gradient vanishes), the gradient is brought to length image by image, an image is tested
    before it is stepped and leaves when it is solved, pixels stay in [0, 1], and after `steps` it gives up and says so. There is no eps:
    `distance` tells how far it went.

    Args:
        goal: `Target(classes)` in the paper; any goal will do.
        step_size: .1 in the paper, on images in [0, 1].
        region: a mask of 0 and 1.

    Images (N, C, H, W) in [0, 1], labels (N,). Raises: DemurError for input that does not fit.
    """
    check_counts(steps=steps)
    check_positive(step_size=step_size)

    check_images(images)

    def attack(problem: Problem) -> None:
        current = problem.images
        for _ in range(steps):
            gradient = problem.differentiate(current).gradient
            current, gradient = problem.unsolved(current, gradient)
            if not len(current):
                return
            current = (current + step_size * problem.ball.ascent(gradient)).clamp(0, 1)
        problem.evaluate(current)

    return drive(
        attack,
        classifier,
        images,
        labels,
        goal=replace(given_goal(goal), by="cross_entropy"),
        norm="l2",
        eps=L2.largest(images),
        region=region,
        batch_size=batch_size,
        precision=precision,
    )
