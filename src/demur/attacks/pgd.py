"""Projected gradient descent, in all norms: the plain iterated attack, and what most peers are compared by."""

import torch
from torch import Tensor

from demur.attacks.checks import check_counts, check_positive, limited
from demur.attacks.driver import AttackResult, GradientPrecision, Problem, drive
from demur.attacks.goals import Evade, Goal
from demur.attacks.norms import per_image
from demur.classifier import Classifier

PATIENCE = 5


def pgd(
    classifier: Classifier,
    images: Tensor,
    labels: Tensor,
    *,
    norm: str = "linf",
    eps: float | Tensor,
    steps: int = 100,
    step_size: float | None = None,
    goal: Goal | None = None,
    region: Tensor | None = None,
    start: Tensor | None = None,
    random_start: bool = False,
    restarts: int = 1,
    seed: int = 0,
    batch_size: int = 128,
    tolerance: float | None = None,
    precision: GradientPrecision = "auto",
) -> AttackResult:
    """Climb the goal's loss in steps of `step_size`, each moved back to the nearest allowed image (Madry et al. 2018).

    Without `random_start` the first run starts at the clean image, or at `start`, so that one step is `fgs` (or `fg`); every restart
    that no `start` is given for, and with `random_start` all, start at a random allowed image. An image leaves as soon as it is solved.

    Args:
        norm: `linf` (the region scales eps pixel by pixel), `l2`, `l1` or `l0`.
        step_size: in the norm, for L0 the Euclidean length of a step; the default is 2.5 eps / steps (2.5 / sqrt(steps) in L0).
        goal: its `by` chooses the loss: margin, cross_entropy, or hinge. The hinge goes for the runner-up on the clean
            image, as in sec. 2.5.2 of the rejection paper.
        start: (N, C, H, W), for example the result of another attack; or (R, N, C, H, W), one for each of the first R runs: the clean
            images and images of other classes are the double initialisation of Biggio et al. 2013 and Sotgiu et al. 2020.
        tolerance: if given, a run ends on an image whose loss has moved by no more than that in each of `PATIENCE` steps, after as many
            as it takes to come to its eps, and not where the gradient is nothing: the stopping rule of the rejection paper's
            algorithm 1, which as printed would end a descent at once. Its t is .01.
        precision: of the gradients; with float32 another batch size changes no result beyond float32 rounding.

    Images (N, C, H, W) in [0, 1], labels (N,). Raises: DemurError for input that does not fit.
    """
    check_counts(steps=steps)
    check_positive(step_size=step_size)
    given = 1 if start is None or start.ndim == images.ndim else len(start)

    def attack(problem: Problem) -> None:
        current = problem.random_start() if random_start or problem.restart >= given else problem.start
        if problem.goal.by == "hinge" and problem.goal.aim is None:
            _aim_at_runner_up(problem)
        ball = problem.ball
        reach = torch.full_like(ball.eps, step_size) if step_size else 2.5 * (ball.eps if norm != "l0" else steps**0.5) / steps
        reach = torch.as_tensor(reach, device=current.device).expand(len(current))
        before, still = torch.full_like(problem.ball.eps, torch.inf), torch.zeros_like(problem.ball.eps)
        for step in range(steps):
            seen = problem.differentiate(current)
            if tolerance is not None:
                # What is blind, or cannot have come to its eps yet, does not stand still: it has not arrived.
                arrived = seen.gradient.flatten(1).any(1) & (step * reach.to(before) >= problem.ball.eps)
                still = torch.where(((seen.loss.to(before) - before).abs() <= tolerance) & arrived, still + 1, 0)
                before = seen.loss.to(before)
            current, gradient, reach, before, still = problem.unsolved(current, seen.gradient, reach, before, still)
            if bool((still >= PATIENCE).any()):
                current, gradient, reach, before, still = problem.keep(still < PATIENCE, current, gradient, reach, before, still)
            if not len(current):
                return
            move = problem.ball.ascent(gradient, current) * per_image(reach, current).to(current.dtype)
            current = problem.ball.confine(current + move)
        problem.evaluate(current)

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
        start=start,
        precision=precision,
    )


def _aim_at_runner_up(problem: Problem) -> None:
    """From now on go for the wanted column that scores highest on the clean image."""
    seen = problem.evaluate(problem.images)
    wanted = problem.goal.wanted(seen.scores, problem.labels, problem.num_classes)
    problem.goal = problem.goal.toward(seen.scores.masked_fill(~wanted, -torch.inf).argmax(1))
