"""Morphs: images between two classes (McCoyd & Wagner 2018, section VII.B)."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from demur.data.images import ImageSet
from demur.errors import DemurError
from demur.seeds import generator

GREY_LEVELS = 16
"""Level sets of an image that a morph interpolates."""

_AT_ONCE = 64


def check_number(n: int) -> None:
    """Raise DemurError unless at least one image is asked for."""
    if n < 1:
        raise DemurError(f"cannot make {n} background images; make at least 1.")


def morph(
    images: ImageSet, n: int, fraction: float, seed: int = 0, pairs: Tensor | None = None
) -> Tensor:
    """Change images a part of the way into images of another class.

    The shape at each of 16 grey levels moves: the signed squared distances to its edge are
    interpolated, and cut where the area is the interpolated area (McCoyd & Wagner 2018, section
    VII.B, which leaves the algorithm open). Distances are squared because the sum of plain
    distances would jump from one stroke to the other if the strokes do not overlap. The area sets
    the cut because such strokes would vanish at distance 0. At fraction 0 and 1 the result is one
    of the two images, up to the width of a grey level. Colour channels are morphed separately.

    Parameters
    ----------
    images : ImageSet
        Images of at least two classes.
    n : int
        Number of images to make, at least 1.
    fraction : float
        Fraction of the way, in [0, 1].
    seed : int, default=0
        Seed of the pairs.
    pairs : Tensor, optional
        Indices (n, 2) of the images to morph. Default: random pairs of different classes.

    Returns
    -------
    Tensor
        uint8 images (n, C, H, W).

    Raises
    ------
    DemurError
        For a fraction outside [0, 1], pairs of another shape, or images of one class only.

    Examples
    --------
    >>> from demur import data
    >>> morph(data.load("digits", "test"), 5, fraction=0.5).shape
    torch.Size([5, 1, 28, 28])
    """
    if not 0 <= fraction <= 1:
        raise DemurError(f"the fraction of a morph lies in [0, 1], got {fraction:g}.")
    check_number(n)
    pairs = _pairs(images.labels, n, seed) if pairs is None else pairs
    if pairs.shape != (n, 2):
        raise DemurError(f"pairs must have shape ({n}, 2), got {tuple(pairs.shape)}.")
    first, second = (images.subset(column).images.numpy() for column in pairs.unbind(1))
    chunks = [slice(start, start + _AT_ONCE) for start in range(0, n, _AT_ONCE)]
    morphs = [_morph(first[chunk], second[chunk], fraction) for chunk in chunks]
    return torch.from_numpy(np.concatenate(morphs))


def _pairs(labels: Tensor, n: int, seed: int) -> Tensor:
    """Draw indices (n, 2) of images of different classes."""
    draw = generator(seed, "pairs")
    first = torch.randint(len(labels), (n,), generator=draw)
    counts = torch.bincount(labels)
    others = len(labels) - counts[labels[first]]
    if int(others.min()) == 0:
        raise DemurError("a morph needs images of two different classes, but all are of one.")
    # Sort the images by class; draw among those before and after the class of the first.
    by_class = labels.argsort(stable=True)
    starts = counts.cumsum(0) - counts
    drawn = (torch.rand(n, generator=draw, dtype=torch.float64) * others).long()
    drawn += torch.where(drawn >= starts[labels[first]], counts[labels[first]], 0)
    return torch.stack([first, by_class[drawn]], dim=1)


def _morph(
    first: NDArray[np.uint8], second: NDArray[np.uint8], fraction: float
) -> NDArray[np.uint8]:
    """Morph images (n, C, H, W) by the level sets between their darkest and brightest pixel."""

    def between(
        start: NDArray[np.float64 | np.int64], end: NDArray[np.float64 | np.int64]
    ) -> NDArray[np.float64]:
        mixed: NDArray[np.float64] = (1 - fraction) * start + fraction * end
        return mixed

    low, high, distance, area = _level_sets(first)
    other_low, other_high, other_distance, other_area = _level_sets(second)
    mixed = between(distance, other_distance).reshape(*area.shape, -1)
    pixels = np.rint(between(area, other_area)).astype(np.int64)[..., None]
    ranked = np.sort(mixed, axis=-1)[..., ::-1]
    inside = np.take_along_axis(ranked, np.maximum(pixels - 1, 0), axis=-1)
    outside = np.take_along_axis(ranked, np.minimum(pixels, ranked.shape[-1] - 1), axis=-1)
    filled = (mixed - (inside + outside) / 2 + 0.5).clip(0, 1)  # with a soft edge
    grey = filled.mean(axis=0).reshape(first.shape)
    darkest = between(low, other_low)
    brightest = between(high, other_high)
    morphed: NDArray[np.uint8] = np.rint(darkest + (brightest - darkest) * grey).astype(np.uint8)
    return morphed


def _level_sets(
    images: NDArray[np.uint8],
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]:
    """Return the extreme pixels (n, C, 1, 1), and the level sets between them.

    A level set is given by the signed squared distances (levels, n, C, H, W) to its edge, positive
    inside, and by its area (levels, n, C).
    """
    from scipy.ndimage import distance_transform_edt

    low = images.min(axis=(2, 3), keepdims=True).astype(np.float64)
    high = images.max(axis=(2, 3), keepdims=True).astype(np.float64)
    levels = (np.arange(GREY_LEVELS) + 0.5).reshape(-1, 1, 1, 1, 1) / GREY_LEVELS
    inside = images > low + levels * (high - low)
    # One transform of all level sets, stacked too far apart to influence each other.
    stack = inside.reshape(-1, *images.shape[2:])
    apart = (1e6, 1, 1)
    within = distance_transform_edt(stack, sampling=apart)
    signed = within - distance_transform_edt(~stack, sampling=apart)
    # An image of one colour has no edge: bound its distances.
    reach = sum(images.shape[2:]) ** 2
    squared = (signed * abs(signed)).clip(-reach, reach).reshape(inside.shape)
    return low, high, squared, inside.sum(axis=(3, 4))
