"""The Linf and L0 attacks of Carlini & Wagner 2017: a sequence of minimisations, each harder than
the last one.
"""

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from demur.attacks.base import MinimumNormAttack
from demur.attacks.book import Evaluation, Rows, first_flagged
from demur.attacks.carlini_wagner import FINER, Adam, from_tanh, to_tanh
from demur.attacks.checks import check_fractions, check_not_negative, check_positive
from demur.attacks.state import AttackState
from demur.classifier import check_counts
from demur.errors import DemurError
from demur.norms import by_pixel, per_image, spread

RESUMED = 0.01
"""Where an image is about to be given up, constants so many times as large are tried again in finer
steps.
"""


@dataclass
class _Stage(Rows):
    """Where each image is; all (n, ...).

    `level` is what the stage demands: tau (n,) in Linf, the pixels that may change (n, C, H, W) in
    L0. `begin` is where the stage began in tanh space, `total` its last checked objective.
    """

    level: Tensor
    const: Tensor
    variable: Tensor
    begin: Tensor
    total: Tensor
    adam: Adam


@dataclass
class _Look:
    """What one pass says of the images of a stage; all (n, ...)."""

    candidates: Tensor
    change: Tensor
    slope: Tensor
    push: Tensor
    hinge: Tensor
    total: Tensor
    seen: Evaluation


@dataclass(frozen=True, repr=False)
class _Staged(MinimumNormAttack):
    """Minimise c * hinge + penalty, each image in a stage of its own.

    A stage that is reached, and holds in float32, becomes harder, from where it is. A stage that is
    not reached after `steps`, or that gets no better, begins again with twice the constant. An
    image ends where the constant is too large, or where nothing harder is left.
    """

    default_batch_size: ClassVar[int] = 256
    slack: ClassVar[float] = 0.0
    """What the hinge asks for beyond the confidence."""

    confidence: float = 0.0
    steps: int = 1000
    learning_rate: float = 0.01
    initial_const: float = 1e-3
    largest_const: float = 2e6

    def __post_init__(self) -> None:
        check_counts(steps=self.steps)
        check_positive(
            learning_rate=self.learning_rate,
            initial_const=self.initial_const,
            largest_const=self.largest_const,
        )
        check_not_negative(confidence=self.confidence)
        if self.initial_const > self.largest_const:
            raise DemurError(
                f"initial_const must be at most largest_const, {self.largest_const:g}, "
                f"not {self.initial_const:g}."
            )

    @abstractmethod
    def first_level(self, state: AttackState) -> Tensor:
        """Give the first stage."""

    @abstractmethod
    def mask(self, state: AttackState, stage: _Stage) -> Tensor | None:
        """Give where pixels may change in this stage."""

    @abstractmethod
    def penalty(self, change: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the penalty (n,) of a change, and its gradient."""

    @abstractmethod
    def reached(self, look: _Look, const: Tensor) -> Tensor:
        """Flag the images (n,) whose stage is reached."""

    @abstractmethod
    def harder(self, change: Tensor, gradient: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
        """Give the next stage after a change, and flag the images (n,) for which there is none."""

    def search(self, state: AttackState) -> None:
        """Go from stage to stage, until no image is left."""
        state.drop_solved()
        part = state.part()
        variable = to_tanh(part.images)
        count = len(variable)
        const = torch.full((count,), self.initial_const, device=variable.device)
        unknown = torch.full_like(const, torch.inf)
        adam = Adam.begin(variable, self.learning_rate)
        stage = _Stage(self.first_level(part), const, variable, variable.clone(), unknown, adam)
        while len(stage.const):
            stage = self._step(part, stage)
        self.finish(state)

    def finish(self, state: AttackState) -> None:
        """Improve the best candidates at the end."""

    def _look(self, state: AttackState, stage: _Stage) -> _Look:
        candidates, slope = from_tanh(stage.variable, state.images, self.mask(state, stage))
        seen = state.value_and_gradient(candidates, record=False)
        change = candidates - state.images
        extra, push = self.penalty(change, stage.level)
        hinge = (self.confidence + self.slack - seen.loss).clamp(min=0)
        total = stage.const * hinge + extra
        return _Look(candidates, change, slope, push, hinge, total, seen)

    def _step(self, state: AttackState, stage: _Stage) -> _Stage:
        """Do one pass, and one step of Adam."""
        look = self._look(state, stage)
        reached = self.reached(look, stage.const)
        over = self._constants(stage, look, reached)[2]
        count, ended = torch.stack([reached.sum(), over.sum()]).tolist()
        success = reached
        none_left = torch.zeros_like(reached)
        if count:
            index = first_flagged(reached, count)
            success = self._confirmed(state, look, reached, index)
            level, none = self.harder(
                look.change[index], look.seen.gradient[index], stage.level[index]
            )
            holds = success[index]
            level = torch.where(per_image(holds, level), level, stage.level[index])
            stage.level = stage.level.index_copy(0, index, level)
            none_left = none_left.index_copy(0, index, none & holds)
            here = per_image(success, stage.begin)
            stage.begin = torch.where(here, stage.variable, stage.begin)
        stuck, stage.total, over = self._constants(stage, look, success, apply=True)
        over = over | none_left
        denied = reached & ~success
        wanting = (look.seen.loss < self.confidence + self.slack) | denied
        pull = per_image(stage.const * wanting, look.change)
        step = stage.adam.step((look.push - pull * look.seen.gradient) * look.slope)
        again = success | stuck
        wide = per_image(again, stage.variable)
        stage.variable = torch.where(wide, stage.begin, stage.variable - step)
        stage.adam.reset(again)
        stage.total = stage.total.masked_fill(again, torch.inf)
        if count:
            ended = int(over.sum())
        if not ended:
            return stage
        (stage,) = state.select(first_flagged(~over, len(over) - ended), stage)
        return stage

    def _constants(
        self, stage: _Stage, look: _Look, success: Tensor, apply: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Flag the images (n,) that are stuck; give the checked objective, and flag the images that
        end.
        """
        check = stage.adam.count % max(1, self.steps // 10) == 0
        no_better = check & (look.total >= 0.9999 * stage.total)
        stuck = ~success & (no_better | (stage.adam.count >= self.steps))
        const = torch.where(stuck, stage.const * 2, stage.const)
        finer = self._resumed(stage, const)
        const = torch.where(finer, RESUMED * const, const)
        if apply:
            stage.const = const
            stage.adam.finer = torch.where(finer, FINER, stage.adam.finer)
        total = torch.where(check, look.total, stage.total)
        return stuck, total, const > self.largest_const

    def _resumed(self, stage: _Stage, const: Tensor) -> Tensor:
        """Flag the images (n,) that go on in finer steps although their constant is too large."""
        return torch.zeros_like(const, dtype=torch.bool)

    def _confirmed(self, state: AttackState, look: _Look, reached: Tensor, index: Tensor) -> Tensor:
        """Evaluate the reached images in float32; flag those (n,) that succeed."""
        # A pixel that hardly moved did not move: it returns from tanh space with a rounding.
        part = state.part()
        candidates, change = part.select(index, look.candidates, look.change)
        candidates = torch.where(change.abs() < 1e-6, part.images, candidates)
        return reached.index_copy(0, index, part.evaluate(candidates).success)


@dataclass(frozen=True, repr=False)
class CarliniWagnerLinf(_Staged):
    """Seek the smallest change in Linf: minimise c * max(confidence - margin, 0) + sum of max(|x' -
    x| - tau, 0), and lower tau.

    Carlini & Wagner 2017, sec. V-E. Where the minimum at a tau is 0, tau falls to `decrease` times
    the largest change. Where it is not, c doubles, up to `largest_const`. The search ends at tau =
    1/256, a level of an 8-bit image. Deviations: those of the module `carlini_wagner`; a stage ends
    early, for each image alone, where it gets no better; where the constant would be too large, the
    search goes on once more in steps ten times finer; at the end the best change is shortened to
    the boundary. The mask must be 0 or 1, because tau is one number for all pixels.

    Parameters
    ----------
    confidence : float, default 0
        As in `CarliniWagnerL2`.
    steps : int, default 1000
        Gradients of each stage.
    learning_rate : float, default 0.005
    initial_const, largest_const : float, default 1e-5 and 20
        The first and the largest c.
    decrease : float in (0, 1), default 0.9
        How fine the search for tau is.

    Examples
    --------
    >>> from demur import attacks
    >>> attacks.CarliniWagnerLinf(decrease=0.98)
    CarliniWagnerLinf(decrease=0.98)
    """

    norms: ClassVar[tuple[str, ...]] = ("linf",)

    learning_rate: float = 5e-3
    initial_const: float = 1e-5
    largest_const: float = 20.0
    decrease: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fractions(decrease=self.decrease)

    def first_level(self, state: AttackState) -> Tensor:
        """Begin with tau = 1."""
        mask = state.ball.mask
        if mask is not None and not bool(((mask == 0) | (mask == 1)).all()):
            raise DemurError(
                "CarliniWagnerLinf takes a mask of 0 and 1: its tau is one number for all pixels. "
                "FMN takes a mask that scales eps."
            )
        return torch.ones(len(state.images), device=state.images.device)

    def mask(self, state: AttackState, stage: _Stage) -> Tensor | None:
        """Give the mask of the threat."""
        return state.ball.mask

    def penalty(self, change: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
        """Sum what exceeds tau."""
        over = change.abs() - per_image(level, change)
        return over.clamp(min=0).flatten(1).sum(1), change.sign() * (over > 0)

    def reached(self, look: _Look, const: Tensor) -> Tensor:
        """The objective is almost 0."""
        return look.total < 1e-4 * const

    def harder(self, change: Tensor, gradient: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
        """Lower tau."""
        tau = self.decrease * level.minimum(change.flatten(1).abs().amax(1))
        return tau, tau < 1 / 256

    def finish(self, state: AttackState) -> None:
        """Shorten the best change to the boundary."""
        state.shorten()

    def _resumed(self, stage: _Stage, const: Tensor) -> Tensor:
        # A step of the learning rate is as large as what there is still to gain.
        return (const > self.largest_const) & (stage.adam.finer == 1)


@dataclass(frozen=True, repr=False)
class CarliniWagnerL0(_Staged):
    """Seek the fewest changed pixels: attack in L2, remove the pixels that contribute least, and
    attack with the rest.

    Carlini & Wagner 2017, sec. V-D, and sec. II.B of the background-class paper. The contribution
    of a pixel is its change times the gradient of the margin there, each summed over channels, as
    in the paper's text. At most .3 sqrt(changed pixels) go at once, and none after one that
    contributes .01, as in the authors' code. Deviations: those of the module `carlini_wagner`; a
    stage ends early, for each image alone, where it gets no better.

    Parameters
    ----------
    confidence : float, default 0
        As in `CarliniWagnerL2`.
    steps : int, default 1000
        Gradients of each stage.
    learning_rate : float, default 0.01
    initial_const, largest_const : float, default 1e-3 and 2e6
        The first and the largest c.

    Examples
    --------
    >>> from demur import attacks
    >>> attacks.CarliniWagnerL0(steps=100)
    CarliniWagnerL0(steps=100)
    """

    norms: ClassVar[tuple[str, ...]] = ("l0",)
    slack: ClassVar[float] = 0.01

    def first_level(self, state: AttackState) -> Tensor:
        """Begin with all pixels of the mask."""
        mask = state.ball.mask
        return torch.ones_like(state.images) if mask is None else mask.clone()

    def mask(self, state: AttackState, stage: _Stage) -> Tensor | None:
        """Give the pixels that are left."""
        return stage.level

    def penalty(self, change: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the squared Euclidean length."""
        return change.flatten(1).square().sum(1), 2 * change

    def reached(self, look: _Look, const: Tensor) -> Tensor:
        """The margin is almost wide enough."""
        return look.hinge < 1e-4

    def harder(self, change: Tensor, gradient: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
        """Remove the pixels that contribute least."""
        allowed = by_pixel(level).amax(2) > 0
        share = by_pixel(change).abs().sum(2) * by_pixel(gradient).abs().sum(2)
        changed = (by_pixel(change).abs().amax(2) >= 1e-4).sum(1, keepdim=True)
        ranked, order = share.masked_fill(~allowed, torch.inf).sort(dim=1)
        place = torch.arange(share.shape[1], device=share.device)
        earlier = torch.cat([torch.zeros_like(ranked[:, :1]), ranked[:, :-1]], 1)
        few = place < (0.3 * changed.sqrt()).ceil().clamp(min=1)
        goes = few & (earlier <= 0.01) & ranked.isfinite()
        left = allowed & ~torch.zeros_like(allowed).scatter(1, order, goes)
        return spread(left, change).to(level.dtype) * level, ~left.any(1)
