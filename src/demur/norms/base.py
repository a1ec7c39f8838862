"""The base class of balls, and how images are taken apart into pixels."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from copy import copy
from typing import Self

import torch
from torch import Tensor

from demur import seeds
from demur.errors import DemurError

TOLERANCE = 1e-6
"""How far a stored change may exceed eps, relative to eps."""


def per_image(values: Tensor, like: Tensor) -> Tensor:
    """Reshape one value for each image, (N,), so that it broadcasts against `like` of shape (N,
    ...).
    """
    return values.reshape(-1, *[1] * (like.ndim - 1))


class Ball(ABC):
    """The images that are allowed around clean images.

    Parameters
    ----------
    clean : Tensor of shape (N, ...)
        Clean images in [0, 1].
    eps : Tensor of shape (N,)
        The largest allowed change of each image.
    mask : Tensor of the shape of `clean`, or None
        Where pixels may change; None means everywhere. Only `Linf` takes values between 0 and 1;
        see `check_mask`.
    """

    def __init__(self, clean: Tensor, eps: Tensor, mask: Tensor | None) -> None:
        self.clean = clean
        self.eps = eps
        self.mask = mask

    @classmethod
    def check_mask(cls, mask: Tensor | None) -> None:
        """Raise DemurError if the norm needs a mask of 0 and 1 and gets another one."""
        if mask is not None and not bool(((mask == 0) | (mask == 1)).all()):
            raise DemurError(
                "the mask must be 0 or 1 at every pixel; only in Linf does a mask scale eps."
            )

    def select(self, index: Tensor) -> Self:
        """Give the ball around the images at `index`."""
        ball = copy(self)
        ball.clean = self.clean[index]
        ball.eps = self.eps[index]
        ball.mask = None if self.mask is None else self.mask[index]
        return ball

    def with_eps(self, eps: Tensor) -> Self:
        """Give the ball around the same images with another eps (N,)."""
        return type(self)(self.clean, eps, self.mask)

    @staticmethod
    @abstractmethod
    def measure(change: Tensor) -> Tensor:
        """Compute the norm of each change (N, ...): (N,) float64."""

    def size(self, change: Tensor) -> Tensor:
        """Compute the smallest eps that allows each change (N, ...) inside the mask: (N,) float64.

        This is the norm of the change. Where a mask scales eps, it is the norm of the change
        divided by the mask.
        """
        return self.measure(change)

    @abstractmethod
    def project(self, images: Tensor) -> Tensor:
        """Give the allowed images that are nearest to `images` (N, ...)."""

    @abstractmethod
    def steepest_step(self, gradient: Tensor, images: Tensor | None = None) -> Tensor:
        """Give the change of size 1 inside the mask that climbs the gradient most steeply.

        Parameters
        ----------
        gradient : Tensor of shape (N, ...)
            Gradient of the loss. A zero gradient gives a zero step.
        images : Tensor of shape (N, ...), optional
            Where the step starts. L1 moves few pixels and leaves out those that [0, 1] holds back.
        """

    @abstractmethod
    def random(self, keys: Sequence[int], seed: int, *names: object) -> Tensor:
        """Draw one allowed image for each key, uniformly from the ball before it is clipped to [0,
        1].
        """

    @classmethod
    def largest(cls, images: Tensor, mask: Tensor | None = None) -> Tensor:
        """Give the eps (N,) float64 that allows every image in [0, 1] that is clean where the mask
        is 0.
        """
        return cls.measure(torch.ones_like(images[:1])).expand(len(images))

    def contains(self, images: Tensor) -> Tensor:
        """Flag the images (N, ...) that are allowed: (N,) bool."""
        change = images.double() - self.clean.double()
        inside = (images >= 0) & (images <= 1) & torch.isfinite(images)
        if self.mask is not None:
            inside &= (self.mask > 0) | (images == self.clean)
        return inside.flatten(1).all(1) & self._within(change)

    def _within(self, change: Tensor) -> Tensor:
        return self.measure(change) <= self.eps.double() * (1 + TOLERANCE)

    def _masked(self, values: Tensor) -> Tensor:
        return values if self.mask is None else values * self.mask

    def _moved(self, change: Tensor, scale: Tensor) -> Tensor:
        return (self.clean + change * per_image(scale, change).to(change.dtype)).clamp(0, 1)

    def _reachable(self, roundings: float) -> Tensor:
        """Give the largest size (N,) whose sum with the clean image stays in the ball after
        rounding.

        A sum in [0, 1] is off by at most half a unit in the last place in each value. `roundings`
        is the norm of a change by one in every value. Only where eps is tiny against that is the
        result below eps.
        """
        half_unit = torch.finfo(self.clean.dtype).eps / 4
        eps = self.eps.double()
        return torch.minimum(eps, eps * (1 + 0.85 * TOLERANCE) - half_unit * roundings).clamp(min=0)


def by_pixel(values: Tensor) -> Tensor:
    """Reshape images (N, C, H, W), or vectors (N, F), to (N, pixels, channels)."""
    return values.flatten(2).transpose(1, 2) if values.ndim > 2 else values[:, :, None]


def spread(flags: Tensor, images: Tensor) -> Tensor:
    """Reshape flags (N, pixels) so that they broadcast against images (N, C, H, W) or vectors (N,
    F).
    """
    return flags.reshape(len(flags), 1, *images.shape[2:]) if images.ndim > 2 else flags


def at_random_radius(
    ball: Ball, directions: Tensor, keys: Sequence[int], seed: int, *names: object
) -> Tensor:
    """Go from the clean images along directions of size 1, as far as a uniform draw from the ball
    would.
    """
    dimensions: Tensor | int = ball.clean[0].numel()
    if ball.mask is not None:
        dimensions = ball.mask.flatten(1).sum(1).clamp(min=1)
    share = seeds.uniform(keys, (), seed, "radius", *names).to(ball.clean) ** (1 / dimensions)
    radius = per_image(share * ball.eps, directions).to(directions.dtype)
    return ball.project(ball.clean + directions * radius)
