"""Attacked images as files store them: 8 bits a channel."""

import torch
from torch import Tensor

from demur.norms import TOLERANCE

LEAST = 2e-5
"""Share of a level that float32 cannot tell from nothing, at 1."""


def quantize_towards(images: Tensor, clean: Tensor, eps: float | Tensor | None = None) -> Tensor:
    """Round images to 8 bits, each pixel towards the clean pixel.

    What was inside a mask and in [0, 1] stays so (R1 on stored images), if the clean images are
    8-bit images. A change shrinks, except that a pixel within float32 rounding of a level is taken
    to be at that level: a change of 8 / 255 keeps all 8 levels. Where the eps of Linf is so little
    below a whole level, give it. Whether the attack survives the rounding must be checked anew.

    Parameters
    ----------
    images, clean : Tensor of shape (N, ...), float in [0, 1]
    eps : float or Tensor that broadcasts to the images, optional
        The most that a stored pixel may differ from the clean one, up to the tolerance of R1.

    Returns
    -------
    Tensor of shape (N, ...), uint8

    Examples
    --------
    >>> import torch
    >>> from demur.attacks import quantize_towards
    >>> clean = torch.tensor([[100 / 255]])
    >>> quantize_towards(clean + 1.9 / 255, clean).item()
    101
    """
    levels = images.double() * 255
    start = (clean.double() * 255).round()
    # A pixel within float32 rounding of a level is at that level. Otherwise most pixels that moved
    # by exactly eps would lose a whole level.
    towards = torch.where(images > clean, (levels + LEAST).floor(), (levels - LEAST).ceil())
    stored = torch.where(images == clean, start, towards)
    if eps is not None:
        most = torch.as_tensor(eps, dtype=torch.float64, device=images.device)
        most = (255 * most * (1 + TOLERANCE)).floor()
        stored = torch.clamp(stored, start - most, start + most)
    return stored.clamp(0, 255).to(torch.uint8)
