"""The pixels of image files: all modes of Pillow become 8 bits, grey or RGB.

The files may come from an untrusted source: a file that cannot be read is an error of one line.
"""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from demur.data.messages import printable
from demur.errors import DemurError
from demur.untrusted import PIXELS, check_limit, check_regular

_GREY_MODES = ("1", "L", "LA", "I", "I;16", "I;16B", "I;16L", "I;16N")

FORMATS = (
    *("AVIF", "BMP", "DIB", "GIF", "JPEG", "JPEG2000", "MPO", "PCX", "PNG", "PPM", "QOI", "SGI"),
    *("TGA", "TIFF", "WEBP"),
)
"""Pillow's names of the formats that are read. Pillow knows more: EPS, which is a program that it
gives to Ghostscript; icons, which hold a second image; documents; and formats of laboratories."""

_SCALED_TO_16_BITS = ("PNG", "PPM")
"""Formats whose integer pixels reach to 65535, whatever type Pillow gives them."""

_ORIENTATION = 0x0112
_TURNED = (5, 6, 7, 8)  # orientations that exchange height and width


def readable_formats() -> tuple[str, ...]:
    """Name the formats that are read."""
    Image.init()
    return tuple(kind for kind in FORMATS if kind in Image.OPEN)  # AVIF may be left out of a build


def image_files(folder: Path) -> tuple[list[Path], int]:
    """List the image files of a folder by their endings.

    Parameters
    ----------
    folder : Path
        The folder. Its sub-folders are not searched.

    Returns
    -------
    files : list of Path
        In alphabetical order.
    ignored : int
        Number of files that are hidden or have another ending.

    Raises
    ------
    DemurError
        If the folder cannot be read, or an entry with such an ending is no regular file.
    """
    kinds = readable_formats()
    endings = {end for end, kind in Image.registered_extensions().items() if kind in kinds}
    files = []
    ignored = 0
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_dir():
                    continue
                path = Path(entry.path)
                if entry.name.startswith(".") or path.suffix.lower() not in endings:
                    ignored += 1
                elif entry.is_file():
                    files.append(path)
                else:
                    raise irregular(path)
    except OSError as error:
        raise DemurError(f"cannot read {printable(folder)}: {error.strerror}.") from error
    return sorted(files), ignored


def irregular(path: Path) -> DemurError:
    """Make the error for a FIFO, a device, a folder, or a link that leads nowhere."""
    return DemurError(
        f"{printable(path)} is no regular file, or a link that leads nowhere. Remove it."
    )


@contextmanager
def opened(file: Path) -> Iterator[Image.Image]:
    """Open a file of one image. Any failure of the block becomes a DemurError that names the file.

    Its size is checked before its pixels are decoded.
    """
    try:
        check_regular(file)
    except DemurError as error:
        raise DemurError(f"cannot read {printable(file)} as an image: {error}") from error
    try:
        with Image.open(file, formats=readable_formats()) as image:
            check_limit(printable(file), image.width * image.height, PIXELS, "pixels")
            _check_still(image, file)
            yield image
    except DemurError:
        raise
    except Exception as error:  # a damaged file can fail anywhere in Pillow
        raise unreadable(file, error) from error


def _check_still(image: Image.Image, file: Path) -> None:
    """Refuse an animation and a file of several images: none of them is the right one."""
    # An MPO file of a camera holds previews beside the photograph.
    if image.format != "MPO" and getattr(image, "is_animated", False):
        raise DemurError(
            f"{printable(file)} is animated, or holds several images: save one of them alone."
        )


def unreadable(file: Path, error: Exception) -> DemurError:
    """Make the error for a file that Pillow cannot read."""
    if isinstance(error, UnidentifiedImageError):
        reason = "it has no format that is known"
    elif isinstance(error, OSError) and error.strerror:
        reason = error.strerror
    else:
        reason = printable(error).rstrip(".") or type(error).__name__
    return DemurError(f"cannot read {printable(file)} as an image: {reason}.")


def read_image(file: Path) -> NDArray[np.uint8]:
    """Return the pixels (H, W) of a grey image, or (H, W, 3) of a coloured one."""
    with opened(file) as untouched:
        image = ImageOps.exif_transpose(untouched)
        grey = image.mode in _GREY_MODES
        if image.mode == "F" or (image.mode == "I" and untouched.format not in _SCALED_TO_16_BITS):
            kind = "floating-point" if image.mode == "F" else "32-bit"
            raise DemurError(
                f"{printable(file)} has {kind} pixels of unknown range. Save it with 8 or 16 bits."
            )
        if image.mode.startswith("I"):
            # 16 bits; the conversion of Pillow would clip them at 255.
            deep = np.asarray(image, dtype=np.int32)
            return ((deep + 128) // 257).astype(np.uint8)  # to the nearest: 257 is odd
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        elif image.mode == "P":
            grey = all(red == green == blue for red, green, blue in _palette(image))
        return np.asarray(image.convert("L" if grey else "RGB"))


def read_size(file: Path) -> tuple[int, int]:
    """Read height and width of an image, in the orientation that the camera recorded."""
    with opened(file) as image:
        width, height = image.size
        turned = image.getexif().get(_ORIENTATION) in _TURNED
        return (width, height) if turned else (height, width)


def has_grey_mode(file: Path) -> bool:
    """Whether the header says that the image is grey. A palette counts as coloured."""
    with opened(file) as image:
        return image.mode in _GREY_MODES


def hash_image_file(file: Path) -> str:
    """Hash the bytes of an image file, and check that its header is that of an image.

    Returns
    -------
    str
        16 hexadecimal digits of BLAKE2b.
    """
    with opened(file):
        pass
    try:
        with file.open("rb") as content:
            state = hashlib.file_digest(content, lambda: hashlib.blake2b(digest_size=16))
    except OSError as error:
        raise unreadable(file, error) from error
    return state.hexdigest()[:16]


def _palette(image: Image.Image) -> list[tuple[int, int, int]]:
    values = image.getpalette("RGB") or []
    used = {index for _, index in image.getcolors(256) or []}
    return [
        (values[3 * i], values[3 * i + 1], values[3 * i + 2]) for i in used if isinstance(i, int)
    ]
