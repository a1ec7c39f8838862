"""Sigma-zero: the fewest changed pixels; and what L0 attacks share."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from demur.attacks.base import MinimumNormAttack
from demur.attacks.boundary import falling
from demur.attacks.checks import check_fractions, check_positive
from demur.attacks.state import AttackState
from demur.classifier import check_counts
from demur.norms import by_pixel, per_image, spread


@dataclass(frozen=True, repr=False)
class SigmaZero(MinimumNormAttack):
    """Seek the fewest changed pixels by descending a smooth count of them.

    Cina et al. 2025, algorithm 1. The count is the mean over pixels of d / (d + sigma), with d the
    squared change of the pixel over its channels. Gradients are scaled to a largest value of 1 and
    go through Adam, whose rate falls to a tenth as a cosine. After each step, changes below a
    threshold are dropped. The threshold of an image grows while it is solved and shrinks while it
    is not. Addition: at the end, pixels that the success does not need are put back, by forward
    passes.

    Parameters
    ----------
    steps : int, default 1000
        Gradients.
    learning_rate : float, default 1.0
        eta_0.
    sigma : float, default 0.001
        Smoothness of the count.
    threshold : float, default 0.3
        tau_0, the first threshold, in pixels in [0, 1].
    threshold_step : float, default 0.01
        t, by which the threshold changes, times the rate.

    Examples
    --------
    >>> import torch
    >>> from demur import Classifier, attacks
    >>> module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3))
    >>> images, labels = torch.full((2, 1, 8, 8), 0.5), torch.tensor([0, 1])
    >>> result = attacks.SigmaZero(steps=50)(Classifier(module, 3), images, labels, "l0")
    >>> bool((result.distance <= 64).all())
    True
    """

    norms: ClassVar[tuple[str, ...]] = ("l0",)

    steps: int = 1000
    learning_rate: float = 1.0
    sigma: float = 1e-3
    threshold: float = 0.3
    threshold_step: float = 0.01

    def __post_init__(self) -> None:
        check_counts(steps=self.steps)
        check_positive(
            learning_rate=self.learning_rate, sigma=self.sigma, threshold_step=self.threshold_step
        )
        check_fractions(threshold=self.threshold)

    def search(self, state: AttackState) -> None:
        """Descend the count and the margin together."""
        state.drop_solved()
        images = state.images
        change = torch.zeros_like(images)
        first = torch.zeros_like(change)
        second = torch.zeros_like(change)
        limit = torch.full((len(images),), self.threshold, device=images.device)
        for step in range(self.steps):
            seen = state.value_and_gradient(images + change)
            slope = self._slope(change, seen.gradient, seen.loss)
            rate = falling(step, self.steps, self.learning_rate, self.learning_rate / 10)
            first.lerp_(slope, 0.1)
            second.mul_(0.999).addcmul_(slope, slope, value=0.001)
            unbiased = (second / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8
            moved = images + change - rate * first / (1 - 0.9 ** (step + 1)) / unbiased
            change = moved.clamp(0, 1) - images
            direction = torch.where(seen.success, 1.0, -1.0)
            limit = (limit + direction * self.threshold_step * rate).clamp(0, 1)
            change = change * (_largest_channel(change.abs()) >= per_image(limit, change))
            change = state.ball.project(images + change) - images
        state.evaluate(images + change)
        restore_pixels(state)

    def _slope(self, change: Tensor, gradient: Tensor, loss: Tensor) -> Tensor:
        """Compute the gradient of the count minus that of the margin, with a largest value of 1."""
        pixels = by_pixel(change).shape[1]
        square = change.square()
        square = square.sum(1, keepdim=True) if change.ndim > 2 else square
        smooth = 2 * change * self.sigma / (square + self.sigma).square() / pixels
        slope = smooth - gradient * per_image(loss < 0, change)
        return slope / per_image(slope.flatten(1).abs().amax(1).clamp(min=1e-12), change)


def _largest_channel(values: Tensor) -> Tensor:
    """Give the largest of (n, C, H, W) over channels, to broadcast; vectors stay the same."""
    return values.amax(1, keepdim=True) if values.ndim > 2 else values


def restore_pixels(state: AttackState, steps: int = 10) -> None:
    """Put back pixels of the best candidates that the success does not need, the least changed
    first.
    """
    best, _ = state.best()
    tried = torch.zeros_like(by_pixel(best)[:, :, 0], dtype=torch.bool)
    for _ in range(steps):
        change = by_pixel(best - state.images).abs().sum(2)
        least, place = change.masked_fill(tried | (change == 0), torch.inf).min(1, keepdim=True)
        chosen = torch.zeros_like(tried).scatter(1, place, True)
        without = torch.where(spread(chosen, best), state.images, best)
        success = state.evaluate(without).success & least.isfinite().squeeze(1)
        best = torch.where(per_image(success, best), without, best)
        tried = tried.scatter(1, place, True)
