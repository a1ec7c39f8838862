"""Pictures as files: what an attack made of a photograph, and the three of the smoothing paper's figures side by side."""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from demur.errors import DemurError
from demur.writing import replacing

AMPLIFIED = 10
GAP = 8
SOFTWARE = "demur"
"""What a picture of demur names as its program."""


def save_picture(pixels: Tensor, path: Path) -> Tensor:
    """Write uint8 pixels (3, H, W) as a PNG file, whole or not at all; give the pixels that the file holds, read again.

    Raises: DemurError for an ending that is not .png, since other formats would change the pixels, or a place that cannot be written.
    """
    if path.suffix.lower() != ".png":
        raise DemurError(f"{path} must end in .png: other formats would change the pixels.")
    _save(_array(pixels), path)
    with Image.open(path, formats=["PNG"]) as stored:
        return torch.from_numpy(np.asarray(stored.convert("RGB")).copy()).permute(2, 0, 1)


def save_triple(original: Tensor, attacked: Tensor, path: Path) -> None:
    """Write the original, the attacked (C, H, W), uint8, and their difference, amplified ten times around mid-grey, side by side (Figs. 1 to 3)."""
    before, after = _array(original), _array(attacked)
    difference = np.clip(128 + AMPLIFIED * (after.astype(np.int16) - before), 0, 255).astype(
        np.uint8
    )
    gap = np.full((before.shape[0], GAP, 3), 255, dtype=np.uint8)
    _save(np.concatenate([before, gap, after, gap, difference], axis=1), path)


def _array(pixels: Tensor) -> NDArray[np.uint8]:
    return np.ascontiguousarray(pixels.expand(3, -1, -1).permute(1, 2, 0).numpy())


def _save(pixels: NDArray[np.uint8], path: Path) -> None:
    with replacing(path) as partial:
        about = PngInfo()
        about.add_text("Software", SOFTWARE)
        Image.fromarray(pixels).save(partial, "PNG", pnginfo=about)


def is_own(path: Path) -> bool:
    """Say whether demur wrote a picture: only such a picture is replaced without being named."""
    try:
        with Image.open(path, formats=["PNG"]) as stored:
            return bool(stored.info.get("Software") == SOFTWARE)
    except (OSError, ValueError, SyntaxError):
        return False
