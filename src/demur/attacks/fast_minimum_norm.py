"""Attacks that seek the smallest change by walking along the boundary: DDN and FMN."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from demur.attacks.base import MinimumNormAttack
from demur.attacks.book import Evaluation
from demur.attacks.boundary import BEYOND, LinearCandidates, falling, linear_candidates
from demur.attacks.checks import check_fractions, check_positive
from demur.attacks.sigma_zero import restore_pixels
from demur.attacks.state import AttackState
from demur.classifier import check_counts
from demur.goals import Loss
from demur.norms import L0, L1, L2, Ball, Linf, per_image

DUAL: dict[type[Ball], float] = {Linf: 1.0, L2: 2.0, L1: math.inf}


@dataclass(frozen=True, repr=False)
class DDN(MinimumNormAttack):
    """Seek the smallest change in L2 by decoupling direction and norm.

    Rony et al. 2019, algorithm 1, without its quantisation. Each step goes along the gradient of
    the cross-entropy, by a length that falls as a cosine. Then the change is brought to the length
    eps, which shrinks by `gamma` where the image is solved and else grows. Additions: from 25 steps
    on, one gradient, or up to nine where the classifier is linear as far as its boundary, make
    candidates that are exact for linear classifiers (see the module `boundary`); where there is no
    gradient, the direction is random, by image and seed; at the end the best change is shortened to
    the boundary by ten forward passes.

    Parameters
    ----------
    steps : int, default 100
        Gradients in all.
    initial_eps : float, default 1
        epsilon_0, the first length.
    gamma : float in (0, 1), default 0.05
        How fast the length changes.

    Examples
    --------
    >>> import torch
    >>> from demur import Classifier, attacks
    >>> module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3))
    >>> images, labels = torch.full((2, 1, 8, 8), 0.5), torch.tensor([0, 1])
    >>> attacks.DDN(steps=20)(Classifier(module, 3), images, labels, "l2").success.tolist()
    [True, True]
    """

    norms: ClassVar[tuple[str, ...]] = ("l2",)
    hint: ClassVar[str] = " Use FMN there."

    steps: int = 100
    initial_eps: float = 1.0
    gamma: float = 0.05

    def __post_init__(self) -> None:
        check_counts(steps=self.steps)
        check_positive(initial_eps=self.initial_eps)
        check_fractions(gamma=self.gamma)

    def loss_in(self, norm: str) -> Loss:
        """Give the cross-entropy, as in the paper."""
        return "cross_entropy"

    def search(self, state: AttackState) -> None:
        """Walk along the boundary."""
        state.drop_solved()
        linear = linear_candidates(state, self.steps)
        self._walk(state.part(), linear)
        linear.finish()

    def _walk(self, state: AttackState, linear: LinearCandidates) -> None:
        current = state.images
        eps = torch.full_like(state.ball.eps, self.initial_eps)
        steps = linear.steps
        for step in range(steps):
            current, eps = linear.drop(state, step, current, eps)
            if not len(current):
                return
            seen = state.value_and_gradient(current)
            eps = eps * torch.where(seen.success, 1 - self.gamma, 1 + self.gamma)
            gradient = seen.gradient
            if state.has_zero_gradients(gradient):
                blind = ~gradient.flatten(1).any(1)
                anywhere = state.part("blind", step).random_start() - state.images
                gradient = torch.where(per_image(blind, gradient), anywhere, gradient)
            length = falling(step, steps, 1.0, 0.01)
            change = current - state.images + length * state.ball.steepest_step(gradient)
            stretch = eps / state.ball.measure(change).clamp(min=1e-12)
            change = change * per_image(stretch, change).to(change.dtype)
            current = state.ball.project(state.images + change)
        state.evaluate(current)


@dataclass(frozen=True, repr=False)
class FMN(MinimumNormAttack):
    """Fast minimum-norm: seek the smallest change in any norm.

    Pintor et al. 2021, algorithm 1. Each step goes along the gradient by a Euclidean length that
    falls as a cosine to a hundredth, and is projected onto the ball of an eps that follows the
    boundary: until an image is solved for the first time, to where a linear classifier has it; then
    by factors of 1 - gamma and 1 + gamma, where gamma falls to .001; in L0 by at least one pixel.
    Deviations: the loss is the cross-entropy, which finds smaller changes than the paper's margin,
    except in L0; the first step in Linf has length 10; eps is 1 % beyond the estimated boundary;
    except in L0, candidates that are exact for linear classifiers as in `DDN`; at the end, by
    forward passes, the best change is shortened to the boundary, or in L0 pixels that the success
    does not need are put back.

    Parameters
    ----------
    steps : int, default 100
        Gradients in all.
    step_size : float, optional
        First Euclidean length of a step (alpha_0). Default: 10 in Linf, where all pixels move, else
        1.
    gamma : float in (0, 1), default 0.05
        gamma_0, how fast eps changes at first.

    Examples
    --------
    >>> import torch
    >>> from demur import Classifier, attacks
    >>> module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3))
    >>> images, labels = torch.full((2, 1, 8, 8), 0.5), torch.tensor([0, 1])
    >>> attacks.FMN(steps=20)(Classifier(module, 3), images, labels, "linf").success.tolist()
    [True, True]
    """

    takes_starting_points: ClassVar[bool] = True

    steps: int = 100
    step_size: float | None = None
    gamma: float = 0.05

    def __post_init__(self) -> None:
        check_counts(steps=self.steps)
        check_positive(step_size=self.step_size)
        check_fractions(gamma=self.gamma)

    def loss_in(self, norm: str) -> Loss:
        """Give the margin in L0, as in the paper, and else the cross-entropy."""
        return "margin" if norm == "l0" else "cross_entropy"

    def search(self, state: AttackState) -> None:
        """Walk along the boundary."""
        state.drop_solved()
        if isinstance(state.ball, L0):
            self._walk(state)
            restore_pixels(state)
            return
        linear = linear_candidates(state, self.steps)
        self._walk(state.part(), linear)
        linear.finish()

    def _walk(self, state: AttackState, linear: LinearCandidates | None = None) -> None:
        l0 = isinstance(state.ball, L0)
        first = self.step_size or (10.0 if isinstance(state.ball, Linf) else 1.0)
        current = state.starting_points
        eps = torch.full_like(state.ball.eps, 1.0 if l0 else torch.inf)
        resize = _resize_l0 if l0 else _resize
        steps = self.steps if linear is None else linear.steps
        for step in range(steps):
            if linear is not None:
                current, eps = linear.drop(state, step, current, eps)
            if not len(current):
                return
            seen = state.value_and_gradient(current)
            gradient = seen.gradient
            if state.ball.mask is not None:
                gradient = gradient * state.ball.mask
            gamma = falling(step, steps, self.gamma, 0.001)
            eps = resize(state, eps, gamma, current, seen._replace(gradient=gradient))
            eps = eps.clamp(min=0).minimum(state.ball.eps)
            # The length of a step is Euclidean in every norm. A zero gradient gives no step.
            length = gradient.flatten(1).norm(dim=1).clamp(min=1e-12)
            reach = falling(step, steps, first, first / 100) / length
            moved = current + gradient * per_image(reach, gradient)
            current = state.ball.with_eps(eps).project(moved)
        state.evaluate(current)


def _resize_l0(
    state: AttackState, eps: Tensor, gamma: float, current: Tensor, seen: Evaluation
) -> Tensor:
    """Give the next number of pixels: fewer where the image is solved, else more."""
    _, best = state.best()
    inwards = torch.minimum(torch.minimum(eps - 1, (eps * (1 - gamma)).floor()), best)
    outwards = torch.maximum(eps + 1, (eps * (1 + gamma)).floor())
    return torch.where(seen.success, inwards, outwards)


def _resize(
    state: AttackState, eps: Tensor, gamma: float, current: Tensor, seen: Evaluation
) -> Tensor:
    """Give the next eps: smaller where the image is solved, else larger.

    Until an image is solved for the first time, eps is where a linear classifier has its boundary.
    """
    _, best = state.best()
    gradient = seen.gradient.double().flatten(1)
    slope = gradient.norm(p=DUAL[type(state.ball)], dim=1).clamp(min=1e-12)
    distance = state.ball.size(current - state.images)
    boundary = BEYOND * (distance + seen.loss.double().abs() / slope)
    inwards = torch.minimum(eps * (1 - gamma), best)
    outwards = torch.where(best.isfinite(), eps * (1 + gamma), boundary)
    return torch.where(seen.success, inwards, outwards)
