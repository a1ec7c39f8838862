"""The attack of the smoothing paper: steps of a fixed length until the goal is reached."""

from dataclasses import dataclass
from typing import ClassVar

from demur.attacks.base import SearchAttack
from demur.attacks.checks import check_not_negative, check_positive
from demur.attacks.state import AttackState
from demur.classifier import check_counts
from demur.goals import Loss


@dataclass(frozen=True, repr=False)
class NormalizedGradient(SearchAttack):
    """Steps of a fixed Euclidean length along the gradient of the cross-entropy, until the goal is
    reached.

    Jézéquel 2019, sec. 2, with goal `Target(classes)`; every goal works. L2 only. There is no
    limit: `distance` tells how far an image went. With an eps in the threat, the attack succeeds
    where the distance is at most eps. Deviations from the printed listing, which has faults: it
    descends the cross-entropy of the target (the paper climbs its probability, whose gradient
    vanishes), each image's gradient is normalised by itself, an image is tested before it steps and
    leaves when it is solved, pixels stay in [0, 1], and the attack gives up after `steps`.

    Parameters
    ----------
    step_size : float, default 0.1
        Euclidean length of a step, on pixels in [0, 1].
    steps : int, default 1000
        Largest number of steps.
    confidence : float, default 0
        Success needs a margin of at least this much, in units of the scores.

    Examples
    --------
    >>> import torch
    >>> from demur import Classifier, ThreatModel, attacks
    >>> module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3))
    >>> clf, images = Classifier(module, 3), torch.full((1, 1, 8, 8), 0.5)
    >>> threat = ThreatModel("l2", goal=attacks.Target(1))
    >>> attacks.NormalizedGradient()(clf, images, torch.tensor([0]), threat).success.tolist()
    [True]
    """

    norms: ClassVar[tuple[str, ...]] = ("l2",)
    needs_eps: ClassVar[bool] = False

    step_size: float = 0.1
    steps: int = 1000
    confidence: float = 0.0

    def __post_init__(self) -> None:
        check_counts(steps=self.steps)
        check_positive(step_size=self.step_size)
        check_not_negative(confidence=self.confidence)

    def loss_in(self, norm: str) -> Loss:
        """Give the cross-entropy."""
        return "cross_entropy"

    def search(self, state: AttackState) -> None:
        """Step until the goal is reached."""
        current = state.images
        for _ in range(self.steps):
            gradient = state.value_and_gradient(current).gradient
            current, gradient = state.drop_solved(current, gradient)
            if not len(current):
                return
            step = state.ball.steepest_step(gradient)
            current = (current + self.step_size * step).clamp(0, 1)
        state.evaluate(current)
