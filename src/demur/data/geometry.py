"""Images of any size brought to the size that a model takes, as torchvision does it with Pillow."""

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from demur.classifier import Preprocess
from demur.data.messages import printable
from demur.errors import DemurError

_FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}

LARGEST = 178_956_970
"""Pixels of a resized image. Pillow refuses to read images with more."""


def fit_pixels(
    pixels: NDArray[np.uint8], preprocess: Preprocess, subject: object
) -> NDArray[np.uint8]:
    """Convert the channels of an image, resize it and crop its centre.

    The result has the same bits as torchvision's `Resize` and `CenterCrop` of a Pillow image.
    Coloured images become grey by their luminance (ITU-R 601); grey ones get three equal channels.

    Parameters
    ----------
    pixels : ndarray
        uint8 pixels (H, W) or (H, W, 3).
    preprocess : Preprocess
        Its mean and std are not applied.
    subject : object
        What the image is called in messages.

    Returns
    -------
    ndarray
        uint8 pixels (C, H, W).

    Raises
    ------
    DemurError
        If the image is so narrow that the resized one would not fit into memory.

    Examples
    --------
    >>> pixels = np.zeros((100, 200), np.uint8)
    >>> fit_pixels(pixels, Preprocess(size=(32, 32), resize=36), "black.png").shape
    (3, 32, 32)
    """
    image = Image.fromarray(pixels).convert("RGB" if preprocess.channels == 3 else "L")
    if preprocess.size is not None:
        image = _resized(image, preprocess.size, preprocess, subject)
    fitted = np.asarray(image)
    return fitted[None] if fitted.ndim == 2 else fitted.transpose(2, 0, 1)


def _resized(
    image: Image.Image, size: tuple[int, int], preprocess: Preprocess, subject: object
) -> Image.Image:
    height, width = size
    resampling = _FILTERS[preprocess.interpolation]
    if preprocess.resize is None:
        return image.resize((width, height), resampling)
    shorter, longer = sorted(image.size)
    length = int(preprocess.resize * longer / shorter)  # rounded down, as in torchvision
    if preprocess.resize * length > LARGEST:
        raise DemurError(
            f"{printable(subject)} has {image.width}x{image.height} pixels: resized to "
            f"{preprocess.resize} pixels of its shorter side, it would have too many. Remove it."
        )
    wide = image.width > image.height
    columns, rows = (length, preprocess.resize) if wide else (preprocess.resize, length)
    image = image.resize((columns, rows), resampling)
    left = round((columns - width) / 2)  # half to even, as in torchvision
    top = round((rows - height) / 2)
    return image.crop((left, top, left + width, top + height))


def geometry_text(preprocess: Preprocess) -> str:
    """Write what `fit_pixels` depends on, for a fingerprint.

    Examples
    --------
    >>> geometry_text(Preprocess(size=(224, 224), resize=256))
    'size (224, 224), resize 256, bilinear, 3 channels'
    """
    return (
        f"size {preprocess.size}, resize {preprocess.resize}, {preprocess.interpolation}, "
        f"{preprocess.channels} channels"
    )
