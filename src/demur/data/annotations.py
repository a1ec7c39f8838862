"""Readers of JSON and CSV files with the boxes and the classes of photographs."""

import csv
import json
from pathlib import Path
from typing import Any

from demur.errors import DemurError
from demur.masks import Box

_COLUMNS = ("file", "left", "top", "right", "bottom")


def read_boxes(path: Path) -> dict[str, tuple[Box, ...]]:
    """Read the boxes of the objects on photographs from a JSON or CSV file.

    A JSON file is an object: the value of a file name is a box [left, top, right, bottom] in
    pixels, a list of boxes, or an object with `box` or `boxes`. A CSV file has the columns file,
    left, top, right and bottom, and one line for each box.

    Parameters
    ----------
    path : Path
        The file. The ending .csv marks a CSV file.

    Returns
    -------
    dict of str to tuple of Box
        The boxes of each photograph, by its file name.

    Raises
    ------
    DemurError
        For anything else, with the name of the file and of the entry.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder, "photos.json")
    ...     _ = path.write_text('{"cat.jpg": [10, 20, 110, 90]}')
    ...     read_boxes(path)
    {'cat.jpg': ((10, 20, 110, 90),)}
    """
    return {name: entry["boxes"] for name, entry in read_annotations(path).items()}


def read_annotations(path: Path) -> dict[str, dict[str, Any]]:
    """Read the annotations of photographs, by file name: `boxes`, and all other keys of the file.

    Other keys are, for example, `class_index`, `wnid` and `label`. The format is that of
    `read_boxes`.
    """
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
        entries = json.loads(text)
    except json.JSONDecodeError as error:
        raise DemurError(f"it is not JSON ({error}).") from error
    if not isinstance(entries, dict):
        raise DemurError('it must be an object: {"name.jpg": [left, top, right, bottom], ...}.')
    found = {}
    for name, entry in entries.items():
        about = dict(entry) if isinstance(entry, dict) else {"boxes": entry}
        boxes = about.pop("boxes", about.pop("box", ())) or []
        several = isinstance(boxes, list) and all(isinstance(box, list) for box in boxes)
        boxes = boxes if several else [boxes]
        found[name] = {**about, "boxes": tuple(_box(box, name) for box in boxes)}
    return found


def _from_csv(text: str) -> dict[str, dict[str, Any]]:
    lines = csv.DictReader(text.splitlines())
    missing = [column for column in _COLUMNS if column not in (lines.fieldnames or ())]
    if missing:
        raise DemurError(
            f"its header lacks {', '.join(missing)}; "
            f"it must have the columns {', '.join(_COLUMNS)}."
        )
    found: dict[str, dict[str, Any]] = {}
    for line in lines:
        name = line["file"]
        about = {
            key: value for key, value in line.items() if key not in _COLUMNS and key is not None
        }
        box = _box([line[side] for side in _COLUMNS[1:]], name)
        entry = found.setdefault(name, {**about, "boxes": ()})
        entry["boxes"] = (*entry["boxes"], box)
    return found


def _box(values: Any, name: str) -> Box:
    try:
        left, top, right, bottom = (float(value) for value in values)
        box = (round(left), round(top), round(right), round(bottom))
    except (TypeError, ValueError, OverflowError) as error:
        raise DemurError(
            f"the box of {name} is {values!r}, not [left, top, right, bottom] in pixels."
        ) from error
    if box[0] > box[2] or box[1] > box[3]:
        raise DemurError(
            f"the box of {name} is {values!r}: right is less than left, or bottom less than top. "
            "Is it left, top, width, height?"
        )
    return box
