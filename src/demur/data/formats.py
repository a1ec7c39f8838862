"""Readers of npz archives and of folders of images.

The files may come from an untrusted source: nothing is unpickled, and all content is checked.
"""

import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from numpy.lib.npyio import NpzFile
from numpy.typing import NDArray
from torch import Tensor

from demur.data.decoding import image_files, read_image
from demur.data.images import ImageSet
from demur.errors import DemurError

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
    try:
        opened = np.load(path, allow_pickle=False)
        if not isinstance(opened, NpzFile):
            raise DemurError(
                "it holds a single array, not an npz archive; "
                "save it with numpy.savez(images=..., labels=...)."
            )
        with opened as archive:
            prefix = _prefix(archive, split)
            images = _uint8_images(_array(archive, f"{prefix}images"))
            labels = _int64_labels(_array(archive, f"{prefix}labels"))
            return ImageSet(images, labels, class_names or _class_names(archive), path.stem)
    except DemurError as error:
        raise type(error)(f"{path}: {error}") from error
    except (
        zipfile.BadZipFile,
        zlib.error,
        ValueError,
        EOFError,
        OSError,
        MemoryError,
        RuntimeError,
    ) as error:
        raise DemurError(
            f"{path} is not a complete npz archive (truncated, damaged or of another format). "
            "Replace the file."
        ) from error


def _prefix(archive: NpzFile, split: str) -> str:
    """Return the prefix of the names of the split's arrays."""
    has_splits = "train_images" in archive.files or "test_images" in archive.files
    has_any = any(name.startswith(f"{split}_") for name in archive.files)
    if split != "train" and not has_any and (has_splits or "images" in archive.files):
        raise no_split("it", split)
    return f"{split}_" if has_splits else ""


def _class_names(archive: NpzFile) -> tuple[str, ...]:
    if "class_names" in archive.files:
        return tuple(map(str, _array(archive, "class_names").astype(str).flatten()))
    # Both splits share one numbering, although one of them may lack the last classes.
    names = [name for name in ("labels", "train_labels", "test_labels") if name in archive.files]
    largest = max(int(_int64_labels(_array(archive, name)).max()) for name in names)
    return tuple(map(str, range(largest + 1)))


def _array(archive: NpzFile, name: str) -> _Array:
    if name not in archive.files:
        raise DemurError(
            f"it has no array {name!r}, only {', '.join(sorted(archive.files)) or 'nothing'}; "
            "it needs images and labels, or train_images, train_labels, test_images and "
            "test_labels."
        )
    try:
        array = archive[name]
    except ValueError as error:
        if "Object arrays" not in str(error):
            raise
        raise DemurError(
            f"its array {name!r} holds Python objects, which can run code when they are read. "
            "Save numbers only."
        ) from error
    if not isinstance(array, np.ndarray):
        raise DemurError(f"its member {name!r} is not an array.")
    return array


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
        if not np.isfinite(pixels).all():
            raise DemurError("its images contain NaN or infinite pixels.")
        low = float(pixels.min())
        high = float(pixels.max())
        if low < 0 or high > 1:
            raise DemurError(
                f"its float images must lie in [0, 1], but reach from {low:g} to {high:g}."
            )
        pixels = np.rint(pixels.astype(np.float32, copy=False) * np.float32(255)).astype(np.uint8)
    if pixels.dtype != np.uint8:
        raise DemurError(f"its images are {pixels.dtype}; they must be uint8, or floats in [0, 1].")
    return torch.from_numpy(np.ascontiguousarray(pixels))


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
    pixels: list[NDArray[np.uint8]] = []
    labels: list[int] = []
    first: Path | None = None
    for label, folder in enumerate(classes):
        files, _ = image_files(folder)
        if not files:
            raise DemurError(
                f"{folder} has no images; each subfolder of {path} is a class and needs some."
            )
        first = first or files[0]
        for file in files:
            pixels.append(read_image(file))
            if pixels[-1].shape[:2] != pixels[0].shape[:2]:
                sizes = [f"{image.shape[1]}x{image.shape[0]}" for image in (pixels[0], pixels[-1])]
                raise DemurError(
                    f"images differ in size: {first} is {sizes[0]}, {file} is {sizes[1]}. "
                    "Bring them to one size."
                )
        labels += [label] * len(files)
    if len(classes) < 2:
        raise DemurError(f"{path} has {len(classes)} subfolders; it needs one for each class.")
    names = tuple(folder.name for folder in classes)
    return ImageSet(_stacked(pixels), torch.tensor(labels), names, path.resolve().name)


def _stacked(pixels: list[NDArray[np.uint8]]) -> Tensor:
    """Stack grey (H, W) and coloured (H, W, 3) images to (N, C, H, W)."""
    if all(image.ndim == 2 for image in pixels):
        return torch.from_numpy(np.stack(pixels)[:, None])
    coloured = [image if image.ndim == 3 else image[:, :, None].repeat(3, 2) for image in pixels]
    return torch.from_numpy(np.ascontiguousarray(np.stack(coloured).transpose(0, 3, 1, 2)))
