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

from demur.attacks.book import Evaluation, Ts, clear_margin
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
class LinearCandidates:
    """Candidates that are made for images (n, ...) beside the walk.

    `steps` is the number of gradients of the walk. `candidates` are the nearest errors in the best
    wanted column, if the classifier is linear: they cost a gradient. `scores` (n, columns) are
    their float32 scores. `linear` flags the images where the classifier is linear as far as its
    boundary. There, each of the other `columns` (n, count) costs one more gradient.
    """

    state: AttackState
    steps: int
    candidates: Tensor
    scores: Tensor
    linear: Tensor
    columns: Tensor

    def drop(self, walk: AttackState, step: int, *rows: *Ts) -> tuple[*Ts]:
        """Take the linear images out of the walk when the gradients that are left are those of
        their candidates. Give the other images' `rows`.
        """
        if step != self.steps - self.columns.shape[1]:
            return rows
        return walk.select(torch.nonzero(~self.linear).flatten(), *rows)

    def finish(self) -> None:
        """Count the candidates, make those of the other columns, and shorten the best change to the
        boundary.
        """
        if len(self.candidates):
            self.state.evaluate(self.candidates, scores=self.scores)
        index = torch.nonzero(self.linear).flatten()
        part = self.state.part()
        (columns,) = part.select(index, self.columns)
        for column in columns.unbind(1) if len(index) else ():
            candidates, _, there = _candidates(part, column)
            part.evaluate(candidates, scores=there.scores)
        self.state.shorten()


def linear_candidates(state: AttackState, steps: int) -> LinearCandidates:
    """Make the candidates of the best wanted column, and find where the classifier is linear.

    An attack of few steps makes no candidates.
    """
    if steps < FEWEST_STEPS or not len(state.images):
        none = torch.zeros_like(state.labels, dtype=torch.bool)
        nothing = state.images[:0]
        return LinearCandidates(state, steps, nothing, nothing, none, none[:, None][:, :0])
    candidates, clean, there = _candidates(state, state.toward)
    wanted = state.goal.wanted(clean.scores, state.labels, state.num_classes)
    order = clean.scores.masked_fill(~wanted, -torch.inf).argsort(dim=1, descending=True)
    count = 1 if state.toward is not None else min(int(wanted.sum(1).min()), COLUMNS)
    foreseen = (clean.gradient * (candidates - state.images)).flatten(1).sum(1)
    linear = (there.loss - clean.loss - foreseen).abs() <= LINEAR * foreseen.abs()
    columns = order[:, 1:count]
    return LinearCandidates(state, steps - 1, candidates, there.scores, linear, columns)


def _candidates(state: AttackState, column: Tensor | None) -> tuple[Tensor, Evaluation, Evaluation]:
    """Give the nearest errors of a linear classifier in a column (n,), or else in the best wanted
    one. Also give what is known of the clean images and of these errors.
    """
    part = state.part()
    part.toward = column
    part.pursuit = replace(state.pursuit, loss="margin")
    clean = part.value_and_gradient(part.images, record=False)
    lack = BEYOND * (state.pursuit.confidence - clean.loss + clear_margin(clean.scores))
    change = _nearest(state.ball, clean.gradient, lack.clamp(min=0))
    candidates = state.ball.project(state.images + change)
    return candidates, clean, part.evaluate(candidates, record=False)


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
