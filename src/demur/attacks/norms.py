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


class Ball(ABC):
    """What is allowed around clean images (N, ...): eps is (N,), region broadcast to the images, or None for everywhere."""

    def __init__(self, clean: Tensor, eps: Tensor, region: Tensor | None) -> None:
        self.clean, self.eps, self.region = clean, eps, region

    def select(self, index: Tensor) -> Self:
        """Give the ball around the images of that index."""
        return type(self)(self.clean[index], self.eps[index], None if self.region is None else self.region[index])

    @staticmethod
    @abstractmethod
    def size(delta: Tensor) -> Tensor:
        """Size of each change (N, ...) in this norm, in float64: (N,)."""

    @abstractmethod
    def confine(self, images: Tensor) -> Tensor:
        """Give the allowed images nearest to these: (N, ...)."""

    @abstractmethod
    def ascent(self, gradient: Tensor) -> Tensor:
        """Give the change of size 1 in this norm, inside the region, that climbs that gradient most steeply; 0 for a zero gradient."""

    @abstractmethod
    def random(self, keys: Sequence[int], seed: int, *names: object) -> Tensor:
        """Draw an allowed image for each key, uniformly from the ball before it is clipped to [0, 1]."""

    def inside(self, images: Tensor) -> Tensor:
        """Tell which images are allowed: (N,) bool."""
        delta = images.double() - self.clean.double()
        allowed = torch.isfinite(images).flatten(1).all(1) & ((images >= 0) & (images <= 1)).flatten(1).all(1)
        if self.region is not None:
            allowed &= ((self.region > 0) | (images == self.clean)).flatten(1).all(1)
        return allowed & self._within(delta)

    def _within(self, delta: Tensor) -> Tensor:
        return self.size(delta) <= self.eps.double() * (1 + TOLERANCE)


def _columns(values: Tensor, like: Tensor) -> Tensor:
    """(N,) -> (N, 1, ...), to broadcast against (N, ...)."""
    return values.reshape(-1, *[1] * (like.ndim - 1))


class Linf(Ball):
    """The largest change of a pixel. The region scales eps pixel by pixel."""

    def __init__(self, clean: Tensor, eps: Tensor, region: Tensor | None) -> None:
        super().__init__(clean, eps, region)
        reach = _columns(eps, clean).double() * (1 if region is None else region.double())
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

    def confine(self, images: Tensor) -> Tensor:
        """Clamp each pixel."""
        return torch.minimum(torch.maximum(images, self._low), self._high)

    def ascent(self, gradient: Tensor) -> Tensor:
        """Sign of the gradient, times the region."""
        return gradient.sign() if self.region is None else gradient.sign() * self.region

    def random(self, keys: Sequence[int], seed: int, *names: object) -> Tensor:
        """Uniform in the box."""
        draws = seeds.uniform(keys, self.clean.shape[1:], seed, *names).to(self.clean)
        reach = _columns(self.eps, self.clean) * (1 if self.region is None else self.region)
        return self.confine(self.clean + (2 * draws - 1) * reach.to(draws.dtype))

    def _within(self, delta: Tensor) -> Tensor:
        reach = _columns(self.eps, delta).double() * (1 if self.region is None else self.region.double())
        return (delta.abs() <= reach * (1 + TOLERANCE)).flatten(1).all(1)


class L2(Ball):
    """The Euclidean length of a change. The region is a 0/1 mask."""

    def __init__(self, clean: Tensor, eps: Tensor, region: Tensor | None) -> None:
        super().__init__(clean, eps, region)
        if region is not None and not bool(((region == 0) | (region == 1)).all()):
            raise DemurError("in L2 a region is a mask of 0 and 1; only in Linf does it scale eps.")

    @staticmethod
    def size(delta: Tensor) -> Tensor:
        """Size (N,) of each change: its Euclidean length."""
        length: Tensor = delta.double().flatten(1).norm(dim=1)
        return length

    def confine(self, images: Tensor) -> Tensor:
        """Shorten the change to eps, and clip (which only shortens it further)."""
        delta = (images - self.clean) if self.region is None else (images - self.clean) * self.region
        scale = self.eps.double() / self.size(delta).clamp(min=torch.finfo(torch.float64).tiny)
        result = self._moved(delta, scale.clamp(max=1))
        # Adding a small change to a pixel rounds it: shorten where that leaves the ball. Ends at the clean image.
        for attempt in range(1, 64):
            out = self.size(result.double() - self.clean.double()) > self.eps.double() * (1 + TOLERANCE)
            if not bool(out.any()):
                return result
            scale = torch.where(out, scale.clamp(max=1) * (1 - 2.0 ** (attempt - 24) if attempt < 24 else 0.0), scale)
            result = self._moved(delta, scale.clamp(max=1))
        return result

    def _moved(self, delta: Tensor, scale: Tensor) -> Tensor:
        return (self.clean + delta * _columns(scale, delta).to(delta.dtype)).clamp(0, 1)

    def ascent(self, gradient: Tensor) -> Tensor:
        """Give the gradient at length 1."""
        masked = gradient if self.region is None else gradient * self.region
        # Divide by the largest pixel first: squares of a tiny gradient vanish in float32.
        largest = masked.flatten(1).abs().amax(1)
        masked = masked / _columns(torch.where(largest > 0, largest, 1), masked)
        return masked / _columns(masked.flatten(1).norm(dim=1).clamp(min=0.5), masked)

    def random(self, keys: Sequence[int], seed: int, *names: object) -> Tensor:
        """Uniform in the ball of the region's dimensions."""
        # A direction of length 1, or 0 where the region leaves nothing to change.
        directions = self.ascent(seeds.normal(keys, self.clean.shape[1:], seed, *names).to(self.clean))
        pixels = self.clean[0].numel() if self.region is None else self.region.flatten(1).sum(1).clamp(min=1)
        radius = seeds.uniform(keys, (), seed, "radius", *names).to(self.clean) ** (1 / pixels) * self.eps
        return self.confine(self.clean + directions * _columns(radius, directions).to(directions.dtype))


BALLS: dict[str, type[Ball]] = {"linf": Linf, "l2": L2}


def ball_of(norm: str) -> type[Ball]:
    """The kind of ball by the norm's name: `linf` or `l2`."""
    if norm not in BALLS:
        raise unknown("norm", norm, BALLS)
    return BALLS[norm]


def sizes(clean: Tensor, images: Tensor) -> dict[str, Tensor]:
    """How far each image is from the clean one: {"l0", "l2", "linf"} -> (N,) float64. L0 counts pixels, not channels."""
    delta = images.double() - clean.double()
    pixels = (delta != 0).flatten(2).any(1) if delta.ndim > 2 else delta != 0
    return {"l0": pixels.flatten(1).sum(1).double(), "l2": L2.size(delta), "linf": Linf.size(delta)}
