"""Readers of files that anyone may have made: npz archives and folders of images, checked before they are believed."""

import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from numpy.lib.npyio import NpzFile
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from demur.data.images import ImageSet
from demur.errors import DemurError

MOST_CLASSES = 100_000  # more than any data set has: a label beyond is a damaged file, not a class
GREY_MODES = ("1", "L", "LA", "I", "I;16", "I;16B", "I;16L", "I;16N")

Array = NDArray[np.generic]


class NoSplitError(DemurError):
    """A set that is whole, but has no such split: all of it is in the other one."""


def read_npz(path: Path, split: str = "train", class_names: tuple[str, ...] = ()) -> ImageSet:
    """Read an image set from an npz archive: `images` and `labels`, or `train_images`, `train_labels`, ...

    Images are (N, H, W), (N, H, W, C) or (N, C, H, W) with 1 or 3 channels, uint8, or floats in [0, 1] (which are
    rounded to uint8); labels are integers from 0. Names of the classes are `class_names`, else the archive's array of
    that name, else the numbers. Nothing in the file is ever unpickled.

    Raises: DemurError, naming the file, for anything else.
    """
    if not path.is_file():
        raise DemurError(f"there is no file {path}.")
    try:
        opened = np.load(path, allow_pickle=False)
        if not isinstance(opened, NpzFile):
            raise DemurError("it holds a single array, not an npz archive; save it with numpy.savez(images=..., labels=...).")
        with opened as archive:
            prefix = _prefix(archive, split)
            images = _uint8_images(_array(archive, f"{prefix}images"))
            labels = _int64_labels(_array(archive, f"{prefix}labels"))
            return ImageSet(images, labels, class_names or _class_names(archive), path.stem)
    except DemurError as error:
        raise type(error)(f"{path}: {error}") from error
    except (zipfile.BadZipFile, zlib.error, ValueError, EOFError, OSError, MemoryError, RuntimeError) as error:
        raise DemurError(f"{path} is not a whole npz archive (truncated, damaged or of another format). Get it again.") from error


def _prefix(archive: NpzFile, split: str) -> str:
    """What stands before `images` and `labels` in the names of the split's arrays."""
    has_splits = "train_images" in archive.files or "test_images" in archive.files
    has_any = any(name.startswith(f"{split}_") for name in archive.files)
    if split != "train" and not has_any and (has_splits or "images" in archive.files):
        raise no_split("it", split)
    return f"{split}_" if has_splits else ""


def _class_names(archive: NpzFile) -> tuple[str, ...]:
    if "class_names" in archive.files:
        return tuple(map(str, _array(archive, "class_names").astype(str).flatten()))
    # one numbering for both splits, though one of them may lack the last classes
    names = [name for name in ("labels", "train_labels", "test_labels") if name in archive.files]
    largest = max(int(_int64_labels(_array(archive, name)).max()) for name in names)
    return tuple(map(str, range(largest + 1)))


def _array(archive: NpzFile, name: str) -> Array:
    if name not in archive.files:
        raise DemurError(
            f"it has no array {name!r}, only {', '.join(sorted(archive.files)) or 'nothing'}; "
            "wanted are images and labels, or train_images, train_labels, test_images and test_labels."
        )
    try:
        array = archive[name]
    except ValueError as error:
        if "Object arrays" not in str(error):
            raise
        raise DemurError(f"its array {name!r} holds Python objects, which can run code when read. Save plain numbers.") from error
    if not isinstance(array, np.ndarray):
        raise DemurError(f"its member {name!r} is not an array.")
    return array


def _uint8_images(pixels: Array) -> Tensor:
    if pixels.ndim not in (3, 4):
        raise DemurError(f"its images have shape {pixels.shape}; they must be (N, H, W), (N, H, W, C) or (N, C, H, W).")
    if pixels.size == 0:
        raise DemurError(f"it has no images: their shape is {pixels.shape}.")
    if pixels.ndim == 3:
        pixels = pixels[:, None]
    elif pixels.shape[1] not in (1, 3):
        if pixels.shape[3] not in (1, 3):
            raise DemurError(f"its images have shape {pixels.shape}: neither the second nor the last dimension is 1 or 3 channels.")
        pixels = pixels.transpose(0, 3, 1, 2)
    if pixels.dtype.kind == "f":
        if not np.isfinite(pixels).all():
            raise DemurError("its images contain NaN or infinite pixels.")
        low, high = float(pixels.min()), float(pixels.max())
        if low < 0 or high > 1:
            raise DemurError(f"its float images must lie in [0, 1], but reach from {low:g} to {high:g}.")
        pixels = np.rint(pixels.astype(np.float32, copy=False) * np.float32(255)).astype(np.uint8)
    if pixels.dtype != np.uint8:
        raise DemurError(f"its images are {pixels.dtype}; they must be uint8, or floats in [0, 1].")
    return torch.from_numpy(np.ascontiguousarray(pixels))


def _int64_labels(labels: Array) -> Tensor:
    if labels.dtype.kind not in "iu":
        raise DemurError(f"its labels are {labels.dtype}; they must be integers.")
    if labels.size == 0:
        raise DemurError("it has no labels.")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= MOST_CLASSES:
        raise DemurError(f"its labels are out of range: they reach from {low} to {high}, and must be numbers of classes, from 0.")
    if low == high:
        raise DemurError(f"it has images of one class only, {low}; a classifier needs at least 2.")
    return torch.from_numpy(labels.astype(np.int64))


def read_folder(path: Path, split: str = "train") -> ImageSet:
    """Read an image set from a folder with one subfolder of images for each class, in the order of their names.

    Images are brought to 8 bits a channel: grey if all are, else RGB. 16-bit images are scaled, palettes looked up,
    transparent pixels laid on white, and cameras' orientation marks obeyed. Files that are not images by their ending
    are passed over.

    Raises: DemurError for images of different sizes (naming two), an unreadable one, a class without any, or a split
        other than "train", which is the whole folder.
    """
    if split != "train":
        raise no_split(str(path), split)
    endings = {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    classes = sorted(folder for folder in path.iterdir() if folder.is_dir() and not folder.name.startswith("."))
    pixels: list[NDArray[np.uint8]] = []
    labels: list[int] = []
    first: Path | None = None
    for label, folder in enumerate(classes):
        files = sorted(file for file in folder.iterdir() if file.suffix.lower() in endings and not file.name.startswith("."))
        if not files:
            raise DemurError(f"{folder} has no images; each subfolder of {path} is a class and needs some.")
        first = first or files[0]
        for file in files:
            pixels.append(read_image(file))
            if pixels[-1].shape[:2] != pixels[0].shape[:2]:
                sizes = [f"{image.shape[1]}x{image.shape[0]}" for image in (pixels[0], pixels[-1])]
                raise DemurError(f"images differ in size: {first} is {sizes[0]}, {file} is {sizes[1]}. Bring them to one size.")
        labels += [label] * len(files)
    if len(classes) < 2:
        raise DemurError(f"{path} has {len(classes)} subfolders; one for each class is wanted, and at least 2.")
    if any(image.ndim == 3 for image in pixels):
        images = np.stack([image if image.ndim == 3 else image[:, :, None].repeat(3, 2) for image in pixels]).transpose(0, 3, 1, 2)
    else:
        images = np.stack(pixels)[:, None]
    names = tuple(folder.name for folder in classes)
    return ImageSet(torch.from_numpy(np.ascontiguousarray(images)), torch.tensor(labels), names, path.resolve().name)


def read_image(file: Path) -> NDArray[np.uint8]:
    """The pixels (H, W) of a grey image, or (H, W, 3) of a coloured one."""
    try:
        with Image.open(file) as opened:
            image = ImageOps.exif_transpose(opened)
            grey = image.mode in GREY_MODES
            if image.mode.startswith("I"):  # 16 bits; Pillow's own conversion would clip them at 255
                return np.rint(np.asarray(image, dtype=np.float64).clip(0, 65535) / 257).astype(np.uint8)
            if image.mode == "F":
                raise DemurError(f"{file} has floating-point pixels, whose range is not known. Save it with 8 or 16 bits.")
            if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            elif image.mode == "P":
                grey = all(red == green == blue for red, green, blue in _palette(image))
            return np.asarray(image.convert("L" if grey else "RGB"))
    except DemurError:
        raise
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DemurError(f"cannot read {file} as an image: {' '.join(str(error).split()) or type(error).__name__}.") from error


def _palette(image: Image.Image) -> list[tuple[int, int, int]]:
    values = image.getpalette("RGB") or []
    used = {index for _, index in image.getcolors(256) or []}
    return [(values[3 * i], values[3 * i + 1], values[3 * i + 2]) for i in used if isinstance(i, int)]


def no_split(subject: str, split: str) -> NoSplitError:
    """Make the error for a set that comes in one piece."""
    return NoSplitError(f"{subject} has no {split} split. Load all of it with split='train' and use .split(fraction, seed).")
