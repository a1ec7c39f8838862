"""One step along the gradient: the attacks of the background-class paper, and quick probes."""

from dataclasses import dataclass
from typing import ClassVar

from demur.attacks.base import SearchAttack
from demur.attacks.state import AttackState
from demur.goals import Loss, check_loss
from demur.norms import per_image


@dataclass(frozen=True, repr=False)
class _OneStep(SearchAttack):
    low_precision: ClassVar[bool] = False

    loss: Loss = "margin"
    keep_maximizing: bool = False

    def __post_init__(self) -> None:
        check_loss(self.loss)

    def search(self, state: AttackState) -> None:
        """Take one step of size eps and evaluate it."""
        # The papers step on every image, right or wrong: the clean image is no candidate here.
        seen = state.value_and_gradient(state.images, record=False)
        step = state.ball.steepest_step(seen.gradient)
        reach = per_image(state.ball.eps, step).to(step)
        state.evaluate(state.ball.project(state.images + reach * step))


@dataclass(frozen=True, repr=False)
class FGSM(_OneStep):
    """Fast gradient sign method: x + eps * mask * sign(gradient of the loss), clipped to [0, 1].

    Goodfellow et al. 2015. Linf only, in float32. Where the step fails and the clean image reaches
    the goal, the clean image is the candidate. The background-class paper (sec. II.B) uses eps =
    0.25 and the cross-entropy of the true class: goal `AnyError()` and `loss="cross_entropy"` have
    the same direction.

    Parameters
    ----------
    loss : {"margin", "cross_entropy", "hinge"}, default "margin"
    keep_maximizing : bool, default False
        Whether the candidate is the step even where the clean image already succeeds. Then
        `success` is that of the step alone; see `AttackResult`.

    Examples
    --------
    >>> import torch
    >>> from demur import Classifier, attacks
    >>> module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3))
    >>> images, labels = torch.full((2, 1, 8, 8), 0.5), torch.tensor([0, 1])
    >>> result = attacks.FGSM()(Classifier(module, 3), images, labels, "linf:0.1")
    >>> float((result.candidates - images).abs().max()) <= 0.1 * (1 + 1e-6)
    True
    """

    norms: ClassVar[tuple[str, ...]] = ("linf",)
    hint: ClassVar[str] = " Use FGM in l2, PGD elsewhere."


@dataclass(frozen=True, repr=False)
class FGM(_OneStep):
    """Fast gradient method: x + eps * gradient / ||gradient||_2, clipped to [0, 1].

    Liu et al. 2017. L2 only, in float32. eps is the length before clipping (6.79 in the
    background-class paper, sec. VI.A); `attacks.sizes` gives the length after it. With a mask, the
    gradient is taken inside the mask.

    Parameters
    ----------
    loss : {"margin", "cross_entropy", "hinge"}, default "margin"
    keep_maximizing : bool, default False
        As in `FGSM`.

    Examples
    --------
    >>> from demur import attacks
    >>> attacks.FGM(loss="cross_entropy")
    FGM(loss='cross_entropy')
    """

    norms: ClassVar[tuple[str, ...]] = ("l2",)
    hint: ClassVar[str] = " Use FGSM in linf, PGD elsewhere."
