"""One step along the gradient: the weak attacks of the background-class paper, and quick probes for any model."""

from torch import Tensor

from demur.attacks.checks import limited
from demur.attacks.driver import AttackResult, Problem, drive
from demur.attacks.goals import Evade, Goal
from demur.classifier import Classifier


def fgs(
    classifier: Classifier,
    images: Tensor,
    labels: Tensor,
    *,
    eps: float | Tensor,
    goal: Goal | None = None,
    region: Tensor | None = None,
    batch_size: int = 128,
) -> AttackResult:
    """Fast gradient sign: x + eps * region * sign(gradient of the goal's loss), clipped to [0, 1] (Goodfellow et al. 2015).

    Where the step fails and the clean image reaches the goal as it is, that is the attempt (and found).
    The background-class paper (sec. II.B) takes eps = 0.25 and the cross-entropy of the true class, which is the direction of
    `AnyError(by="cross_entropy")`; the default goal is `Evade()`. Images (N, C, H, W) in [0, 1], labels (N,).
    """
    return _one_step(classifier, images, labels, "linf", eps, goal, region, batch_size)


def fg(
    classifier: Classifier,
    images: Tensor,
    labels: Tensor,
    *,
    eps: float | Tensor,
    goal: Goal | None = None,
    region: Tensor | None = None,
    batch_size: int = 128,
) -> AttackResult:
    """Fast gradient: x + eps * gradient / ||gradient||_2, clipped to [0, 1] (Liu et al. 2017).

    eps is the length before clipping (6.79 in the background-class paper, sec. VI.A); `norms.sizes` gives the length that is
    left. With a region (a mask of 0 and 1) the gradient is taken inside it. Images (N, C, H, W) in [0, 1], labels (N,).
    """
    return _one_step(classifier, images, labels, "l2", eps, goal, region, batch_size)


def _one_step(
    classifier: Classifier,
    images: Tensor,
    labels: Tensor,
    norm: str,
    eps: float | Tensor,
    goal: Goal | None,
    region: Tensor | None,
    batch_size: int,
) -> AttackResult:
    def attack(problem: Problem) -> None:
        # The gradient is taken at the clean image without trying that: the papers step on every image, right or wrong as it is.
        step = problem.ball.ascent(problem.differentiate(problem.images, record=False).gradient)
        reach = problem.ball.eps.reshape(-1, *[1] * (step.ndim - 1)).to(step)
        problem.evaluate(problem.ball.confine(problem.images + reach * step))

    return drive(
        attack, classifier, images, labels, goal=goal or Evade(), norm=norm, eps=limited(eps), region=region, batch_size=batch_size
    )
