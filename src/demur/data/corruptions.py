"""Common corruptions: the fifteen families of ImageNet-C, each at five severities.

Hendrycks & Dietterich 2019, "Benchmarking neural network robustness to common corruptions and
perturbations". The severities are those of the authors' code. Deviations:

- The families are computed in torch, on images of any size. Lengths in pixels are those for a side
  of 224, times the shorter side / 224.
- Glass blur moves each pixel to a random neighbour; the authors exchange pixels one by one.
- Frost is drawn: the authors blend photographs of it. Fog adds octaves of smooth noise, which has
  the spectrum of the authors' plasma.
- Snow and motion blur use a line with Gaussian weights along its direction.
- The strongest smoothing of the elastic transform, in severity 1, leaves its affine part alone.
"""

import io
import math
from collections.abc import Callable, Mapping
from typing import Final

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from demur import seeds
from demur.errors import DemurError, unknown

SEVERITIES: Final = (1, 2, 3, 4, 5)
SIDE: Final = 224
"""The side that lengths in pixels are made for."""


def corrupt(images: Tensor, family: str, severity: int, seed: int = 0) -> Tensor:
    """Corrupt images.

    Parameters
    ----------
    images : Tensor of shape (N, C, H, W), float in [0, 1]
        Grey or colour.
    family : str
        One of `CORRUPTIONS`.
    severity : int, 1 to 5
    seed : int, default 0
        Draws depend on it and on the image alone.

    Returns
    -------
    Tensor of shape (N, C, H, W)
        In [0, 1].

    Raises
    ------
    DemurError
        If the family or the severity is unknown.

    Examples
    --------
    >>> corrupt(torch.tensor([[[[0.2, 0.6]]]]), "contrast", 1)
    tensor([[[[0.3200, 0.4800]]]])
    """
    if family not in CORRUPTIONS:
        raise unknown("corruption", family, CORRUPTIONS)
    if severity not in SEVERITIES:
        raise DemurError(f"a severity is 1 to 5, not {severity}.")
    draws = _Draws(images, seed, family, severity)
    return CORRUPTIONS[family](images, severity - 1, draws).clamp(0, 1)


class _Draws:
    """Random draws of each image."""

    def __init__(self, images: Tensor, seed: int, family: str, severity: int) -> None:
        self.keys = seeds.image_keys(images)
        self.shape = images.shape[1:]
        self.seed = seed
        self.names = (family, severity)

    def uniform(self, shape: tuple[int, ...], name: object = "") -> Tensor:
        """Draw from [0, 1): (N, *shape)."""
        return seeds.uniform(self.keys, shape, self.seed, *self.names, name)

    def normal(self, shape: tuple[int, ...], name: object = "") -> Tensor:
        """Draw from the standard normal distribution: (N, *shape)."""
        return seeds.normal(self.keys, shape, self.seed, *self.names, name)

    def poisson(self, rates: Tensor) -> Tensor:
        """Draw counts (N, ...)."""
        found = [
            torch.poisson(one, generator=seeds.generator(self.seed, key, *self.names))
            for key, one in zip(self.keys, rates, strict=True)
        ]
        return torch.stack(found)


def _scale(images: Tensor) -> float:
    return min(images.shape[2:]) / SIDE


# Noise


def _gaussian_noise(images: Tensor, level: int, draws: _Draws) -> Tensor:
    spread = (0.08, 0.12, 0.18, 0.26, 0.38)[level]
    return images + spread * draws.normal(draws.shape)


def _shot_noise(images: Tensor, level: int, draws: _Draws) -> Tensor:
    photons = (60, 25, 12, 5, 3)[level]
    return draws.poisson(images * photons) / photons


def _impulse_noise(images: Tensor, level: int, draws: _Draws) -> Tensor:
    share = (0.03, 0.06, 0.09, 0.17, 0.27)[level]
    chance = draws.uniform(draws.shape)
    salted = torch.where(chance < share / 2, 1.0, images)
    return torch.where(chance > 1 - share / 2, 0.0, salted)


# Blur


def _filtered(images: Tensor, kernels: Tensor) -> Tensor:
    """Filter each image (N, C, H, W) with its kernel (N, k, k), k odd; borders are reflected."""
    n, channels, height, width = images.shape
    reach = kernels.shape[-1] // 2
    # Reflection needs a border smaller than the image.
    padded = images
    left = reach
    while left:
        step = min(left, min(padded.shape[2:]) - 1)
        if step < 1:
            padded = functional.pad(padded, (left,) * 4, mode="replicate")
            break
        padded = functional.pad(padded, (step,) * 4, mode="reflect")
        left -= step
    weight = kernels.repeat_interleave(channels, 0)[:, None].to(images)
    flat = padded.reshape(1, n * channels, *padded.shape[2:])
    return functional.conv2d(flat, weight, groups=n * channels).view(n, channels, height, width)


def _positions(reach: int) -> tuple[Tensor, Tensor]:
    line = torch.arange(-reach, reach + 1, dtype=torch.float32)
    rows, columns = torch.meshgrid(line, line, indexing="ij")
    return rows, columns


def _gaussian(images: Tensor, sigma: float) -> Tensor:
    rows, columns = _positions(max(1, math.ceil(3 * sigma)))
    kernel = torch.exp(-(rows**2 + columns**2) / (2 * sigma**2))
    return _filtered(images, (kernel / kernel.sum()).expand(len(images), -1, -1))


def _defocus_blur(images: Tensor, level: int, draws: _Draws) -> Tensor:
    radius = (3, 4, 6, 8, 10)[level] * _scale(images)
    rows, columns = _positions(math.ceil(radius + 0.5))
    # The soft rim of a pixel's width takes the place of the smoothed disk.
    kernel = (radius + 0.5 - (rows**2 + columns**2).sqrt()).clamp(0, 1)
    return _filtered(images, (kernel / kernel.sum()).expand(len(images), -1, -1))


def _glass_blur(images: Tensor, level: int, draws: _Draws) -> Tensor:
    sigma, reach, times = (*((0.7, 1, 2), (0.9, 2, 1), (1.0, 2, 3), (1.1, 3, 2), (1.5, 4, 2)),)[
        level
    ]
    scale = _scale(images)
    sigma = max(0.3, sigma * scale)
    reach = max(1, round(reach * scale))
    moved = _gaussian(images, sigma)
    n, channels, height, width = images.shape
    rows = torch.arange(height)[:, None].expand(height, width)
    columns = torch.arange(width).expand(height, width)
    for time in range(times):
        shift = (draws.uniform((2, height, width), time) * (2 * reach + 1)).floor().long() - reach
        row = (rows + shift[:, 0]).clamp(0, height - 1)
        column = (columns + shift[:, 1]).clamp(0, width - 1)
        place = (row * width + column).view(n, 1, -1).expand(-1, channels, -1)
        moved = moved.flatten(2).gather(2, place).view_as(images)
    return _gaussian(moved, sigma)


def _motion(images: Tensor, radius: float, sigma: float, angles: Tensor) -> Tensor:
    """Blur along a line of each image's angle (N,), in radians."""
    reach = max(1, math.ceil(radius))
    rows, columns = _positions(reach)
    along = columns * angles.cos().view(-1, 1, 1) + rows * angles.sin().view(-1, 1, 1)
    across = rows * angles.cos().view(-1, 1, 1) - columns * angles.sin().view(-1, 1, 1)
    weight = torch.exp(-(along**2) / (2 * max(sigma, 0.3) ** 2))
    kernel = weight * (1 - across.abs()).clamp(min=0) * (along.abs() <= max(1.0, radius))
    return _filtered(images, kernel / kernel.sum((1, 2), keepdim=True))


def _motion_blur(images: Tensor, level: int, draws: _Draws) -> Tensor:
    radius, sigma = ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15))[level]
    angles = (draws.uniform(()) - 0.5) * math.pi / 2
    scale = _scale(images)
    return _motion(images, radius * scale, sigma * scale, angles)


def _zoomed(images: Tensor, factor: float) -> Tensor:
    """Enlarge around the middle; the size stays."""
    theta = torch.tensor([[1 / factor, 0.0, 0.0], [0.0, 1 / factor, 0.0]])
    grid = functional.affine_grid(
        theta.expand(len(images), -1, -1), list(images.shape), align_corners=False
    )
    return functional.grid_sample(images, grid, padding_mode="reflection", align_corners=False)


def _zoom_blur(images: Tensor, level: int, draws: _Draws) -> Tensor:
    end, step = ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03))[level]
    factors = np.arange(1, end, step).tolist()
    total = images + sum(_zoomed(images, factor) for factor in factors)
    return total / (len(factors) + 1)


# Weather


def _plasma(draws: _Draws, decay: float, name: object = "") -> Tensor:
    """Draw smooth noise in [0, 1] of shape (N, 1, H, W): octaves whose weight decays."""
    height, width = draws.shape[1:]
    count = max(1, math.ceil(math.log2(max(height, width))))
    total = torch.zeros(len(draws.keys), 1, height, width)
    for octave in range(1, count + 1):
        side = 2**octave + 1
        coarse = 2 * draws.uniform((1, side, side), (name, octave)) - 1
        size = (height, width)
        fine = functional.interpolate(coarse, size, mode="bilinear", align_corners=True)
        total += fine / decay**octave
    low, high = total.amin((2, 3), keepdim=True), total.amax((2, 3), keepdim=True)
    return (total - low) / (high - low).clamp(min=1e-6)


def _snow(images: Tensor, level: int, draws: _Draws) -> Tensor:
    mean, spread, zoom, least, radius, sigma, kept = (
        (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
        (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
        (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
        (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
        (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
    )[level]
    scale = _scale(images)
    flakes = _zoomed(mean + spread * draws.normal((1, *draws.shape[1:])), max(1.0, zoom * scale))
    flakes = torch.where(flakes < least, 0.0, flakes).clamp(0, 1)
    angles = -(0.25 + 0.5 * draws.uniform((), "angle")) * math.pi
    flakes = _motion(flakes, radius * scale, sigma * scale, angles)
    grey = images.mean(1, keepdim=True)
    if images.shape[1] == 3:
        grey = (images * torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1, keepdim=True)
    pale = kept * images + (1 - kept) * torch.maximum(images, grey * 1.5 + 0.5)
    return pale + flakes + flakes.flip((2, 3))


def _frost(images: Tensor, level: int, draws: _Draws) -> Tensor:
    kept, added = ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75))[level]
    # Ridges of smooth noise look like crystals.
    ridges = 1 - (2 * _plasma(draws, 1.6, "ridges") - 1).abs()
    crystals = ridges**3 * (0.4 + 0.6 * _plasma(draws, 2.0, "cover"))
    return kept * images + added * crystals


def _fog(images: Tensor, level: int, draws: _Draws) -> Tensor:
    amount, decay = ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4))[level]
    brightest = images.amax((1, 2, 3), keepdim=True)
    return (images + amount * _plasma(draws, decay)) * brightest / (brightest + amount)


def _brightness(images: Tensor, level: int, draws: _Draws) -> Tensor:
    """Add to the value of HSV: hue and saturation stay, so that all channels grow by one factor."""
    added = (0.1, 0.2, 0.3, 0.4, 0.5)[level]
    value = images.amax(1, keepdim=True)
    raised = (value + added).clamp(max=1)
    return torch.where(value > 0, images * raised / value.clamp(min=1e-12), raised)


# Digital


def _contrast(images: Tensor, level: int, draws: _Draws) -> Tensor:
    kept = (0.4, 0.3, 0.2, 0.1, 0.05)[level]
    mean = images.mean((2, 3), keepdim=True)
    return (images - mean) * kept + mean


def _elastic(images: Tensor, level: int, draws: _Draws) -> Tensor:
    alpha, sigma, affine = (
        *((2, 0.7, 0.1), (2, 0.08, 0.2), (0.05, 0.01, 0.02), (0.07, 0.01, 0.02)),
        (0.12, 0.01, 0.02),
    )[level]
    n, _, height, width = images.shape
    side = min(height, width) * 244 / SIDE
    # Three points of a square move by up to affine * side: in the unit of grids, half a side is 1.
    corners = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]]) / 3
    moved = corners + (2 * draws.uniform((3, 2), "affine") - 1) * 2 * affine * 244 / SIDE
    known = torch.cat([corners, torch.ones(3, 1)], 1)
    theta = torch.linalg.solve(known.expand(n, -1, -1), moved).transpose(1, 2)
    grid = functional.affine_grid(theta, list(images.shape), align_corners=False)
    if level:
        noise = 2 * draws.uniform((2, height, width), "field") - 1
        field = _gaussian(noise, max(0.3, sigma * side)) * alpha * side
        unit = torch.tensor([2 / width, 2 / height])
        grid = grid + field.permute(0, 2, 3, 1) * unit
    return functional.grid_sample(images, grid, padding_mode="reflection", align_corners=False)


def _pixelate(images: Tensor, level: int, draws: _Draws) -> Tensor:
    share = (0.6, 0.5, 0.4, 0.3, 0.25)[level]
    height, width = images.shape[2:]
    size = max(1, int(height * share)), max(1, int(width * share))
    small = functional.interpolate(images, size, mode="area")
    return functional.interpolate(small, (height, width), mode="nearest")


def _jpeg(images: Tensor, level: int, draws: _Draws) -> Tensor:
    quality = (25, 18, 15, 10, 7)[level]
    found = []
    for pixels in (255 * images).round().to(torch.uint8):
        shown = pixels[0] if len(pixels) == 1 else pixels.permute(1, 2, 0)
        file = io.BytesIO()
        Image.fromarray(shown.contiguous().numpy()).save(file, "JPEG", quality=quality)
        back = torch.from_numpy(np.array(Image.open(file, formats=["JPEG"])))
        found.append(back[None] if back.ndim == 2 else back.permute(2, 0, 1))
    return torch.stack(found).to(images.dtype) / 255


CORRUPTIONS: Final[Mapping[str, Callable[[Tensor, int, _Draws], Tensor]]] = {
    "gaussian noise": _gaussian_noise,
    "shot noise": _shot_noise,
    "impulse noise": _impulse_noise,
    "defocus blur": _defocus_blur,
    "glass blur": _glass_blur,
    "motion blur": _motion_blur,
    "zoom blur": _zoom_blur,
    "snow": _snow,
    "frost": _frost,
    "fog": _fog,
    "brightness": _brightness,
    "contrast": _contrast,
    "elastic transform": _elastic,
    "pixelate": _pixelate,
    "JPEG compression": _jpeg,
}
"""The families by name, in the order of ImageNet-C."""
