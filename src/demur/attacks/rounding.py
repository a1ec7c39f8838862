"""Attacked images as files hold them: 8 bits a channel."""

import torch
from torch import Tensor


def round_towards(images: Tensor, clean: Tensor) -> Tensor:
    """Round images (N, ...) in [0, 1] to uint8, each pixel towards the clean image's.

    Then a change can only shrink: what was within eps, inside a region and in [0, 1] still is (R1 on stored images), provided that
    the clean images are themselves 8-bit. Whether the attack survives the rounding is to be checked anew.
    """
    levels, start = images.double() * 255, (clean.double() * 255).round()
    towards = torch.where(images > clean, levels.floor(), levels.ceil())
    return torch.where(images == clean, start, towards).clamp(0, 255).to(torch.uint8)
