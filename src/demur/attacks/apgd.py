"""Auto-PGD (Croce & Hein 2020): gradient ascent that chooses its own step sizes, and its targeted version."""

import math
from dataclasses import replace

import torch
from torch import Tensor

from demur.attacks.checks import check_counts, limited
from demur.attacks.driver import AttackResult, GradientPrecision, Problem, drive
from demur.attacks.goals import Evade, Goal
from demur.attacks.norms import per_image
from demur.classifier import Classifier
from demur.errors import DemurError

MOMENTUM, RHO = 0.75, 0.75


def apgd(
    classifier: Classifier,
    images: Tensor,
    labels: Tensor,
    *,
    norm: str = "linf",
    eps: float | Tensor,
    steps: int = 100,
    targets: int = 0,
    goal: Goal | None = None,
    region: Tensor | None = None,
    start: Tensor | None = None,
    restarts: int = 1,
    seed: int = 0,
    batch_size: int = 128,
    precision: GradientPrecision = "auto",
) -> AttackResult:
    """Climb the goal's loss with momentum; halve an image's step size, and go back to its best, where progress stalls.

    Croce & Hein 2020, sec. 3 and algorithm 1, for `linf` and `l2`: the first step size is 2 eps, and progress is looked at after
    22 % of the steps and then at ever shorter intervals. In L1, of which theirs is another algorithm, use `pgd`.

    Args:
        goal: its `by` chooses margin or cross_entropy. Both take the place of their DLR loss, which scales the margin: normalised
            steps do not see a scale, and it needs three classes or four, where a reject column makes unclear which (R22).
        targets: if not 0, run once for each of so many wanted classes, from the best on the clean image down, each time climbing that
            class' margin alone; `num_classes - 1` for all. The reject column is not among them, unless the goal wants it.
        start: (N, C, H, W) where the first run starts, or (R, N, C, H, W) for the first R runs; the others start at random.

    Images (N, C, H, W) in [0, 1], labels (N,). Raises: DemurError for input that does not fit.
    """
    if norm not in ("linf", "l2"):
        raise DemurError(f"apgd works in linf and l2, not {norm!r}; use pgd there.")
    check_counts(steps=steps)
    given = 0 if start is None else 1 if start.ndim == images.ndim else len(start)
    if targets < 0:
        raise DemurError(f"targets must not be negative, but is {targets}.")

    def attack(problem: Problem) -> None:
        if not targets:
            first = problem.random_start() if problem.restart >= given else problem.start
            _ascend(problem, first, steps)
            return
        wanted = problem.goal.wanted(seen := problem.evaluate(problem.images).scores, problem.labels, problem.num_classes)
        order = seen.masked_fill(~wanted, -torch.inf).argsort(dim=1, descending=True)
        for place in range(min(targets, int(wanted.sum(1).min()))):
            (order,) = problem.unsolved(order)
            if not len(order):
                return
            aimed = problem.part("target", place)
            aimed.goal = problem.goal.toward(order[:, place])
            given_start = problem.restart < given and place == 0
            _ascend(aimed, aimed.start if given_start else aimed.random_start(), steps)

    sought = goal or Evade()
    return drive(
        attack,
        classifier,
        images,
        labels,
        goal=replace(sought, by="margin") if targets else sought,
        norm=norm,
        eps=limited(eps),
        region=region,
        restarts=restarts,
        seed=seed,
        batch_size=batch_size,
        start=start,
        precision=precision,
    )


def _checkpoints(steps: int) -> list[int]:
    """The steps after which progress is looked at: shares 0, .22, .41, .57, ... of all steps (sec. 3.1)."""
    shares = [0.0, 0.22]
    while shares[-1] < 1:
        shares.append(shares[-1] + max(shares[-1] - shares[-2] - 0.03, 0.06))
    return sorted({math.ceil(share * steps) for share in shares[1:]})


def _ascend(problem: Problem, current: Tensor, steps: int) -> None:
    checks, last = _checkpoints(steps), 0
    seen = problem.differentiate(current)
    current, gradient, loss = problem.unsolved(current, seen.gradient, seen.loss)
    best, best_loss, best_gradient, before = current, loss, gradient, current
    size = 2 * problem.ball.eps
    rises, size_then, best_then = torch.zeros_like(loss), size, loss
    for step in range(1, steps + 1):
        if not len(current):
            return
        ball = problem.ball
        reached = ball.confine(current + per_image(size, current).to(current.dtype) * ball.ascent(gradient))
        mixed = current + MOMENTUM * (reached - current) + (1 - MOMENTUM) * (current - before)
        before, current = current, reached if step == 1 else ball.confine(mixed)
        seen = problem.differentiate(current) if step < steps else problem.evaluate(current)
        if step == steps:
            if problem.half:  # the best may be a success that bfloat16 rounds away
                problem.evaluate(best)
            return
        rises = rises + (seen.loss > loss)
        loss, gradient = seen.loss, seen.gradient
        better = loss > best_loss
        best, best_gradient = (
            torch.where(per_image(better, best), current, best),
            torch.where(per_image(better, best), gradient, best_gradient),
        )
        best_loss = torch.where(better, loss, best_loss)
        if step in checks:
            stalled = (rises < RHO * (step - last)) | ((size_then == size) & (best_then >= best_loss))
            size_then, best_then, last = size, best_loss, step
            size = torch.where(stalled, size / 2, size)
            current, gradient = (
                torch.where(per_image(stalled, best), best, current),
                torch.where(per_image(stalled, best), best_gradient, gradient),
            )
            loss, rises = torch.where(stalled, best_loss, loss), torch.zeros_like(rises)
        state = (current, before, gradient, loss, best, best_gradient, best_loss, size, rises, size_then, best_then)
        current, before, gradient, loss, best, best_gradient, best_loss, size, rises, size_then, best_then = problem.unsolved(*state)
