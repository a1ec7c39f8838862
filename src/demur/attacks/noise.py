"""Random noise: the attack that needs nothing but answers. What it breaks, every real attack must break too (R13)."""

from torch import Tensor

from demur.attacks.checks import limited
from demur.attacks.driver import AttackResult, Problem, drive
from demur.attacks.goals import Evade, Goal
from demur.classifier import Classifier


def noise(
    classifier: Classifier,
    images: Tensor,
    labels: Tensor,
    *,
    norm: str = "linf",
    eps: float | Tensor,
    goal: Goal | None = None,
    region: Tensor | None = None,
    restarts: int = 1,
    seed: int = 0,
    batch_size: int = 128,
) -> AttackResult:
    """Draw `restarts` allowed images for each image, uniformly from its ball, until one reaches the goal.

    Images (N, C, H, W) in [0, 1], labels (N,); norm `linf` or `l2`.
    """

    def attack(problem: Problem) -> None:
        problem.evaluate(problem.random_start())

    return drive(
        attack,
        classifier,
        images,
        labels,
        goal=goal or Evade(),
        norm=norm,
        eps=limited(eps),
        region=region,
        restarts=restarts,
        seed=seed,
        batch_size=batch_size,
    )
