"""What attacks that walk along the boundary share: a schedule, and exact steps for linear
classifiers.

The gradient of the cross-entropy mixes classes. A walk that follows it stops up to 1.18 times as
far away as the nearest error of a linear classifier of five classes. Therefore one of the gradients
is spent at the clean image. Where it shows that the classifier is linear as far as its boundary, a
few more are spent, one for each of the best wanted columns. For a linear classifier, one of these
candidates is the nearest error.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from demur.attacks.book import clear_margin
from demur.attacks.state import AttackState
from demur.norms import L1, Ball, Linf, per_image

COLUMNS = 9
"""Largest number of wanted columns that linear candidates are made for."""
FEWEST_STEPS = 25
"""An attack of fewer steps makes no linear candidates."""
BEYOND = 1.01
"""How far beyond the estimated boundary a step goes: steps to the boundary itself may never cross
it.
"""
HALVINGS = 30
LINEAR = 0.02
"""A classifier counts as linear where a step to its boundary changes the loss as its gradient says,
to within this share.
"""


def falling(step: int, steps: int, first: float, last: float) -> float:
    """Go from `first` to `last` as a cosine."""
    return last + (first - last) * (1 + math.cos(math.pi * step / steps)) / 2


@dataclass(frozen=True)
class Part:
    """Some of the images, and the candidates that are made for them beside the walk.

    `candidate` is the nearest error in the best wanted column, if the classifier is linear. It cost
    a gradient. `columns` (n, count) are the other columns; each of them costs a gradient.
    """

    state: AttackState
    candidate: Tensor | None
    columns: Tensor

    def gradients(self) -> int:
        """Count the gradients that the walk cannot have."""
        return 0 if self.candidate is None else 1 + self.columns.shape[1]

    def finish(self) -> None:
        """Evaluate the candidates, and shorten the best change to the boundary."""
        if self.candidate is not None:
            self.state.evaluate(self.candidate)
        for column in self.columns.unbind(1):
            self.state.evaluate(_candidate(self.state, column)[0])
        self.state.shorten()


def linear_parts(state: AttackState, steps: int) -> list[Part]:
    """Split the images: those where the classifier is linear as far as its boundary, and others.

    The first ones get candidates for the `COLUMNS` best wanted columns, the others for the best
    one.
    """
    if steps < FEWEST_STEPS or not len(state.images):
        return [Part(state, None, state.labels[:, None][:, :0])]
    scores = state.evaluate(state.images).scores
    wanted = state.goal.wanted(scores, state.labels, state.num_classes)
    order = scores.masked_fill(~wanted, -torch.inf).argsort(dim=1, descending=True)
    if state.toward is not None:
        order = state.toward[:, None]
    count = min(int(wanted.sum(1).min()), order.shape[1], COLUMNS)
    candidate, linear = _candidate(state, order[:, 0])
    split = [
        (torch.nonzero(linear).flatten(), order[:, 1:count]),
        (torch.nonzero(~linear).flatten(), order[:, :0]),
    ]
    parts = []
    for index, columns in split:
        if len(index):
            part = state.part()
            candidates, columns = part.select(index, candidate, columns)
            parts.append(Part(part, candidates, columns))
    return parts


def _candidate(state: AttackState, column: Tensor) -> tuple[Tensor, Tensor]:
    """Give the nearest error of a linear classifier in a column (n,), and where it is linear."""
    part = state.part()
    part.toward = column
    part.pursuit = replace(state.pursuit, loss="margin")
    seen = part.value_and_gradient(part.images, record=False)
    lack = BEYOND * (state.pursuit.confidence - seen.loss + clear_margin(seen.scores))
    change = _nearest(state.ball, seen.gradient, lack.clamp(min=0))
    candidate = state.ball.project(state.images + change)
    foreseen = (seen.gradient * (candidate - state.images)).flatten(1).sum(1)
    there = part.evaluate(candidate, record=False).loss
    return candidate, (there - seen.loss - foreseen).abs() <= LINEAR * foreseen.abs()


def _nearest(ball: Ball, gradient: Tensor, lack: Tensor) -> Tensor:
    """Give the smallest change inside [0, 1] and the mask that raises a linear function by `lack`
    (n,).
    """
    clean = ball.clean
    room = torch.where(gradient > 0, 1 - clean, clean)
    if ball.mask is not None:
        room = room * (ball.mask > 0)
    largest = gradient.flatten(1).abs().amax(1).clamp(min=1e-30)
    gain = gradient.abs() / per_image(largest, gradient)
    lack = lack / largest
    low = torch.zeros_like(largest)
    high = torch.ones_like(largest)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        raised = (_reach(ball, gain, middle, room) * gain).flatten(1).sum(1)
        short = raised < lack
        low = torch.where(short, middle, low)
        high = torch.where(short, high, middle)
    return _reach(ball, gain, high, room) * gradient.sign()


def _reach(ball: Ball, gain: Tensor, share: Tensor, room: Tensor) -> Tensor:
    """Give how far each pixel moves: nothing at a share (n,) of 0, as far as there is room at 1. In
    Linf the share is one of eps, and a mask scales it.
    """
    share = per_image(share, gain)
    if isinstance(ball, Linf):
        reach = share * per_image(ball.eps, gain).to(gain.dtype)
        reach = reach * (torch.ones_like(gain) if ball.mask is None else ball.mask)
    elif isinstance(ball, L1):
        reach = 1e3 * (gain - 1 + share).clamp(min=0)
    else:
        reach = (gain * share / (1 - share)).nan_to_num(nan=0.0)
    return torch.minimum(reach, room)
