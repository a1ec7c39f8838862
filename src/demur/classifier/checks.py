"""Checks of images and labels at every public boundary."""

import math
import operator

import torch
from torch import Tensor

from demur.errors import DemurError

INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def check_images(images: Tensor) -> None:
    """Raise DemurError unless images are a non-empty float (N, ...) tensor in [0, 1]."""
    if not isinstance(images, Tensor) or not images.is_floating_point():
        kind = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise DemurError(
            f"images must be a float tensor in [0, 1], not {kind}; divide uint8 images by 255."
        )
    if images.ndim < 2 or images.ndim == 3:
        single = "; a single image is images[None]" if images.ndim == 3 else ""
        raise DemurError(
            "images must have shape (N, C, H, W), or (N, F) for vectors, "
            f"not {tuple(images.shape)}{single}."
        )
    if images.numel() == 0:
        raise DemurError(f"there are no pixels: the images have shape {tuple(images.shape)}.")
    low, high = torch.stack(torch.aminmax(images.detach())).tolist()
    if not math.isfinite(low + high):
        raise DemurError("images contain NaN or infinite pixels.")
    if low < 0 or high > 1:
        raise DemurError(
            f"images must lie in [0, 1], but reach from {low:g} to {high:g}; "
            "normalisation belongs inside the network."
        )


def check_labels(labels: Tensor, count: int, num_classes: int) -> None:
    """Raise DemurError unless labels are (count,) integers in 0..num_classes-1."""
    if not isinstance(labels, Tensor) or labels.dtype not in INTEGERS:
        kind = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise DemurError(f"labels must be an integer tensor such as int64, not {kind}.")
    if labels.shape != (count,):
        raise DemurError(
            f"labels must have shape ({count},), one for each image, not {tuple(labels.shape)}."
        )
    if count and not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
        raise DemurError(
            f"labels must lie in 0..{num_classes - 1}, but reach from {int(labels.min())} to "
            f"{int(labels.max())}."
        )


def check_counts(least: int = 1, /, **counts: int) -> None:
    """Raise DemurError unless each value is an integer of at least `least`."""
    for name, value in counts.items():
        try:
            number = operator.index(value)
        except TypeError:
            raise DemurError(f"{name} must be an integer, not {value!r}.") from None
        if isinstance(value, bool):
            raise DemurError(f"{name} must be an integer, not {value}.")
        if number < least:
            raise DemurError(f"{name} must be at least {least}, not {value}.")
