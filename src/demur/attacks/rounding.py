"""Attacked images as files hold them: 8 bits a channel."""

import torch
from torch import Tensor

LEAST = 2e-5
"""Of a level: what float32 cannot tell from nothing, at 1."""


def round_towards(images: Tensor, clean: Tensor) -> Tensor:
    """Round images (N, ...) in [0, 1] to uint8, each pixel towards the clean image's.

    Then a change can only shrink: what was within eps, inside a region and in [0, 1] still is (R1 on stored images), provided that
    the clean images are themselves 8-bit. Whether the attack survives the rounding is to be checked anew.
    """
    levels, start = images.double() * 255, (clean.double() * 255).round()
    # What lies at a level but for float32's rounding is at that level: else most of what was moved by eps would lose a whole one.
    towards = torch.where(images > clean, (levels + LEAST).floor(), (levels - LEAST).ceil())
    return torch.where(images == clean, start, towards).clamp(0, 255).to(torch.uint8)
