"""Photographs of any size and kind, with the boxes of their objects, resized for a network."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional

from demur.data.annotations import read_annotations
from demur.data.decoding import opened, read_image
from demur.data.messages import quoted
from demur.errors import DemurError
from demur.masks import Box
from demur.untrusted import user_path

_CONVERTED = {
    "1": "black and white, converted to three equal channels",
    "L": "grey, converted to three equal channels",
    "LA": "grey with transparency, laid on white and converted to three equal channels",
    "RGBA": "transparent, laid on white",
    "PA": "transparent, laid on white",
    "P": "palette, converted to RGB",
    "CMYK": "CMYK, converted to RGB",
    "YCbCr": "YCbCr, converted to RGB",
    "LAB": "Lab, converted to RGB",
    "HSV": "HSV, converted to RGB",
}
_DEEP = "16 bits, scaled to 8 and converted to three equal channels"


@dataclass(frozen=True)
class Photo:
    """A photograph with the boxes of its objects.

    Parameters
    ----------
    pixels : Tensor
        uint8 RGB pixels (3, H, W).
    name : str
        Name of the photograph.
    boxes : tuple of Box
        Boxes (left, top, right, bottom) of its objects in pixels.
    label : int, optional
        Its class.
    converted : str
        Conversion that was needed to read it as 8-bit RGB; empty if none was.

    Examples
    --------
    >>> Photo(torch.zeros(3, 20, 30, dtype=torch.uint8), "black.png").size
    (20, 30)
    """

    pixels: Tensor
    name: str
    boxes: tuple[Box, ...] = ()
    label: int | None = None
    converted: str = ""

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.pixels.shape[1], self.pixels.shape[2]


def read_photo(path: Path) -> Photo:
    """Read a photograph as 8-bit RGB.

    16-bit pixels are scaled, transparent pixels are laid on white, and the orientation that the
    camera recorded is applied.

    Parameters
    ----------
    path : Path
        The file.

    Returns
    -------
    Photo
        The photograph, without boxes.

    Raises
    ------
    DemurError
        If the file is missing, unreadable, truncated, or holds several images.

    Examples
    --------
    >>> import tempfile
    >>> from PIL import Image
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder, "grey.png")
    ...     Image.new("L", (30, 20)).save(path)
    ...     read_photo(path).converted
    'grey, converted to three equal channels'
    """
    if not user_path(path).is_file():
        raise DemurError(f"there is no photograph {path}.")
    with opened(path) as image:
        mode = image.mode
    pixels = torch.from_numpy(read_image(path).copy())
    if pixels.ndim == 2:
        pixels = pixels[None].repeat(3, 1, 1)
    else:
        pixels = pixels.permute(2, 0, 1).contiguous()
    converted = _DEEP if mode.startswith("I") else _CONVERTED.get(mode, "")
    return Photo(pixels, path.name, converted=converted)


def fitted(photo: Photo, resize: int, crop: int) -> Photo:
    """Resize and crop a photograph and its boxes for a network, as torchvision does.

    The shorter side becomes `resize` pixels, then the centre is cropped. Boxes are clipped to the
    crop; a box outside the crop is dropped.

    Parameters
    ----------
    photo : Photo
        The photograph.
    resize : int
        Length of the shorter side in pixels.
    crop : int
        Side of the result in pixels.

    Returns
    -------
    Photo
        Pixels (3, crop, crop).

    Raises
    ------
    DemurError
        If the photograph is smaller than the crop, or a box reaches outside it.

    Examples
    --------
    >>> pixels = torch.zeros(3, 100, 200, dtype=torch.uint8)
    >>> fitted(Photo(pixels, "a.png", ((60, 20, 120, 80),)), resize=50, crop=40).boxes
    ((0, 5, 30, 35),)
    """
    height, width = photo.size
    shorter = min(height, width)
    if shorter < crop:
        raise DemurError(
            f"{photo.name} has {width}x{height} pixels; the network needs {crop}x{crop} at least."
        )
    check_boxes(photo.boxes, photo.size, photo.name)
    # Rounded down, as in torchvision.
    rows = max(crop, resize * height // shorter)
    columns = max(crop, resize * width // shorter)
    resized = functional.resize(photo.pixels, [rows, columns], antialias=True)
    pixels = functional.center_crop(resized, [crop, crop])
    # Rounded as in torchvision's centre crop.
    top = round((rows - crop) / 2)
    left = round((columns - crop) / 2)
    moved = []
    for first, upper, last, lower in photo.boxes:
        across = [min(crop, max(0, round(x * columns / width) - left)) for x in (first, last)]
        down = [min(crop, max(0, round(y * rows / height) - top)) for y in (upper, lower)]
        if across[0] < across[1] and down[0] < down[1]:
            moved.append((across[0], down[0], across[1], down[1]))
    return replace(photo, pixels=pixels, boxes=tuple(moved))


def check_boxes(boxes: Sequence[Box], size: tuple[int, int], name: str) -> None:
    """Raise DemurError for a box that does not lie in an image of `size` (H, W)."""
    height, width = size
    for box in boxes:
        left, top, right, bottom = box
        if not (0 <= left <= right <= width and 0 <= top <= bottom <= height):
            raise DemurError(
                f"{name}: the box {list(box)} (left, top, right, bottom) does not lie in an image "
                f"of {width}x{height} pixels. Boxes are in pixels of the image in its file, after "
                "the rotation that the camera recorded."
            )


def read_photos(folder: Path, about: Path | None = None, count: int | None = None) -> list[Photo]:
    """Read the photographs of a folder that an annotation file names.

    Parameters
    ----------
    folder : Path
        Folder of image files.
    about : Path, optional
        JSON or CSV file as for `read_boxes`, with a `class_index` for each photograph. Default: the
        file beside the folder with the folder's name and the ending .json or .csv.
    count : int, optional
        Number of photographs, in the order of the file. Default: all.

    Returns
    -------
    list of Photo
        The photographs with their boxes and classes. A name is the `label` of the file, or the file
        name where labels repeat.

    Raises
    ------
    DemurError
        For missing or damaged files, a missing class, and boxes outside the photograph.

    Examples
    --------
    >>> import tempfile
    >>> from PIL import Image
    >>> with tempfile.TemporaryDirectory() as root:
    ...     folder = Path(root, "photos")
    ...     folder.mkdir()
    ...     Image.new("RGB", (30, 20)).save(folder / "one.png")
    ...     _ = Path(root, "photos.json").write_text('{"one.png": {"class_index": 3}}')
    ...     [(photo.name, photo.label) for photo in read_photos(folder)]
    [('one', 3)]
    """
    known = _beside(folder) if about is None else about
    entries = dict(list(read_annotations(known).items())[:count])
    photos = []
    for file, entry in entries.items():
        if Path(file).is_absolute() or ".." in Path(file).parts:
            raise DemurError(
                f"{known} names {quoted(file)}, which may lead out of {folder}: it must name files "
                "inside that folder."
            )
        photo = read_photo(folder / file)
        check_boxes(entry["boxes"], photo.size, file)
        title = str(entry.get("label") or Path(file).stem)
        label = _class_index(entry, file, known)
        photos.append(replace(photo, name=title, boxes=entry["boxes"], label=label))
    if not photos:
        raise DemurError(f"{known} names no photograph.")
    titles = [photo.name for photo in photos]
    return [
        replace(photo, name=file) if titles.count(photo.name) > 1 else photo
        for photo, file in zip(photos, entries, strict=True)
    ]


def _beside(folder: Path) -> Path:
    both = [folder.with_name(f"{folder.name}{ending}") for ending in (".json", ".csv")]
    if found := next((path for path in both if path.is_file()), None):
        return found
    raise DemurError(
        f"there is no {both[0].name} nor {both[1].name} beside {folder} "
        "with the classes of its photographs."
    )


def _class_index(entry: Mapping[str, Any], name: str, known: Path) -> int:
    try:
        return int(entry["class_index"])
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise DemurError(f"{known} does not give the class_index of {name}.") from error
