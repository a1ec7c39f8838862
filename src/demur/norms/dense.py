"""Norms whose steps change every pixel: Linf and L2."""

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor

from demur import seeds
from demur.norms.base import TOLERANCE, Ball, at_random_radius, per_image

LEAST = 1e-30
"""Least value of a mask that the largest eps takes note of: float32 holds its reciprocal."""


class Linf(Ball):
    """The largest change of a pixel. The mask scales eps pixel by pixel."""

    def __init__(self, clean: Tensor, eps: Tensor, mask: Tensor | None) -> None:
        super().__init__(clean, eps, mask)
        reach = per_image(eps, clean).double() * (1 if mask is None else mask.double())
        # Bounds rounded inwards: a clamp is then all that a step needs, and no rounding leaves the
        # ball.
        self._low = self._inwards((clean.double() - reach).clamp(min=0), reach, torch.inf)
        self._high = self._inwards((clean.double() + reach).clamp(max=1), reach, -torch.inf)

    @classmethod
    def check_mask(cls, mask: Tensor | None) -> None:
        """Accept every mask in [0, 1]."""

    def select(self, index: Tensor) -> Self:
        """Give the ball around the images at `index`."""
        ball = super().select(index)
        ball._low = self._low[index]
        ball._high = self._high[index]
        return ball

    def _inwards(self, bound: Tensor, reach: Tensor, side: float) -> Tensor:
        rounded = bound.to(self.clean.dtype)
        # The change, not the bound: the bound itself is rounded where images are float64.
        outside = (rounded.double() - self.clean.double()).abs() > reach
        return torch.where(
            outside, torch.nextafter(rounded, torch.full_like(rounded, side)), rounded
        )

    @classmethod
    def largest(cls, images: Tensor, mask: Tensor | None = None) -> Tensor:
        """Give 1, or what the smallest positive value of the mask scales to 1."""
        largest = super().largest(images)
        if mask is None:
            return largest
        mask = mask.double()
        least = mask.masked_fill(mask == 0, 1).flatten(1).amin(1).clamp(min=LEAST)
        # Rounding must not leave the pixels of the least mask short of 0 and 1.
        return torch.where(least < 1, (1 + TOLERANCE) / least, largest.to(least))

    @staticmethod
    def measure(change: Tensor) -> Tensor:
        """Compute the largest absolute value of each change."""
        return change.double().flatten(1).abs().amax(1)

    def size(self, change: Tensor) -> Tensor:
        """Compute the largest absolute value, each divided by the mask there."""
        change = change.double()
        if self.mask is not None:
            change = torch.where(self.mask > 0, change / self.mask.double(), 0)
        return self.measure(change)

    def project(self, images: Tensor) -> Tensor:
        """Clamp each pixel."""
        return torch.clamp(images, self._low, self._high)

    def steepest_step(self, gradient: Tensor, images: Tensor | None = None) -> Tensor:
        """Give the sign of the gradient, times the mask."""
        return self._masked(gradient.sign())

    def random(self, keys: Sequence[int], seed: int, *names: object) -> Tensor:
        """Draw uniformly from the box."""
        draws = seeds.uniform(keys, self.clean.shape[1:], seed, *names).to(self.clean)
        reach = per_image(self.eps, self.clean) * (1 if self.mask is None else self.mask)
        return self.project(self.clean + (2 * draws - 1) * reach.clamp(max=1).to(draws.dtype))

    def _within(self, change: Tensor) -> Tensor:
        mask = 1 if self.mask is None else self.mask.double()
        reach = per_image(self.eps, change).double() * mask
        return (change.abs() <= reach * (1 + TOLERANCE)).flatten(1).all(1)


class L2(Ball):
    """The Euclidean length of a change. The mask is 0 or 1."""

    @staticmethod
    def measure(change: Tensor) -> Tensor:
        """Compute the Euclidean length of each change."""
        length: Tensor = change.double().flatten(1).norm(dim=1)
        return length

    def project(self, images: Tensor) -> Tensor:
        """Shorten the change to eps, and clip. Clipping makes the change only shorter."""
        change = self._masked(images - self.clean)
        length = self.measure(change).clamp(min=torch.finfo(torch.float64).tiny)
        return self._moved(
            change, (self._reachable(change[0].numel() ** 0.5) / length).clamp(max=1)
        )

    def steepest_step(self, gradient: Tensor, images: Tensor | None = None) -> Tensor:
        """Give the gradient with length 1."""
        masked = self._masked(gradient)
        # Divide by the largest value first: squares of a tiny gradient vanish in float32.
        largest = masked.flatten(1).abs().amax(1)
        masked = masked / per_image(torch.where(largest > 0, largest, 1), masked)
        return masked / per_image(masked.flatten(1).norm(dim=1).clamp(min=0.5), masked)

    def random(self, keys: Sequence[int], seed: int, *names: object) -> Tensor:
        """Draw uniformly from the ball of the mask's dimensions."""
        # A direction of length 1, or 0 where the mask leaves nothing to change.
        draws = seeds.normal(keys, self.clean.shape[1:], seed, *names).to(self.clean)
        return at_random_radius(self, self.steepest_step(draws), keys, seed, *names)
