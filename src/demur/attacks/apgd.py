"""Auto-PGD: gradient ascent that chooses its own step sizes, and its targeted version."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from demur.attacks.base import SearchAttack
from demur.attacks.book import Evaluation, Rows
from demur.attacks.hope import MARGINS, check_give_up, hopeless
from demur.attacks.state import AttackState
from demur.attacks.targets import nearest_targets
from demur.classifier import check_counts
from demur.errors import DemurError
from demur.goals import Loss, check_loss
from demur.norms import per_image

MOMENTUM = 0.75
RHO = 0.75


@dataclass
class _Ascent(Rows):
    """Where the ascent of each image is; all (n, ...). Greek letters are those of algorithm 1.

    `current` is x^(k), `before` x^(k-1), `best` x_max with `best_loss` f_max, `step_size` eta,
    `rises` the number of steps that raised the loss since the last checkpoint; `checked_size` and
    `checked_best` are eta and f_max at that checkpoint; `clean` is the loss of the clean image, or
    -inf where no image is given up.
    """

    current: Tensor
    before: Tensor
    gradient: Tensor
    loss: Tensor
    best: Tensor
    best_gradient: Tensor
    best_loss: Tensor
    step_size: Tensor
    rises: Tensor
    checked_size: Tensor
    checked_best: Tensor
    clean: Tensor

    @classmethod
    def begin(
        cls, current: Tensor, seen: Evaluation, step_size: Tensor, clean: Tensor | None
    ) -> "_Ascent":
        """Start at `current`, with the first evaluation there."""
        gradient = seen.gradient
        loss = seen.loss
        rises = torch.zeros_like(loss)
        return cls(
            current,
            current,
            gradient,
            loss,
            current,
            gradient,
            loss,
            step_size,
            rises,
            step_size,
            loss,
            torch.full_like(loss, -torch.inf) if clean is None else clean,
        )

    def take(self, seen: Evaluation) -> None:
        """Take note of the evaluation of `current`."""
        self.rises = self.rises + (seen.loss > self.loss)
        self.loss = seen.loss
        self.gradient = seen.gradient
        better = self.loss > self.best_loss
        wide = per_image(better, self.current)
        self.best = torch.where(wide, self.current, self.best)
        self.best_gradient = torch.where(wide, self.gradient, self.best_gradient)
        self.best_loss = torch.where(better, self.loss, self.best_loss)

    def hopeless(self) -> Tensor:
        """Flag the images (n,) that are hardly reached any more."""
        return hopeless(self.best_loss, self.clean)

    def check(self, steps: int) -> None:
        """At a checkpoint, `steps` after the last one: halve eta and return to x_max where progress
        stalls.
        """
        few_rises = self.rises < RHO * steps
        same_size = self.checked_size == self.step_size
        stalled = few_rises | (same_size & (self.checked_best >= self.best_loss))
        self.checked_size = self.step_size
        self.checked_best = self.best_loss
        self.step_size = torch.where(stalled, self.step_size / 2, self.step_size)
        wide = per_image(stalled, self.best)
        self.current = torch.where(wide, self.best, self.current)
        self.gradient = torch.where(wide, self.best_gradient, self.gradient)
        self.loss = torch.where(stalled, self.best_loss, self.loss)
        self.rises = torch.zeros_like(self.rises)


@dataclass(frozen=True, repr=False)
class APGD(SearchAttack):
    """Auto-PGD: gradient ascent with momentum that halves its step size where progress stalls.

    Croce & Hein 2020, sec. 3 and algorithm 1, in Linf and L2. The first step size is 2 eps.
    Progress is checked after 22 % of the steps and then at ever shorter intervals. L1 needs another
    algorithm: use `PGD`. Deviation: the margin, or the scaled margin, takes the place of the DLR
    loss, which is the margin divided by another scale. DLR is undefined for fewer than three
    columns and ambiguous with a reject column (R22).

    Parameters
    ----------
    steps : int, default 100
        Gradients of each run.
    n_targets : int, default 0
        If not 0, run once for each of the nearest `n_targets` wanted classes, and climb the margin
        of that class. The nearest class is the one with the smallest ratio of the lack of margin to
        the norm of the margin's gradient, at the clean image (MALT, Melamed et al. 2024). The
        reject column is no target unless the goal wants it.
    loss : {"margin", "scaled_margin", "cross_entropy"}, default "margin"
        With targets it must be one of the margins.
    restarts : int, default 1
        Runs on each image that is not solved. Every run without a starting point begins at a random
        allowed image.
    keep_maximizing : bool, default False
        Whether to go on to the largest loss, instead of stopping where the goal is reached. Then
        `success` is that of the image with the largest loss alone; see `AttackResult`.
    give_up : bool, default False
        Whether a run leaves an image at a checkpoint where the margin still lacks more than half of
        what the run has gained since the clean image. The first checkpoint is after 22 % of the
        steps, and most of the gain is made before it. A regularizer switches this off. With targets
        the other targets still get their runs. Only for the margins.
    tries : int, default 1
        Runs toward each target, each from another random start. From the second on, only on images
        that came near: whose margin lacks at most half of what was gained since the clean image.

    Examples
    --------
    >>> from demur import attacks
    >>> attacks.APGD(steps=50, n_targets=9)
    APGD(steps=50, n_targets=9)
    """

    norms: ClassVar[tuple[str, ...]] = ("linf", "l2")
    hint: ClassVar[str] = " Use PGD there."
    takes_starting_points: ClassVar[bool] = True

    steps: int = 100
    n_targets: int = 0
    loss: Loss = "margin"
    restarts: int = 1
    keep_maximizing: bool = False
    give_up: bool = False
    tries: int = 1

    def __post_init__(self) -> None:
        check_counts(steps=self.steps, restarts=self.restarts, tries=self.tries)
        check_counts(0, n_targets=self.n_targets)
        check_loss(self.loss)
        if self.n_targets and self.loss not in MARGINS:
            raise DemurError(f"targeted APGD climbs the margin, not {self.loss!r}.")
        check_give_up(self.give_up, self.loss, self.keep_maximizing)
        if self.tries > 1 and not self.n_targets:
            raise DemurError("tries are for targets: set n_targets, or use restarts.")

    def search(self, state: AttackState) -> None:
        """Ascend once, or once for each target."""
        if not self.n_targets:
            first = state.starting_points if state.started else state.random_start()
            self._ascend(state, first)
            return
        order = nearest_targets(state, self.n_targets)
        for place in range(order.shape[1]):
            (order,) = state.drop_solved(order)
            if not len(order):
                return
            aimed = state.part("target", place)
            aimed.toward = order[:, place]
            at_start = state.started and place == 0
            self._ascend(aimed, aimed.starting_points if at_start else aimed.random_start())
            for again in range(1, self.tries):
                if not len(aimed.labels):
                    break
                aimed = aimed.part("again", again)
                self._ascend(aimed, aimed.random_start())

    def _ascend(self, state: AttackState, first: Tensor) -> None:
        """Ascend from `first`. The images that are worth another try are left in the state."""
        checkpoints = _checkpoints(self.steps)
        last = 0
        # A regularizer adds to the loss, and success is no longer at 0.
        judged = (self.give_up or self.tries > 1) and state.regularizer is None
        clean = state.evaluate(state.images, record=False).loss if judged else None
        ascent = _Ascent.begin(first, state.value_and_gradient(first), 2 * state.ball.eps, clean)
        (ascent,) = state.drop_solved(ascent)
        for step in range(1, self.steps):
            if not len(ascent.current):
                return
            _move(state, ascent, first=step == 1)
            ascent.take(state.value_and_gradient(ascent.current))
            stop = None
            if step in checkpoints:
                ascent.check(step - last)
                last = step
                stop = ascent.hopeless() if self.give_up else None
            (ascent,) = state.drop_solved(ascent, stop=stop)
        if not len(ascent.current):
            return
        _move(state, ascent, first=self.steps == 1)
        state.evaluate(ascent.current)
        if state.half:  # bfloat16 may have rounded a success of the best point away
            state.evaluate(ascent.best)
        if self.tries > 1:
            state.drop_solved(ascent, stop=ascent.hopeless())


def _move(state: AttackState, ascent: _Ascent, first: bool) -> None:
    """Step along the gradient, with momentum after the first step (eq. 2 of sec. 3)."""
    ball = state.ball
    current = ascent.current
    length = per_image(ascent.step_size, current).to(current.dtype)
    reached = ball.project(current + length * ball.steepest_step(ascent.gradient))
    if not first:
        onwards = (1 - MOMENTUM) * (current - ascent.before)
        reached = ball.project(current + MOMENTUM * (reached - current) + onwards)
    ascent.before = current
    ascent.current = reached


def _checkpoints(steps: int) -> set[int]:
    """Give the steps after which progress is checked: shares 0, .22, .41, .57, ... of all steps
    (sec. 3.1).
    """
    shares = [0.0, 0.22]
    while shares[-1] < 1:
        shares.append(shares[-1] + max(shares[-1] - shares[-2] - 0.03, 0.06))
    return {math.ceil(share * steps) for share in shares[1:]}
