"""Norms whose steps change few pixels: L1 and L0."""

from collections.abc import Sequence

import torch
from torch import Tensor

from demur import seeds
from demur.norms.base import Ball, at_random_radius, by_pixel, per_image, spread
from demur.norms.dense import L2


class L1(Ball):
    """The sum of all absolute changes. The mask is 0 or 1."""

    MOVED = 0.01  # share of an image's values that one step moves

    @staticmethod
    def measure(change: Tensor) -> Tensor:
        """Compute the sum of the absolute values of each change."""
        return change.double().flatten(1).abs().sum(1)

    def project(self, images: Tensor) -> Tensor:
        """Project onto the ball and [0, 1] at once (Croce & Hein 2021, sec. 3).

        Each change shrinks by the same amount, and [0, 1] caps it.
        """
        change = self._masked(images.double() - self.clean.double())
        room = torch.where(change > 0, 1 - self.clean.double(), self.clean.double()).flatten(1)
        length = change.abs().flatten(1)
        cut = _shrinkage(length, room, self._reachable(length.shape[1]).to(length)[:, None])
        shrunk = torch.minimum((length - cut).clamp(min=0), room).reshape(change.shape)
        return self._moved((shrunk * change.sign()).to(images.dtype), torch.ones_like(self.eps))

    def steepest_step(self, gradient: Tensor, images: Tensor | None = None) -> Tensor:
        """Move the values with the largest gradients by the same amount.

        The best value alone climbs fastest, but several values at once arrive sooner.
        """
        masked = self._masked(gradient)
        if images is not None:
            held = ((images <= 0) & (gradient < 0)) | ((images >= 1) & (gradient > 0))
            masked = masked.masked_fill(held, 0)
        largest = masked.flatten(1).abs()
        chosen = largest.topk(max(1, round(self.MOVED * largest.shape[1])), 1)
        moved = torch.zeros_like(largest).scatter(
            1, chosen.indices, (chosen.values > 0).to(largest.dtype)
        )
        shares = moved / moved.sum(1, keepdim=True).clamp(min=1)
        return shares.reshape(masked.shape) * masked.sign()

    def random(self, keys: Sequence[int], seed: int, *names: object) -> Tensor:
        """Draw uniformly from the ball of the mask's dimensions."""
        draws = seeds.uniform(keys, (2, *self.clean.shape[1:]), seed, *names).to(self.clean)
        signs = torch.where(draws[:, 1] < 0.5, -1.0, 1.0)
        directions = self._masked(-(1 - draws[:, 0]).log() * signs)
        length = directions.flatten(1).abs().sum(1)
        directions = directions / per_image(torch.where(length > 0, length, 1), directions)
        return at_random_radius(self, directions, keys, seed, *names)


class L0(Ball):
    """The number of changed pixels; all channels of a pixel count as one. The mask is 0 or 1."""

    @staticmethod
    def measure(change: Tensor) -> Tensor:
        """Count the pixels of each change that are not 0."""
        return by_pixel(change != 0).any(2).sum(1).double()

    def project(self, images: Tensor) -> Tensor:
        """Clip, and keep the pixels that change most."""
        change = self._masked(images.clamp(0, 1) - self.clean)
        changes = by_pixel(change).square().sum(2)
        kept = self._allowed(changes) & (changes > 0)
        moved = images.clamp(0, 1) if self.mask is None else self.clean + change
        return torch.where(spread(kept, change), moved, self.clean).clamp(0, 1)

    def steepest_step(self, gradient: Tensor, images: Tensor | None = None) -> Tensor:
        """Give the gradient with Euclidean length 1: in L0, any change of one pixel has size 1."""
        return L2(self.clean, self.eps, self.mask).steepest_step(gradient)

    def random(self, keys: Sequence[int], seed: int, *names: object) -> Tensor:
        """Choose as many pixels of the mask as are allowed, and give them random values."""
        shape = self.clean.shape[1:]
        draws = seeds.uniform(keys, shape, seed, *names).to(self.clean)
        order = by_pixel(seeds.uniform(keys, shape, seed, "pixels", *names).to(self.clean)).sum(2)
        if self.mask is not None:
            order = order.masked_fill(~by_pixel(self.mask > 0).any(2), -1)
        return self.project(torch.where(spread(self._allowed(order), draws), draws, self.clean))

    def _allowed(self, order: Tensor) -> Tensor:
        """Flag the pixels (N, pixels) that may change: as many as eps allows, the largest of
        `order` first.
        """
        rank = order.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        return rank + 1 <= self.eps.to(rank.device)[:, None]


def _shrinkage(length: Tensor, room: Tensor, eps: Tensor) -> Tensor:
    """Find the cut (N, 1) at which the sum of clamp(length - cut, 0, room) is eps; 0 where the sum
    is smaller.

    The sum falls from its value at a cut of 0 to 0, in straight pieces between the sorted points.
    """
    points, order = torch.cat([(length - room).clamp(min=0), length], 1).sort(1)
    slopes = torch.cat([torch.full_like(room, -1.0), torch.full_like(room, 1.0)], 1)
    slopes = slopes.gather(1, order).cumsum(1)
    whole = torch.minimum(length, room).sum(1, keepdim=True)
    pieces = (slopes[:, :-1] * points.diff(dim=1)).cumsum(1)
    sums = torch.cat([torch.zeros_like(eps), pieces], 1) + whole
    last = ((sums >= eps).sum(1, keepdim=True) - 1).clamp(min=0)
    slope = (-slopes.gather(1, last)).clamp(min=1)
    cut = points.gather(1, last) + (sums.gather(1, last) - eps) / slope
    return torch.where(whole <= eps, 0.0, cut)
