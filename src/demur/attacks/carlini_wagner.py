"""The L2 attack of Carlini & Wagner 2017, and the tanh space and Adam of all three of their
attacks.

The constants are those of the authors' code (nn_robust_attacks: l2_attack.py, l0_attack.py,
li_attack.py). All images of a batch run at once: each has its own constant, and stops on its own.
As in the authors' code, the change is made in tanh space, where every value is an allowed pixel.
Deviations of all three attacks, each of which makes the changes smaller or the search shorter:

- tanh space reaches 1 % beyond [0, 1], so that pixels on the bounds move at once;
- where an image gets no better, its steps become ten times finer before it is given up;
- the gradient goes through the tanh by hand.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from demur.attacks.base import MinimumNormAttack
from demur.attacks.book import Rows, first_flagged
from demur.attacks.checks import check_not_negative, check_positive
from demur.attacks.state import AttackState
from demur.classifier import check_counts
from demur.norms import per_image

INTERVAL = 10
"""An image that gets no better is looked for every so many steps at most."""
STALLED = 0.9999
"""An image gets no better where its objective is above this share of the last one."""
STALLED_IN_BFLOAT16 = 1.002
"""The same with bfloat16 gradients. Their objective is rounded. With .9999, most images were given
up too early, and the changes were 1.5 % larger than with float32 gradients.
"""
KNOWN = 0.05
"""A constant that is known to this share is known well enough."""
LARGEST_BEGIN = 100.0
"""Largest first constant: where a softmax saturates, the linear estimate is far from the truth."""
LARGEST = 1e10
TANH_REACH = 0.99
FINER = 0.1
REFINED = 4
"""After bfloat16 gradients, the last phase in float32 has so many times fewer steps."""


@dataclass
class Adam(Rows):
    """Adam (Kingma & Ba 2015) with a step count of its own for each image; all (n, ...)."""

    first: Tensor
    second: Tensor
    count: Tensor
    finer: Tensor
    rate: float

    @classmethod
    def begin(cls, like: Tensor, rate: float) -> "Adam":
        """Start at zero."""
        count = torch.zeros(len(like), device=like.device)
        return cls(
            torch.zeros_like(like), torch.zeros_like(like), count, torch.ones_like(count), rate
        )

    def step(self, gradient: Tensor) -> Tensor:
        """Give what to subtract from the variable."""
        self.count += 1
        self.first.lerp_(gradient, 0.1)
        self.second.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
        rate = self.rate * (1 - 0.999**self.count).sqrt() / (1 - 0.9**self.count)
        bias = per_image(rate, gradient)
        return self.first / (self.second.sqrt() + 1e-8) * bias * per_image(self.finer, gradient)

    def reset(self, flags: Tensor) -> None:
        """Start again for the flagged images (n,) bool."""
        wide = per_image(flags, self.first)
        self.first.masked_fill_(wide, 0)
        self.second.masked_fill_(wide, 0)
        self.count.masked_fill_(flags, 0)


def to_tanh(images: Tensor) -> Tensor:
    """Give the place of images (n, C, H, W) in tanh space."""
    return torch.atanh((2 * images - 1) * TANH_REACH)


def from_tanh(variable: Tensor, clean: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Give the images at a place in tanh space, clean outside the mask, and the derivative of each
    pixel.
    """
    bent = torch.tanh(variable)
    images = ((bent / TANH_REACH + 1) / 2).clamp(0, 1)
    slope = (1 - bent * bent) / (2 * TANH_REACH)
    if mask is None:
        return images, slope
    return torch.where(mask > 0, images, clean), slope * mask


@dataclass
class _Search(Rows):
    """The search for the constant of each image; all (n, ...)."""

    const: Tensor
    low: Tensor
    high: Tensor
    variable: Tensor

    def unknown(self) -> Tensor:
        """Flag the images whose constant is not known well enough."""
        return self.high - self.low > KNOWN * self.high

    def learn(self, unknown: Tensor, solved: Tensor) -> None:
        """Take note of which images were solved, and choose the next constants: ten-fold, then
        bisection.
        """
        self.high = torch.where(solved, self.const.minimum(self.high), self.high)
        failed = unknown & ~solved
        self.low = torch.where(failed, self.const.maximum(self.low), self.low)
        middle = (self.low + self.high) / 2
        self.const = torch.where(self.high < 1e9, middle, self.const * 10)


@dataclass
class _Descent(Rows):
    """One search step: where each image is; all (n, ...). `row` is its place in the whole batch."""

    row: Tensor
    const: Tensor
    variable: Tensor
    total: Tensor
    adam: Adam

    def stalled(self, total: Tensor, share: float) -> Tensor:
        """Flag the images whose objective is above a share of the last one."""
        stalled = total > share * self.total
        self.total = total
        return stalled


@dataclass(frozen=True, repr=False)
class CarliniWagnerL2(MinimumNormAttack):
    """Seek the smallest change in L2: minimise ||x' - x||^2 + c * max(confidence - margin, 0).

    Carlini & Wagner 2017, sec. V-C and VI-A. The constant c is found by ten-fold steps and
    bisection. Deviations: the search begins at the constant that a linear classifier needs, each of
    its steps begins where the last one ended, and it ends for an image whose constant is known to 5
    %. A success in the first tenth of a search step is kept but does not count for the search,
    because a first step that is too large brings it. At the end, the best change is shortened to
    the boundary. With bfloat16 gradients, a last phase in float32 refines the change.

    Parameters
    ----------
    confidence : float, default 0
        kappa: by how much the wanted class must win, in score units; in the loss and for success.
    search_steps : int, default 9
        Constants that are tried.
    steps : int, default 1000
        Gradients for each constant; 10,000 in the authors' code. An image that has not got better
        by .01 % within a twentieth of the steps ends the search step there.
    learning_rate : float, default 0.01
    initial_const : float, optional
        The first c. Default: what a linear margin needs; .001 in the authors' code.

    Examples
    --------
    >>> import torch
    >>> from demur import Classifier, attacks
    >>> module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3))
    >>> images, labels = torch.full((2, 1, 8, 8), 0.5), torch.tensor([0, 1])
    >>> attack = attacks.CarliniWagnerL2(steps=50, search_steps=4)
    >>> attack(Classifier(module, 3), images, labels, "l2").success.tolist()
    [True, True]
    """

    norms: ClassVar[tuple[str, ...]] = ("l2",)
    default_batch_size: ClassVar[int] = 256

    confidence: float = 0.0
    search_steps: int = 9
    steps: int = 1000
    learning_rate: float = 0.01
    initial_const: float | None = None

    def __post_init__(self) -> None:
        check_counts(steps=self.steps, search_steps=self.search_steps)
        check_positive(learning_rate=self.learning_rate, initial_const=self.initial_const)
        check_not_negative(confidence=self.confidence)

    def search(self, state: AttackState) -> None:
        """Search for the constant of each image."""
        state.drop_solved()
        search = self._begin(state)
        for _ in range(self.search_steps):
            unknown = search.unknown()
            count = int(unknown.sum())
            if not count:
                break
            part = state.part()
            index = first_flagged(unknown, count)
            const, variable = part.select(index, search.const, search.variable)
            solved, ended = self._minimise(part, const, variable, self.steps)
            search.variable = search.variable.index_copy(0, index, ended)
            everywhere = torch.zeros_like(unknown).index_copy(0, index, solved)
            search.learn(unknown, everywhere)
        if state.half:
            self._refine(state, search)
        state.shorten()

    def _refine(self, state: AttackState, search: _Search) -> None:
        """Go on from the best candidates in float32, with the smallest constant that succeeded."""
        part = state.part()
        part.half = False
        best, _ = part.best()
        const = torch.where(search.high < LARGEST, search.high, search.const)
        steps = max(INTERVAL, self.steps // REFINED)
        self._minimise(part, const, to_tanh(best), steps, finer=FINER)

    def _begin(self, state: AttackState) -> _Search:
        """Start at the constant with which a linear classifier's minimum is at the boundary: 2 |m|
        / |g|^2.
        """
        if self.initial_const is None:
            seen = state.value_and_gradient(state.images)
            square = seen.gradient.flatten(1).square().sum(1).clamp(min=1e-12)
            const = 2 * (self.confidence - seen.loss) / square
            const = const.clamp(1e-6, LARGEST_BEGIN).nan_to_num(nan=1.0)
        else:
            count = len(state.images)
            const = torch.full((count,), self.initial_const, device=state.images.device)
        high = torch.full_like(const, LARGEST)
        return _Search(const, torch.zeros_like(const), high, to_tanh(state.images))

    def _minimise(
        self,
        state: AttackState,
        const: Tensor,
        variable: Tensor,
        steps: int,
        finer: float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """Do one search step; flag the images (n,) that it solved, and give where in tanh space it
        ended.
        """
        share = STALLED_IN_BFLOAT16 if state.half else STALLED
        settled = min(max(1, steps // 10), steps - 1)
        interval = max(INTERVAL, steps // 20)
        solved = torch.zeros_like(const, dtype=torch.bool)
        last = variable.clone()
        row = torch.arange(len(const), device=const.device)
        adam = Adam.begin(variable, self.learning_rate)
        adam.finer = torch.full_like(adam.finer, finer)
        descent = _Descent(row, const, variable, torch.full_like(const, torch.inf), adam)
        for step in range(steps):
            candidates, slope = from_tanh(descent.variable, state.images, state.ball.mask)
            checked = step % interval == 0
            # A success of bfloat16 gradients waits for the device, and so does the check.
            recorded = not (state.half and checked)
            seen = state.value_and_gradient(candidates, record=recorded)
            loss = seen.loss
            gradient = seen.gradient
            if recorded and step >= settled:
                solved[descent.row] = solved[descent.row] | seen.success
            change = candidates - state.images
            if checked:
                missing = (self.confidence - loss).clamp(min=0)
                total = change.flatten(1).square().sum(1) + descent.const * missing
                stalled = descent.stalled(total, share)
                going = ~stalled | (descent.adam.finer == 1)
                descent.adam.finer = torch.where(stalled, FINER, descent.adam.finer)
                count = int(going.sum())
                if count < len(going):
                    last[descent.row] = descent.variable
                    if not count:
                        return solved, last
                    descent, change, slope, loss, gradient = state.select(
                        first_flagged(going, count), descent, change, slope, loss, gradient
                    )
            pull = per_image(descent.const * (loss < self.confidence), change).to(change)
            descent.variable = descent.variable - descent.adam.step(
                (2 * change - pull * gradient) * slope
            )
        last[descent.row] = descent.variable
        return solved, last
