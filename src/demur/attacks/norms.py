"""Norms: how large a change is, which way a step goes, and what an attacker may choose. Projections are made only here.

A `Ball` holds what is allowed around a batch of clean images: within eps in its norm, inside the region, and in [0, 1].
Its `confine` gives float images that keep to this *after* rounding (R1): |x' - x| <= eps to 1e-6 relative, and the
clean image bit for bit where the region is 0.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor

from demur import seeds
from demur.errors import DemurError, unknown

TOLERANCE = 1e-6


def per_image(values: Tensor, like: Tensor) -> Tensor:
    """Shape one value an image (N,) to broadcast against (N, ...)."""
    return values.reshape(-1, *[1] * (like.ndim - 1))


class Ball(ABC):
    """What is allowed around clean images (N, ...): eps is (N,), region broadcast to the images, or None for everywhere."""

    def __init__(self, clean: Tensor, eps: Tensor, region: Tensor | None) -> None:
        self.clean, self.eps, self.region = clean, eps, region

    def select(self, index: Tensor) -> Self:
        """Give the ball around the images of that index."""
        return type(self)(self.clean[index], self.eps[index], None if self.region is None else self.region[index])

    def within(self, eps: Tensor) -> Self:
        """Give the ball around the same images with another eps (N,)."""
        return type(self)(self.clean, eps, self.region)

    @staticmethod
    @abstractmethod
    def size(delta: Tensor) -> Tensor:
        """Size of each change (N, ...) in this norm, in float64: (N,)."""

    def radius(self, delta: Tensor) -> Tensor:
        """The smallest eps that allows each change (N, ...) inside the region: (N,) float64. Its size, but where the region scales eps."""
        return self.size(delta)

    @abstractmethod
    def confine(self, images: Tensor) -> Tensor:
        """Give the allowed images nearest to these: (N, ...)."""

    @abstractmethod
    def ascent(self, gradient: Tensor, images: Tensor | None = None) -> Tensor:
        """Give the change of size 1 in this norm, inside the region, that climbs that gradient most steeply; 0 for a zero gradient.

        `images`, if given, is where the step starts: L1, which moves few pixels, then leaves out those that [0, 1] holds back.
        """

    @abstractmethod
    def random(self, keys: Sequence[int], seed: int, *names: object) -> Tensor:
        """Draw an allowed image for each key, uniformly from the ball before it is clipped to [0, 1]."""

    @classmethod
    def largest(cls, images: Tensor) -> float:
        """The eps that allows every image in [0, 1]."""
        return float(cls.size(torch.ones_like(images[:1])))

    def inside(self, images: Tensor) -> Tensor:
        """Tell which images are allowed: (N,) bool."""
        delta = images.double() - self.clean.double()
        allowed = torch.isfinite(images).flatten(1).all(1) & ((images >= 0) & (images <= 1)).flatten(1).all(1)
        if self.region is not None:
            allowed &= ((self.region > 0) | (images == self.clean)).flatten(1).all(1)
        return allowed & self._within(delta)

    def _within(self, delta: Tensor) -> Tensor:
        return self.size(delta) <= self.eps.double() * (1 + TOLERANCE)

    def _moved(self, delta: Tensor, scale: Tensor) -> Tensor:
        return (self.clean + delta * per_image(scale, delta).to(delta.dtype)).clamp(0, 1)

    def _scaled(self, delta: Tensor, scale: Tensor) -> Tensor:
        """Move by `delta` times `scale` (N,), at most 1, and by less where the rounding of the sums leaves the ball. Clips."""
        result = self._moved(delta, scale.clamp(max=1))
        for attempt in range(1, 64):
            out = self.size(result.double() - self.clean.double()) > self.eps.double() * (1 + TOLERANCE)
            if not bool(out.any()):
                return result
            scale = torch.where(out, scale.clamp(max=1) * (1 - 2.0 ** (attempt - 24) if attempt < 24 else 0.0), scale)
            result = self._moved(delta, scale.clamp(max=1))
        return result


def _masked(ball: Ball) -> None:
    region = ball.region
    if region is not None and not bool(((region == 0) | (region == 1)).all()):
        raise DemurError("a region is a mask of 0 and 1; only in Linf does it scale eps.")


class Linf(Ball):
    """The largest change of a pixel. The region scales eps pixel by pixel."""

    def __init__(self, clean: Tensor, eps: Tensor, region: Tensor | None) -> None:
        super().__init__(clean, eps, region)
        reach = per_image(eps, clean).double() * (1 if region is None else region.double())
        # Bounds in float64, rounded inwards: then a clamp is all that a step needs, and no rounding leaves the ball.
        self._low = self._inwards((clean.double() - reach).clamp(min=0), torch.inf)
        self._high = self._inwards((clean.double() + reach).clamp(max=1), -torch.inf)

    def _inwards(self, bound: Tensor, side: float) -> Tensor:
        rounded = bound.to(self.clean.dtype)
        outside = (rounded.double() < bound) if side > 0 else (rounded.double() > bound)
        return torch.where(outside, torch.nextafter(rounded, torch.full_like(rounded, side)), rounded)

    @staticmethod
    def size(delta: Tensor) -> Tensor:
        """Size (N,) of each change: its largest absolute pixel."""
        return delta.double().flatten(1).abs().amax(1)

    def radius(self, delta: Tensor) -> Tensor:
        """The largest absolute pixel, each divided by the region there."""
        delta = delta.double()
        return self.size(delta if self.region is None else torch.where(self.region > 0, delta / self.region.double(), 0))

    def confine(self, images: Tensor) -> Tensor:
        """Clamp each pixel."""
        return torch.minimum(torch.maximum(images, self._low), self._high)

    def ascent(self, gradient: Tensor, images: Tensor | None = None) -> Tensor:
        """Sign of the gradient, times the region."""
        return gradient.sign() if self.region is None else gradient.sign() * self.region

    def random(self, keys: Sequence[int], seed: int, *names: object) -> Tensor:
        """Uniform in the box."""
        draws = seeds.uniform(keys, self.clean.shape[1:], seed, *names).to(self.clean)
        reach = per_image(self.eps, self.clean) * (1 if self.region is None else self.region)
        return self.confine(self.clean + (2 * draws - 1) * reach.to(draws.dtype))

    def _within(self, delta: Tensor) -> Tensor:
        reach = per_image(self.eps, delta).double() * (1 if self.region is None else self.region.double())
        return (delta.abs() <= reach * (1 + TOLERANCE)).flatten(1).all(1)


class L2(Ball):
    """The Euclidean length of a change. The region is a 0/1 mask."""

    def __init__(self, clean: Tensor, eps: Tensor, region: Tensor | None) -> None:
        super().__init__(clean, eps, region)
        _masked(self)

    @staticmethod
    def size(delta: Tensor) -> Tensor:
        """Size (N,) of each change: its Euclidean length."""
        length: Tensor = delta.double().flatten(1).norm(dim=1)
        return length

    def confine(self, images: Tensor) -> Tensor:
        """Shorten the change to eps, and clip (which only shortens it further)."""
        delta = (images - self.clean) if self.region is None else (images - self.clean) * self.region
        return self._scaled(delta, self.eps.double() / self.size(delta).clamp(min=torch.finfo(torch.float64).tiny))

    def ascent(self, gradient: Tensor, images: Tensor | None = None) -> Tensor:
        """Give the gradient at length 1."""
        masked = gradient if self.region is None else gradient * self.region
        # Divide by the largest pixel first: squares of a tiny gradient vanish in float32.
        largest = masked.flatten(1).abs().amax(1)
        masked = masked / per_image(torch.where(largest > 0, largest, 1), masked)
        return masked / per_image(masked.flatten(1).norm(dim=1).clamp(min=0.5), masked)

    def random(self, keys: Sequence[int], seed: int, *names: object) -> Tensor:
        """Uniform in the ball of the region's dimensions."""
        # A direction of length 1, or 0 where the region leaves nothing to change.
        directions = self.ascent(seeds.normal(keys, self.clean.shape[1:], seed, *names).to(self.clean))
        radius = seeds.uniform(keys, (), seed, "radius", *names).to(self.clean) ** (1 / _dimensions(self)) * self.eps
        return self.confine(self.clean + directions * per_image(radius, directions).to(directions.dtype))


class L1(Ball):
    """The sum of all changes. The region is a 0/1 mask."""

    MOVED = 0.01  # share of an image's values that one step moves

    def __init__(self, clean: Tensor, eps: Tensor, region: Tensor | None) -> None:
        super().__init__(clean, eps, region)
        _masked(self)

    @staticmethod
    def size(delta: Tensor) -> Tensor:
        """Size (N,) of each change: the sum of its absolute values."""
        return delta.double().flatten(1).abs().sum(1)

    def confine(self, images: Tensor) -> Tensor:
        """Project onto the ball and [0, 1] together: each change shrinks by the same amount, and [0, 1] caps it (Croce & Hein 2021)."""
        delta = images.double() - self.clean.double()
        delta = delta if self.region is None else delta * self.region
        room = torch.where(delta > 0, 1 - self.clean.double(), self.clean.double()).flatten(1)
        length = delta.abs().flatten(1)
        capped = torch.minimum(length, room)
        eps = self.eps.double()[:, None].to(length.device)
        if bool((capped.sum(1, keepdim=True) <= eps).all()):
            return self._scaled(delta.to(images.dtype), torch.ones_like(eps[:, 0]))
        # The sum of clamp(length - cut, 0, room) falls from `capped` to 0, in straight pieces, as the cut grows past these points.
        points, order = torch.cat([(length - room).clamp(min=0), length], 1).sort(1)
        slopes = torch.cat([torch.full_like(room, -1.0), torch.full_like(room, 1.0)], 1).gather(1, order).cumsum(1)
        falls = torch.cat([torch.zeros_like(eps), (slopes[:, :-1] * points.diff(dim=1)).cumsum(1)], 1) + capped.sum(1, keepdim=True)
        last = ((falls >= eps).sum(1, keepdim=True) - 1).clamp(min=0)
        cut = points.gather(1, last) + (falls.gather(1, last) - eps) / (-slopes.gather(1, last)).clamp(min=1)
        cut = torch.where(capped.sum(1, keepdim=True) <= eps, 0.0, cut)
        shrunk = torch.minimum((length - cut).clamp(min=0), room).reshape(delta.shape) * delta.sign()
        return self._scaled(shrunk.to(images.dtype), torch.ones_like(eps[:, 0]))

    def ascent(self, gradient: Tensor, images: Tensor | None = None) -> Tensor:
        """Move the values of the largest gradients alike: the best one alone climbs fastest, but a few at once get there sooner."""
        masked = gradient if self.region is None else gradient * self.region
        if images is not None:
            masked = masked.masked_fill(((images <= 0) & (gradient < 0)) | ((images >= 1) & (gradient > 0)), 0)
        largest = masked.flatten(1).abs()
        chosen = largest.topk(max(1, round(self.MOVED * largest.shape[1])), 1)
        moved = torch.zeros_like(largest).scatter(1, chosen.indices, (chosen.values > 0).to(largest.dtype))
        return (moved / moved.sum(1, keepdim=True).clamp(min=1)).reshape(masked.shape) * masked.sign()

    def random(self, keys: Sequence[int], seed: int, *names: object) -> Tensor:
        """Uniform in the ball of the region's dimensions."""
        draws = seeds.uniform(keys, (2, *self.clean.shape[1:]), seed, *names).to(self.clean)
        directions = -(1 - draws[:, 0]).log() * torch.where(draws[:, 1] < 0.5, -1.0, 1.0)
        if self.region is not None:
            directions = directions * self.region
        length = directions.flatten(1).abs().sum(1)
        directions = directions / per_image(torch.where(length > 0, length, 1), directions)
        radius = seeds.uniform(keys, (), seed, "radius", *names).to(self.clean) ** (1 / _dimensions(self)) * self.eps
        return self.confine(self.clean + directions * per_image(radius, directions).to(directions.dtype))


class L0(Ball):
    """The number of pixels that change, all channels of a pixel counting as one. The region is a 0/1 mask."""

    def __init__(self, clean: Tensor, eps: Tensor, region: Tensor | None) -> None:
        super().__init__(clean, eps, region)
        _masked(self)

    @staticmethod
    def size(delta: Tensor) -> Tensor:
        """Size (N,) of each change: how many pixels it touches."""
        return by_pixel(delta != 0).any(2).sum(1).double()

    def confine(self, images: Tensor) -> Tensor:
        """Clip, and keep the pixels that change most."""
        delta = images.clamp(0, 1) - self.clean
        delta = delta if self.region is None else delta * self.region
        changes = by_pixel(delta).square().sum(2)
        kept = self._allowed(changes) & (changes > 0)
        return torch.where(spread(kept, delta), images.clamp(0, 1) if self.region is None else self.clean + delta, self.clean).clamp(0, 1)

    def ascent(self, gradient: Tensor, images: Tensor | None = None) -> Tensor:
        """Give the gradient at Euclidean length 1: any change of one pixel has size 1, so that size says nothing of a step."""
        return L2(self.clean, self.eps, self.region).ascent(gradient)

    def random(self, keys: Sequence[int], seed: int, *names: object) -> Tensor:
        """Choose pixels of the region at random, as many as are allowed, and give them any values."""
        draws = seeds.uniform(keys, self.clean.shape[1:], seed, *names).to(self.clean)
        order = by_pixel(seeds.uniform(keys, self.clean.shape[1:], seed, "pixels", *names).to(self.clean)).sum(2)
        if self.region is not None:
            order = order.masked_fill(~by_pixel(self.region > 0).any(2), -1)
        return self.confine(torch.where(spread(self._allowed(order), draws), draws, self.clean))

    def _allowed(self, order: Tensor) -> Tensor:
        """Flag as many pixels (N, pixels) as may change: the first in that order, from the largest."""
        rank = order.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        return rank + 1 <= self.eps.to(rank.device)[:, None]


def by_pixel(values: Tensor) -> Tensor:
    """Images (N, C, H, W), or vectors (N, F), as (N, pixels, channels)."""
    return values.flatten(2).transpose(1, 2) if values.ndim > 2 else values[:, :, None]


def spread(flags: Tensor, images: Tensor) -> Tensor:
    """Flags (N, pixels), to broadcast against images (N, C, H, W) or vectors (N, F)."""
    return flags.reshape(len(flags), 1, *images.shape[2:]) if images.ndim > 2 else flags


def _dimensions(ball: Ball) -> Tensor | int:
    return ball.clean[0].numel() if ball.region is None else ball.region.flatten(1).sum(1).clamp(min=1)


BALLS: dict[str, type[Ball]] = {"linf": Linf, "l2": L2, "l1": L1, "l0": L0}


def ball_of(norm: str) -> type[Ball]:
    """The kind of ball by the norm's name: `linf`, `l2`, `l1` or `l0`."""
    if norm not in BALLS:
        raise unknown("norm", norm, BALLS)
    return BALLS[norm]


def sizes(clean: Tensor, images: Tensor) -> dict[str, Tensor]:
    """How far each image is from the clean one: {"l0", "l1", "l2", "linf"} -> (N,) float64. L0 counts pixels, not channels."""
    delta = images.double() - clean.double()
    return {name: kind.size(delta) for name, kind in BALLS.items()}
