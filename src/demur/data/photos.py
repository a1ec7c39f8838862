"""Photographs: read from files of any kind, brought to a network's size, and the boxes of their objects with them."""

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional

from demur.data.formats import read_image
from demur.errors import DemurError

Box = tuple[int, int, int, int]
"""Left, top, right, bottom in pixels, the last two exclusive: width is right - left."""

CONVERTED = {
    "1": "black and white, made three equal channels",
    "L": "grey, made three equal channels",
    "LA": "grey with transparency, laid on white and made three equal channels",
    "RGBA": "transparent, laid on white",
    "PA": "transparent, laid on white",
    "P": "colours of a palette, looked up",
    "CMYK": "printing colours (CMYK), converted to RGB",
    "YCbCr": "video colours (YCbCr), converted to RGB",
    "LAB": "Lab colours, converted to RGB",
    "HSV": "HSV colours, converted to RGB",
}


@dataclass(frozen=True)
class Photo:
    """A photograph: uint8 RGB pixels (3, H, W), its name, the boxes of its objects, its class if known, and how it was converted."""

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
    """Read a photograph as 8-bit RGB: 16 bits are scaled, transparency is laid on white, cameras' orientation marks are obeyed.

    Raises: DemurError, naming the file, if it is not there, cannot be read or is cut short, or holds more than one picture.
    """
    if not path.is_file():
        raise DemurError(f"there is no photograph {path}.")
    try:
        with Image.open(path) as opened:
            mode, frames = opened.mode, 1 if opened.format == "MPO" else getattr(opened, "n_frames", 1)  # cameras put a preview beside
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DemurError(f"cannot read {path} as an image: {' '.join(str(error).split()) or type(error).__name__}.") from error
    if frames > 1:
        raise DemurError(f"{path} is animated, or holds {frames} pictures: save the one that is meant.")
    pixels = torch.from_numpy(read_image(path).copy())
    pixels = pixels[None].repeat(3, 1, 1) if pixels.ndim == 2 else pixels.permute(2, 0, 1).contiguous()
    said = "16 bits a channel, scaled to 8, and made three equal channels" if mode.startswith("I") else CONVERTED.get(mode, "")
    return Photo(pixels, path.name, converted=said)


def fitted(photo: Photo, resize: int, crop: int) -> Photo:
    """Bring a photograph to (3, crop, crop): shorter side to `resize` pixels, then the middle; its boxes follow, cut off at the borders.

    A box of which nothing is left is dropped. Raises: DemurError if the photograph is smaller than the crop, or a box reaches outside it.
    """
    height, width = photo.size
    if min(height, width) < crop:
        raise DemurError(f"{photo.name} has {width}x{height} pixels; the network needs {crop}x{crop} at least.")
    check_boxes(photo.boxes, photo.size, photo.name)
    shorter = min(height, width)
    rows, columns = (max(crop, resize * length // shorter) for length in (height, width))  # rounded down, as torchvision does
    pixels = functional.center_crop(functional.resize(photo.pixels, [rows, columns], antialias=True), [crop, crop])
    top, left = round((rows - crop) / 2), round((columns - crop) / 2)  # as torchvision's centre crop rounds
    moved = []
    for first, upper, last, lower in photo.boxes:
        across = [min(crop, max(0, round(x * columns / width) - left)) for x in (first, last)]
        down = [min(crop, max(0, round(y * rows / height) - top)) for y in (upper, lower)]
        if across[0] < across[1] and down[0] < down[1]:
            moved.append((across[0], down[0], across[1], down[1]))
    return Photo(pixels, photo.name, tuple(moved), photo.label, photo.converted)


def check_boxes(boxes: Sequence[Box], size: tuple[int, int], name: str) -> None:
    """Raise DemurError for a box that does not lie in an image of `size` (H, W): perhaps its coordinates are those of another size."""
    height, width = size
    for box in boxes:
        left, top, right, bottom = box
        if not (0 <= left <= right <= width and 0 <= top <= bottom <= height):
            raise DemurError(
                f"{name}: the box {list(box)} (left, top, right, bottom) does not lie in an image of {width}x{height} pixels. "
                "Boxes are in pixels of the image as it is in its file, held upright."
            )


def read_boxes(path: Path) -> dict[str, tuple[Box, ...]]:
    """Read the boxes of the objects on photographs, by the photograph's file name, from a JSON or CSV file.

    JSON: {"name.jpg": [left, top, right, bottom]}, or a list of such boxes, or an object with a `box` or `boxes` like that. CSV: a
    header with the columns file, left, top, right, bottom; a line for each box.

    Raises: DemurError, naming the file and the entry, for anything else.
    """
    return {name: entry["boxes"] for name, entry in read_annotations(path).items()}


def read_annotations(path: Path) -> dict[str, dict[str, Any]]:
    """What is known of photographs, by file name: `boxes`, and whatever else the file says of each (class_index, wnid, label)."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        return _from_csv(text) if path.suffix.lower() == ".csv" else _from_json(text)
    except OSError as error:
        raise DemurError(f"cannot read {path}: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise DemurError(f"{path} is not a text file.") from error
    except (DemurError, ValueError) as error:
        raise DemurError(f"{path}: {error}") from error


def _from_json(text: str) -> dict[str, dict[str, Any]]:
    try:
        held = json.loads(text)
    except json.JSONDecodeError as error:
        raise DemurError(f"it is not JSON ({error}).") from error
    if not isinstance(held, dict):
        raise DemurError('it must be an object: {"name.jpg": [left, top, right, bottom], ...}.')
    found = {}
    for name, entry in held.items():
        about = dict(entry) if isinstance(entry, dict) else {"boxes": entry}
        boxes = about.pop("boxes", about.pop("box", ()))
        several = isinstance(boxes, list) and all(isinstance(box, list) for box in boxes)
        found[name] = {**about, "boxes": tuple(_box(box, name) for box in (boxes if several else [boxes])) if boxes else ()}
    return found


def _from_csv(text: str) -> dict[str, dict[str, Any]]:
    lines = csv.DictReader(text.splitlines())
    wanted = ("file", "left", "top", "right", "bottom")
    missing = [column for column in wanted if column not in (lines.fieldnames or ())]
    if missing:
        raise DemurError(f"its header lacks {', '.join(missing)}; it must have the columns {', '.join(wanted)}.")
    found: dict[str, dict[str, Any]] = {}
    for line in lines:
        name = line["file"]
        about = {key: value for key, value in line.items() if key not in wanted and key is not None}
        box = _box([line[side] for side in wanted[1:]], name)
        entry = found.setdefault(name, {**about, "boxes": ()})
        entry["boxes"] = (*entry["boxes"], box)
    return found


def _box(values: Any, name: str) -> Box:
    try:
        left, top, right, bottom = (float(value) for value in values)
        box = (round(left), round(top), round(right), round(bottom))
    except (TypeError, ValueError, OverflowError) as error:
        raise DemurError(f"the box of {name} is {values!r}, not [left, top, right, bottom] in pixels.") from error
    if box[0] > box[2] or box[1] > box[3]:
        raise DemurError(f"the box of {name} is {values!r}: right is left of left, or bottom above top. Is it left, top, width, height?")
    return box


def read_photos(folder: Path, about: Path | None = None, count: int | None = None) -> list[Photo]:
    """Read the photographs of a folder that a JSON or CSV file beside it knows: their class numbers, and their boxes.

    Args:
        folder: of image files.
        about: as `read_boxes` has it, with a `class_index` for each; the folder's name with .json or .csv if None.
        count: the first so many, in the order of that file; all if None.

    Raises: DemurError for what is missing or damaged.
    """
    known = _beside(folder) if about is None else about
    photos = []
    for name, entry in list(read_annotations(known).items())[:count]:
        photo = read_photo(folder / name)
        check_boxes(entry["boxes"], photo.size, name)
        photos.append(Photo(photo.pixels, _title(name, entry), entry["boxes"], _class_index(entry, name, known), photo.converted))
    if not photos:
        raise DemurError(f"{known} names no photograph.")
    titles = [photo.name for photo in photos]
    files = list(read_annotations(known))[:count]
    return [replace(photo, name=file) if titles.count(photo.name) > 1 else photo for photo, file in zip(photos, files, strict=True)]


def _beside(folder: Path) -> Path:
    both = [folder.with_name(f"{folder.name}{ending}") for ending in (".json", ".csv")]
    if found := next((path for path in both if path.is_file()), None):
        return found
    raise DemurError(f"there is no {both[0].name} nor {both[1].name} beside {folder}, to say what its photographs are of.")


def _class_index(entry: Mapping[str, Any], name: str, known: Path) -> int:
    try:
        return int(entry["class_index"])
    except (KeyError, TypeError, ValueError) as error:
        raise DemurError(f"{known} does not say the class_index of {name}.") from error


def _title(name: str, entry: Mapping[str, Any]) -> str:
    return str(entry.get("label") or Path(name).stem)
