"""Where an attacker may act: a region is a float map in [0, 1] that broadcasts to the images.

In Linf a pixel may move by at most eps * region (the localized paper's epsilon matrix); in the other norms the region is
a 0/1 mask. Where it is 0 the pixel stays, bit for bit.
"""

import torch
from torch import Tensor

from demur.errors import DemurError


def inside_box(size: tuple[int, int], top: int, left: int, height: int, width: int) -> Tensor:
    """Region (1, 1, H, W) that is 1 inside the box and 0 elsewhere. `size` is (H, W).

    Raises: DemurError if the box does not lie in the image. A box of no height or width is an empty region.
    """
    rows, columns = size
    if min(top, left, height, width) < 0 or top + height > rows or left + width > columns:
        raise DemurError(f"a box of {height}x{width} at ({top}, {left}) does not lie in an image of {rows}x{columns}.")
    region = torch.zeros(1, 1, rows, columns)
    region[..., top : top + height, left : left + width] = 1
    return region


def centre_box(size: tuple[int, int], height: int, width: int) -> Tensor:
    """Region (1, 1, H, W) that is 1 in a box of that size in the middle of an image of `size` (H, W)."""
    rows, columns = size
    return inside_box(size, (rows - height) // 2, (columns - width) // 2, height, width)


def outside(region: Tensor) -> Tensor:
    """Give the complement of a region: 1 - region."""
    return 1 - region


def check_region(region: Tensor | None, images: Tensor) -> Tensor | None:
    """Broadcast a region to the images (N, C, H, W); None is everywhere.

    Raises: DemurError if it does not broadcast, or is not finite and in [0, 1].
    """
    if region is None:
        return None
    try:
        region = torch.as_tensor(region).to(images.device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DemurError(f"a region is a tensor that broadcasts to the images, not {type(region).__name__}.") from error
    if not region.is_floating_point():
        region = region.to(images.dtype)
    try:
        region = region.expand_as(images)
    except RuntimeError as error:
        raise DemurError(f"a region of shape {tuple(region.shape)} does not broadcast to images of shape {tuple(images.shape)}.") from error
    if not bool(((region >= 0) & (region <= 1)).all()):
        raise DemurError("a region must be finite and lie in [0, 1].")
    return region
