"""Random noise: what it breaks, every real attack must break too (R13)."""

from dataclasses import dataclass
from typing import ClassVar

from demur.attacks.base import SearchAttack
from demur.attacks.state import AttackState
from demur.classifier import check_counts


@dataclass(frozen=True, repr=False)
class RandomNoise(SearchAttack):
    """Uniform draws from the allowed images, until one reaches the goal. It needs only decisions.

    Parameters
    ----------
    draws : int, default 1
        Largest number of draws for each image.

    Examples
    --------
    >>> from demur import attacks
    >>> attacks.RandomNoise(draws=100)
    RandomNoise(draws=100)
    """

    low_precision: ClassVar[bool] = False

    draws: int = 1

    def __post_init__(self) -> None:
        check_counts(draws=self.draws)

    @property
    def restarts(self) -> int:  # type: ignore[override]
        """Each draw is a run of its own."""
        return self.draws

    def search(self, state: AttackState) -> None:
        """Evaluate one draw."""
        state.evaluate(state.random_start())
