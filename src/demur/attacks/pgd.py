"""Projected gradient descent, in all norms."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from demur.attacks.base import SearchAttack
from demur.attacks.book import Rows
from demur.attacks.checks import check_not_negative, check_positive
from demur.attacks.state import AttackState
from demur.classifier import check_counts
from demur.goals import Loss, check_loss
from demur.norms import L0, per_image

PATIENCE = 5


@dataclass
class _Walk(Rows):
    """Where the attack is, its step length, and how long its loss has stood still; all (n, ...)."""

    current: Tensor
    gradient: Tensor
    reach: Tensor
    loss: Tensor
    still: Tensor


@dataclass(frozen=True, repr=False)
class PGD(SearchAttack):
    """Projected gradient descent: steps along the gradient of the loss, each projected onto the
    allowed images.

    Madry et al. 2018. The first run starts at the clean image, or at `starting_points`, so that one
    step of size eps is `FGSM` or `FGM`. Every restart without a starting point begins at a random
    allowed image. An image leaves as soon as it is solved.

    Parameters
    ----------
    steps : int, default 100
        Gradients of each run.
    step_size : float, optional
        Length of a step in the norm of the threat; in L0 its Euclidean length. Default: 2.5 eps /
        steps, in L0 2.5 / sqrt(steps).
    loss : {"margin", "cross_entropy", "hinge"}, default "margin"
        The hinge raises the runner-up on the clean image, as in sec. 2.5.2 of the rejection paper.
    random_start : bool, default False
        Whether the first run starts at random too, if it has no starting point.
    restarts : int, default 1
        Runs on each image that is not solved.
    keep_maximizing : bool, default False
        Whether to go on to the largest loss, instead of stopping where the goal is reached. Then
        `success` is that of the image with the largest loss alone; see `AttackResult`.
    tolerance : float, optional
        A run ends on an image whose loss changes by at most this much in each of 5 steps, if the
        steps so far can reach eps and the gradient is not zero. This is the stopping rule of
        algorithm 1 of the rejection paper (t = .01). As printed, that rule would end a descent at
        its first step.
    confidence : float, default 0
        Success needs a margin of at least this much, in units of the scores.

    Examples
    --------
    >>> import torch
    >>> from demur import Classifier, attacks
    >>> module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3))
    >>> images, labels = torch.full((2, 1, 8, 8), 0.5), torch.tensor([0, 1])
    >>> result = attacks.PGD(steps=10)(Classifier(module, 3), images, labels, "linf:0.5")
    >>> result.success.tolist()
    [True, True]
    """

    takes_starting_points: ClassVar[bool] = True

    steps: int = 100
    step_size: float | None = None
    loss: Loss = "margin"
    random_start: bool = False
    restarts: int = 1
    keep_maximizing: bool = False
    tolerance: float | None = None
    confidence: float = 0.0

    def __post_init__(self) -> None:
        check_counts(steps=self.steps, restarts=self.restarts)
        check_positive(step_size=self.step_size)
        check_not_negative(confidence=self.confidence, tolerance=self.tolerance)
        check_loss(self.loss)

    def search(self, state: AttackState) -> None:
        """Climb the loss from one starting point."""
        if self.loss == "hinge" and state.toward is None:
            _raise_runner_up(state)
        walk = self._begin(state)
        for step in range(self.steps):
            seen = state.value_and_gradient(walk.current)
            walk.gradient = seen.gradient
            stop = None
            if self.tolerance is not None:
                stop = _stands_still(walk, seen.loss, state, step, self.tolerance)
            (walk,) = state.drop_solved(walk, stop=stop)
            if not len(walk.current):
                return
            move = state.ball.steepest_step(walk.gradient, walk.current)
            length = per_image(walk.reach, walk.current).to(walk.current.dtype)
            walk.current = state.ball.project(walk.current + move * length)
        state.evaluate(walk.current)

    def _begin(self, state: AttackState) -> _Walk:
        at_random = not state.started and (self.random_start or state.restart > 0)
        current = state.random_start() if at_random else state.starting_points
        eps = state.ball.eps
        if self.step_size is not None:
            reach = torch.full_like(eps, self.step_size)
        elif isinstance(state.ball, L0):
            reach = torch.full_like(eps, 2.5 * self.steps**0.5 / self.steps)
        else:
            reach = 2.5 * eps / self.steps
        unknown = torch.full_like(eps, torch.inf)
        return _Walk(current, current, reach, unknown, torch.zeros_like(eps))


def _stands_still(
    walk: _Walk, loss: Tensor, state: AttackState, step: int, tolerance: float
) -> Tensor:
    """Flag the images (n,) whose loss has not moved for long enough."""
    # A blind image, or one that cannot have come to its eps yet, has not arrived.
    seeing = walk.gradient.flatten(1).any(1)
    arrived = seeing & (step * walk.reach >= state.ball.eps)
    loss = loss.to(walk.loss)
    same = (loss - walk.loss).abs() <= tolerance
    walk.still = torch.where(same & arrived, walk.still + 1, 0)
    walk.loss = loss
    return walk.still >= PATIENCE


def _raise_runner_up(state: AttackState) -> None:
    """Let the loss raise the wanted column with the highest score on the clean image."""
    scores = state.evaluate(state.images).scores
    wanted = state.goal.wanted(scores, state.labels, state.num_classes)
    state.toward = scores.masked_fill(~wanted, -torch.inf).argmax(1)
