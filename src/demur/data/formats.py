"""Readers of npz archives and of folders of images.

The files may come from an untrusted source: nothing is unpickled, and all content is checked.
"""

from math import prod
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from demur.data.archives import Archive, open_archive
from demur.data.decoding import image_files, read_image
from demur.data.images import ImageSet
from demur.data.listing import check_names
from demur.data.messages import printable
from demur.errors import DemurError
from demur.untrusted import ARRAYS, check_limit

MOST_CLASSES = 100_000
"""Bound of a label. No data set has more classes: a larger label is a sign of a damaged file."""

_Array = NDArray[np.generic]


class NoSplitError(DemurError):
    """Raised for a data set that is in one piece and has no such split.

    Examples
    --------
    >>> raise no_split("pets.npz", "test")
    Traceback (most recent call last):
    demur.data.formats.NoSplitError: pets.npz has no test split. Load all of it with ...
    """


def no_split(subject: str, split: str) -> NoSplitError:
    """Make the error for a data set without that split."""
    return NoSplitError(
        f"{subject} has no {split} split. "
        "Load all of it with split='train' and use .split(fraction, seed)."
    )


def read_npz(path: Path, split: str = "train", class_names: tuple[str, ...] = ()) -> ImageSet:
    """Read an image set from an npz archive.

    The archive holds the arrays `images` and `labels`, or `train_images`, `train_labels`,
    `test_images` and `test_labels`. Images are (N, H, W), (N, H, W, C) or (N, C, H, W) with 1 or 3
    channels, uint8, or floating point in [0, 1], which is rounded to 8 bits. Labels are integers
    from 0. An array `class_names` is optional.

    Parameters
    ----------
    path : Path
        The archive.
    split : {"train", "test"}, default="train"
        Part to read. An archive without splits is all "train".
    class_names : tuple of str, optional
        Names of the classes. Default: those of the archive, else the numbers.

    Returns
    -------
    ImageSet
        The images; its name is that of the file without the ending.

    Raises
    ------
    DemurError
        For anything else, with the name of the file.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder, "own.npz")
    ...     np.savez(path, images=np.zeros((2, 8, 8), np.uint8), labels=np.array([0, 1]))
    ...     read_npz(path)
    ImageSet('own': 2 images of 1x8x8, 2 classes)
    """
    if not path.is_file():
        raise DemurError(f"there is no file {path}.")
    with open_archive(path) as archive:
        prefix = _prefix(archive, split)
        images = _uint8_images(archive.read(f"{prefix}images"))
        labels = _int64_labels(archive.read(f"{prefix}labels"))
        return ImageSet(images, labels, class_names or _class_names(archive), path.stem)


def _prefix(archive: Archive, split: str) -> str:
    """Return the prefix of the names of the split's arrays."""
    has_splits = "train_images" in archive.names or "test_images" in archive.names
    has_any = any(name.startswith(f"{split}_") for name in archive.names)
    if split != "train" and not has_any and (has_splits or "images" in archive.names):
        raise no_split("it", split)
    return f"{split}_" if has_splits else ""


def _class_names(archive: Archive) -> tuple[str, ...]:
    if "class_names" in archive.names:
        names = archive.read("class_names")
        if names.size > MOST_CLASSES or names.dtype.kind not in "USiu":
            raise DemurError("its class_names are no list of names.")
        texts = tuple(map(str, names.astype(str).flatten()))
        if any("\ud800" <= letter <= "\udfff" for text in texts for letter in text):
            raise DemurError("its class_names are damaged: they hold half a character.")
        return texts
    # Both splits share one numbering, although one of them may lack the last classes.
    known = [name for name in ("labels", "train_labels", "test_labels") if name in archive.names]
    largest = max(int(_int64_labels(archive.read(name)).max()) for name in known)
    return tuple(map(str, range(largest + 1)))


def _uint8_images(pixels: _Array) -> Tensor:
    shape = pixels.shape
    if pixels.ndim not in (3, 4):
        raise DemurError(
            f"its images have shape {shape}; they must be (N, H, W), (N, H, W, C) or (N, C, H, W)."
        )
    if pixels.size == 0:
        raise DemurError(f"it has no images: their shape is {shape}.")
    if pixels.ndim == 3:
        pixels = pixels[:, None]
    elif shape[1] not in (1, 3):
        if shape[3] not in (1, 3):
            raise DemurError(
                f"its images have shape {shape}: "
                "neither the second nor the last dimension is 1 or 3 channels."
            )
        pixels = pixels.transpose(0, 3, 1, 2)
    if pixels.dtype.kind == "f":
        return torch.from_numpy(_rounded(pixels))
    if pixels.dtype != np.uint8:
        raise DemurError(f"its images are {pixels.dtype}; they must be uint8, or floats in [0, 1].")
    return torch.from_numpy(np.ascontiguousarray(pixels))


def _rounded(pixels: _Array) -> NDArray[np.uint8]:
    """Round floats in [0, 1] to 8 bits, a few images at a time: each step makes a copy."""
    rounded = np.empty(pixels.shape, np.uint8)
    each = max(1, (1 << 24) // max(1, pixels[0].nbytes))
    for start in range(0, len(pixels), each):
        part = pixels[start : start + each]
        if not np.isfinite(part).all():
            raise DemurError("its images contain NaN or infinite pixels.")
        low = float(part.min())
        high = float(part.max())
        if low < 0 or high > 1:
            raise DemurError(
                f"its float images must lie in [0, 1], but reach from {low:g} to {high:g}."
            )
        scaled = np.rint(part.astype(np.float32, copy=False) * np.float32(255))
        rounded[start : start + each] = scaled.astype(np.uint8)
    return rounded


def _int64_labels(labels: _Array) -> Tensor:
    if labels.dtype.kind not in "iu":
        raise DemurError(f"its labels are {labels.dtype}; they must be integers.")
    if labels.size == 0:
        raise DemurError("it has no labels.")
    low = int(labels.min())
    high = int(labels.max())
    if low < 0 or high >= MOST_CLASSES:
        raise DemurError(
            f"its labels are out of range: they reach from {low} to {high}, "
            f"but must be class numbers in 0..{MOST_CLASSES - 1}."
        )
    if low == high:
        raise DemurError(f"it has images of one class only, {low}; a classifier needs at least 2.")
    return torch.from_numpy(labels.astype(np.int64))


def read_folder(path: Path, split: str = "train") -> ImageSet:
    """Read an image set from a folder with one subfolder of images for each class.

    The classes are the subfolders in alphabetical order. Images are converted to 8 bits, grey if
    all are grey, else RGB: 16-bit images are scaled, palettes are looked up, transparent pixels are
    laid on white, and the orientation that a camera recorded is applied. Files whose ending is not
    that of an image are ignored.

    Parameters
    ----------
    path : Path
        The folder.
    split : {"train", "test"}, default="train"
        Only "train", which is the whole folder.

    Returns
    -------
    ImageSet
        The images; its name is that of the folder.

    Raises
    ------
    DemurError
        For images of different sizes, an unreadable image, a class without images, fewer than 2
        classes, or another split.

    Examples
    --------
    >>> import tempfile
    >>> from PIL import Image
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     for name in ("cat", "dog"):
    ...         Path(folder, name).mkdir()
    ...         Image.new("L", (8, 8)).save(Path(folder, name, "1.png"))
    ...     read_folder(Path(folder)).class_names
    ('cat', 'dog')
    """
    if split != "train":
        raise no_split(str(path), split)
    classes = sorted(
        folder for folder in path.iterdir() if folder.is_dir() and not folder.name.startswith(".")
    )
    check_names(classes)
    files: list[Path] = []
    labels: list[int] = []
    for label, folder in enumerate(classes):
        found, _ = image_files(folder)
        if not found:
            raise DemurError(
                f"{folder} has no images; each subfolder of {path} is a class and needs some."
            )
        files += found
        labels += [label] * len(found)
    if len(classes) < 2:
        raise DemurError(f"{path} has {len(classes)} subfolders; it needs one for each class.")
    names = tuple(folder.name for folder in classes)
    pixels = _read_all(files, path)
    return ImageSet(pixels, torch.tensor(labels), names, printable(path.resolve().name))


def _read_all(files: list[Path], folder: Path) -> Tensor:
    pixels: list[NDArray[np.uint8]] = []
    for file in files:
        pixels.append(read_image(file))
        size = pixels[-1].shape[:2]
        if size != pixels[0].shape[:2]:
            sizes = [f"{image.shape[1]}x{image.shape[0]}" for image in (pixels[0], pixels[-1])]
            raise DemurError(
                f"images differ in size: {files[0]} is {sizes[0]}, {file} is {sizes[1]}. "
                "Bring them to one size."
            )
        if len(pixels) == 1:
            check_limit(printable(folder), len(files) * prod(size), ARRAYS, "pixels")
    return _stacked(pixels)


def _stacked(pixels: list[NDArray[np.uint8]]) -> Tensor:
    """Stack grey (H, W) and coloured (H, W, 3) images to (N, C, H, W)."""
    if all(image.ndim == 2 for image in pixels):
        return torch.from_numpy(np.stack(pixels)[:, None])
    coloured = [image if image.ndim == 3 else image[:, :, None].repeat(3, 2) for image in pixels]
    return torch.from_numpy(np.ascontiguousarray(np.stack(coloured).transpose(0, 3, 1, 2)))
