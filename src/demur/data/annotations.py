"""Readers of JSON and CSV files with the boxes and the classes of photographs."""

import csv
from pathlib import Path
from typing import Any

from demur.data.messages import printable, quoted
from demur.errors import DemurError
from demur.masks import Box
from demur.untrusted import read_json, read_text

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
    content = read_text(path) if path.suffix.lower() == ".csv" else read_json(path)
    try:
        return _from_csv(content) if isinstance(content, str) else _from_json(content)
    except DemurError as error:
        raise DemurError(f"{printable(path)}: {error}") from error
    except csv.Error as error:
        raise DemurError(f"{printable(path)} is not a CSV file: {error}.") from error


def _from_json(entries: Any) -> dict[str, dict[str, Any]]:
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
        name = line["file"] or ""
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
            f"the box of {printable(name)} is {quoted(values)}, not [left, top, right, bottom] in "
            "pixels."
        ) from error
    if box[0] > box[2] or box[1] > box[3]:
        raise DemurError(
            f"the box of {printable(name)} is {quoted(values)}: right is less than left, or bottom "
            "less than top. Is it left, top, width, height?"
        )
    return box
