"""Attacks that seek the smallest change by walking along the boundary: DDN, FMN, and sigma-zero for the fewest pixels."""

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from demur.attacks.checks import check_counts, check_fractions, check_positive, given_goal
from demur.attacks.driver import AttackResult, GradientPrecision, Problem, drive
from demur.attacks.goals import Goal, Measure
from demur.attacks.norms import by_pixel, per_image, spread
from demur.classifier import Classifier

DUAL = {"linf": 1.0, "l2": 2.0, "l1": math.inf}
BEYOND = 1.01  # a little beyond where the boundary seems to be: steps to the boundary itself may come ever closer and never cross it


def ddn(
    classifier: Classifier,
    images: Tensor,
    labels: Tensor,
    *,
    steps: int = 100,
    initial_eps: float = 1.0,
    gamma: float = 0.05,
    goal: Goal | None = None,
    region: Tensor | None = None,
    seed: int = 0,
    batch_size: int = 128,
    precision: GradientPrecision = "auto",
) -> AttackResult:
    """Seek the smallest change in L2 by decoupling direction and norm (Rony et al. 2019, algorithm 1, without its quantisation).

    Each step goes along the gradient, by a length that falls from 1 to .01 as a cosine; then the change is brought to the length
    eps, which shrinks by `gamma` where the image is solved and else grows. Where there is no gradient the direction is random, by image
    and `seed`. At last the best change is shortened to the boundary. The loss is always the cross-entropy, as theirs.

    Images (N, C, H, W) in [0, 1], labels (N,). Raises: DemurError for input that does not fit.
    """
    check_counts(steps=steps)
    check_positive(initial_eps=initial_eps)
    check_fractions(gamma=gamma)

    def attack(problem: Problem) -> None:
        problem.unsolved()
        change, eps = torch.zeros_like(problem.images), torch.full_like(problem.ball.eps, initial_eps)
        for step in range(steps):
            seen = problem.differentiate(problem.images + change)
            eps = eps * torch.where(seen.success.to(eps.device), 1 - gamma, 1 + gamma)
            gradient, blind = seen.gradient, ~seen.gradient.flatten(1).any(1)
            if bool(blind.any()):
                anywhere = problem.part("blind", step).random_start() - problem.images
                gradient = torch.where(per_image(blind, change), anywhere, gradient)
            change = change + _falling(step, steps, 1.0, 0.01) * problem.ball.ascent(gradient)
            length = problem.ball.size(change).clamp(min=1e-12)
            stretched = problem.images + change * per_image(eps / length, change).to(change.dtype)
            change = problem.ball.confine(stretched) - problem.images
        problem.evaluate(problem.images + change)
        problem.shorten()

    return _seek(attack, classifier, images, labels, "l2", goal, "cross_entropy", region, batch_size, precision, seed=seed)


def fmn(
    classifier: Classifier,
    images: Tensor,
    labels: Tensor,
    *,
    norm: str = "l2",
    steps: int = 100,
    step_size: float | None = None,
    gamma: float = 0.05,
    goal: Goal | None = None,
    region: Tensor | None = None,
    start: Tensor | None = None,
    batch_size: int = 128,
    precision: GradientPrecision = "auto",
) -> AttackResult:
    """Seek the smallest change in any norm: fast minimum-norm (Pintor et al. 2021, algorithm 1).

    Each step goes along the gradient by a Euclidean length that falls from `step_size` to a hundredth of it as a cosine, and is
    projected onto the ball of an eps that goes after the boundary: until an image is solved the first time, to where a
    linear classifier would have it; then by factors of 1 - gamma and 1 + gamma, gamma falling to .001; in L0 by at least one pixel.
    The loss is always the margin in L0, as theirs, and else the cross-entropy, which finds smaller changes.

    Args:
        norm: `linf`, `l2`, `l1` or `l0`.
        step_size: by default 10 in Linf, where all pixels are to move, and else 1, as theirs.
        start: (N, C, H, W), for example images of other classes.

    Images (N, C, H, W) in [0, 1], labels (N,). Raises: DemurError for input that does not fit.
    """
    check_counts(steps=steps)
    check_positive(step_size=step_size)
    check_fractions(gamma=gamma)
    first = step_size or (10.0 if norm == "linf" else 1.0)

    def attack(problem: Problem) -> None:
        problem.unsolved()
        current, whole = problem.start, problem.ball.eps
        eps = torch.ones_like(whole) if norm == "l0" else torch.full_like(whole, torch.inf)
        for step in range(steps):
            seen = problem.differentiate(current)
            gradient = seen.gradient if problem.ball.region is None else seen.gradient * problem.ball.region
            success, (_, best) = seen.success.to(eps.device), problem.best()
            factor = _falling(step, steps, gamma, 0.001)
            if norm == "l0":
                inwards = torch.minimum(torch.minimum(eps - 1, (eps * (1 - factor)).floor()), best)
                outwards = torch.maximum(eps + 1, (eps * (1 + factor)).floor())
            else:
                slope = gradient.double().flatten(1).norm(p=DUAL[norm], dim=1).clamp(min=1e-12)
                boundary = BEYOND * (
                    problem.ball.radius(current - problem.images) + (problem.goal.confidence - seen.loss.double()).abs() / slope
                )
                inwards = torch.minimum(eps * (1 - factor), best)
                outwards = torch.where(best.isfinite(), eps * (1 + factor), boundary)
            eps = torch.where(success, inwards, outwards).clamp(min=0).minimum(whole)
            # Where the gradient is nothing, nothing is learnt; the length of the others does not depend on the norm.
            length = gradient.flatten(1).norm(dim=1).clamp(min=1e-12)
            step_now = gradient * per_image(_falling(step, steps, first, first / 100) / length, current)
            current = problem.ball.within(eps).confine(current + step_now)
        problem.evaluate(current)
        if norm == "l0":
            _restore(problem)
        else:
            problem.shorten()

    by: Measure = "margin" if norm == "l0" else "cross_entropy"
    return _seek(attack, classifier, images, labels, norm, goal, by, region, batch_size, precision, start)


def sigma_zero(
    classifier: Classifier,
    images: Tensor,
    labels: Tensor,
    *,
    steps: int = 1000,
    learning_rate: float = 1.0,
    sigma: float = 1e-3,
    threshold: float = 0.3,
    threshold_step: float = 0.01,
    goal: Goal | None = None,
    region: Tensor | None = None,
    batch_size: int = 128,
    precision: GradientPrecision = "auto",
) -> AttackResult:
    """Seek the fewest changed pixels by descending a smooth count of them (Cina et al. 2025, sigma-zero, algorithm 1).

    The count is the mean over pixels of d / (d + sigma), with d the squared change of the pixel over its channels. Gradients are
    scaled to a largest value of 1 and go through Adam, whose rate falls to a tenth as a cosine. After each step, changes below a
    threshold are dropped; the threshold of an image grows while it is solved, and shrinks while it is not.

    Images (N, C, H, W) in [0, 1], labels (N,). Raises: DemurError for input that does not fit.
    """
    check_counts(steps=steps)
    check_positive(learning_rate=learning_rate, sigma=sigma, threshold_step=threshold_step)
    check_fractions(threshold=threshold)

    def attack(problem: Problem) -> None:
        problem.unsolved()
        images, change = problem.images, torch.zeros_like(problem.images)
        first, second = torch.zeros_like(change), torch.zeros_like(change)
        limit = torch.full((len(images),), threshold, device=images.device)
        pixels = by_pixel(change).shape[1]
        for step in range(steps):
            seen = problem.differentiate(images + change)
            square = _by_channel(change.square(), change)
            smooth = 2 * change * sigma / (square + sigma).square() / pixels
            slope = smooth - seen.gradient * per_image(seen.loss < problem.goal.confidence, change)
            slope = slope / per_image(slope.flatten(1).abs().amax(1).clamp(min=1e-12), change)
            rate = _falling(step, steps, learning_rate, learning_rate / 10)
            first.lerp_(slope, 0.1)
            second.mul_(0.999).addcmul_(slope, slope, value=0.001)
            unbiased = (second / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8
            change = (images + change - rate * first / (1 - 0.9 ** (step + 1)) / unbiased).clamp(0, 1) - images
            limit = (limit + torch.where(seen.success, 1.0, -1.0) * threshold_step * rate).clamp(0, 1)
            change = change * (_by_channel(change.abs(), change, largest=True) >= per_image(limit, change))
            change = problem.ball.confine(images + change) - images
        problem.evaluate(images + change)
        _restore(problem)

    return _seek(attack, classifier, images, labels, "l0", goal, "margin", region, batch_size, precision)


def _restore(problem: Problem, steps: int = 10) -> None:
    """Put back pixels of the best candidates, one at a time and the least changed first, where the attack does not need them."""
    best, _ = problem.best()
    tried = torch.zeros_like(by_pixel(best)[:, :, 0], dtype=torch.bool)
    for _ in range(steps):
        change = by_pixel(best - problem.images).abs().sum(2)
        least, place = change.masked_fill(tried | (change == 0), torch.inf).min(1, keepdim=True)
        without = torch.where(spread(torch.zeros_like(tried).scatter(1, place, True), best), problem.images, best)
        success = problem.evaluate(without).success & least.isfinite().squeeze(1)
        best, tried = torch.where(per_image(success, best), without, best), tried.scatter(1, place, True)


def _by_channel(values: Tensor, images: Tensor, largest: bool = False) -> Tensor:
    """The sum, or the largest, of (N, C, H, W) over channels, to broadcast; vectors stay as they are."""
    if images.ndim < 3:
        return values
    return values.amax(1, keepdim=True) if largest else values.sum(1, keepdim=True)


def _falling(step: int, steps: int, first: float, last: float) -> float:
    """From `first` to `last`, as a cosine."""
    return last + (first - last) * (1 + math.cos(math.pi * step / steps)) / 2


def _seek(
    attack: Callable[[Problem], None],
    classifier: Classifier,
    images: Tensor,
    labels: Tensor,
    norm: str,
    goal: Goal | None,
    by: Measure,
    region: Tensor | None,
    batch_size: int,
    precision: GradientPrecision,
    start: Tensor | None = None,
    seed: int = 0,
) -> AttackResult:
    return drive(
        attack,
        classifier,
        images,
        labels,
        goal=replace(given_goal(goal), by=by),
        norm=norm,
        eps=None,
        region=region,
        batch_size=batch_size,
        precision=precision,
        start=start,
        seed=seed,
    )
