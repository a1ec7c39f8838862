"""Lists of image files with the names of their classes: from folders and from CSV manifests."""

import csv
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import TextIOWrapper
from pathlib import Path

import torch
from torch import Tensor

from demur.data.decoding import image_files, irregular
from demur.data.messages import printable, quoted
from demur.errors import DemurError, unknown
from demur.untrusted import MANIFEST, opened

TRAINING = ("train", "training")
VALIDATION = ("val", "valid", "validation", "eval", "evaluation")
TESTING = ("test", "testing")
SPLITS = (*TRAINING, *TESTING, *VALIDATION)
"""Names of splits, as of timm. A set that has a test split or a validation split has the other one
under this name, too."""

_MANIFEST = "a manifest has a line path,label for each image"


@dataclass(frozen=True)
class Listing:
    """Image files with the names of their classes.

    Parameters
    ----------
    paths : tuple of str
        N files.
    classes : tuple of str
        Names of the classes, in their order: numbers by value, other names by the alphabet.
    members : Tensor
        For each file the place of its class in `classes`, (N,) int64.
    notes : tuple of str
        Sentences about what was left out.
    """

    paths: tuple[str, ...]
    classes: tuple[str, ...]
    members: Tensor
    notes: tuple[str, ...] = ()


def check_split(split: str) -> None:
    """Raise DemurError for a name that is no split."""
    if split not in SPLITS:
        raise unknown("split", split, SPLITS)


def class_order(names: Sequence[str]) -> list[str]:
    """Sort names of classes: by their value if all are numbers, else by the alphabet.

    Examples
    --------
    >>> class_order(["10", "9"]), class_order(["10", "9", "cat"])
    (['9', '10'], ['10', '9', 'cat'])
    """
    if all(is_number(name) for name in names):
        return sorted(names, key=lambda name: (int(name), name))
    return sorted(names)


def is_number(name: str) -> bool:
    """Whether a name of a class is a number such as "7" or "007"."""
    return name.isascii() and name.isdecimal() and len(name) < 10


def list_folder(path: Path, split: str) -> Listing:
    """List the image files of a folder with one sub-folder for each class.

    Parameters
    ----------
    path : Path
        The folder. It holds the classes, or a folder for each split that holds them.
    split : str
        One of `SPLITS`. Without folders for splits, all images are listed.

    Returns
    -------
    Listing
        The files in the order of their classes and names.

    Raises
    ------
    DemurError
        If the folder has no classes, a class has no images, or a file cannot be read.
    """
    folders = _folders(path)
    place, note = _of_split(path, folders, split)
    notes = [note]
    if place != path:
        folders = _folders(place)
    if not folders:
        raise _no_classes(place)
    by_name = {folder.name: folder for folder in folders}
    check_names(folders)
    classes = class_order(list(by_name))
    _, ignored = _beside(place)
    paths: list[str] = []
    members: list[int] = []
    for number, name in enumerate(classes):
        files, others = image_files(by_name[name])
        if not files:
            raise DemurError(
                f"{printable(by_name[name])} has no images; each sub-folder of {printable(place)} "
                "is a class and needs some. Folders inside it are not searched."
            )
        paths += map(str, files)
        members += [number] * len(files)
        ignored += others
    if ignored:
        notes.append(
            f"{printable(path.resolve().name)}: {ignored} files were ignored; they are hidden, no "
            "images, or outside the folders of the classes."
        )
    return Listing(tuple(paths), tuple(classes), torch.tensor(members), tuple(filter(None, notes)))


def check_names(folders: Sequence[Path]) -> None:
    """Refuse names of classes that are not UTF-8: no file of results can hold them."""
    for folder in folders:
        try:
            folder.name.encode()
        except UnicodeEncodeError as error:
            raise DemurError(
                f"the name of the folder {printable(folder)} is not UTF-8. Rename it: it is the "
                "name of a class."
            ) from error


def _folders(path: Path) -> list[Path]:
    try:
        return [
            entry for entry in path.iterdir() if not entry.name.startswith(".") and entry.is_dir()
        ]
    except OSError as error:
        raise DemurError(f"cannot read {printable(path)}: {error.strerror}.") from error


def _beside(path: Path) -> tuple[int, int]:
    """Count the images and all files that lie in a folder itself."""
    images, others = image_files(path)
    return len(images), len(images) + others


def _no_classes(path: Path) -> DemurError:
    images, files = _beside(path)
    has = f"holds {images} images" if images else f"holds {files} files"
    fault = f"{has}, but no sub-folders" if files else "is empty"
    return DemurError(
        f"{printable(path)} {fault}. Put the images of each class into a "
        "sub-folder with the name of the class, or give a CSV manifest with a line path,label for "
        "each image."
    )


def _of_split(path: Path, folders: list[Path], split: str) -> tuple[Path, str]:
    """Find the folder of a split; the whole folder if there is none for any split."""
    # A class may be called "train" too; but a split holds folders, a class holds images.
    by_split = {
        folder.name.lower(): folder
        for folder in sorted(folders)
        if folder.name.lower() in SPLITS and _folders(folder)
    }
    title = printable(path.resolve().name)
    if folders and not by_split and all(folder.name.lower() in SPLITS for folder in folders):
        raise DemurError(
            f"{printable(folders[0])} is the folder of a split, but has no sub-folders. It needs "
            "one for each class, with the name of the class."
        )
    if not by_split:
        note = f"{title} has no folders for splits: all of its images are used."
        return path, note
    own = next(group for group in (TRAINING, TESTING, VALIDATION) if split in group)
    others = () if own is TRAINING else (*TESTING, *VALIDATION)
    for name in (split, *own, *others):
        if name in by_split:
            used = by_split[name].name
            left = sorted(one.name for one in folders if one != by_split[name])
            beside = f", not {', '.join(quoted(one) for one in left[:3])}" if left else ""
            return by_split[name], f"{title}: the folder {quoted(used)} is used{beside}."
    raise DemurError(
        f"{printable(path)} has no {split} split, only {', '.join(sorted(by_split))}. "
        "Choose one with --split."
    )


def list_manifest(path: Path) -> Listing:
    """List the image files that a CSV manifest names.

    Parameters
    ----------
    path : Path
        A CSV file with the columns path and label. Without a header it has these two columns in
        this order. A path is relative to the folder of the manifest, or absolute. A label is a
        number or the name of a class.

    Returns
    -------
    Listing
        The files in the order of the manifest.

    Raises
    ------
    DemurError
        With the line, for a line that is incomplete, names no regular file or a file outside the
        folder by "..", or repeats a path.
    """
    paths: dict[str, int] = {}
    labels: list[str] = []
    for line, text, label in _rows(path):
        where = f"{printable(path)}, line {line}"
        if not label:
            raise DemurError(f"{where}: there is no label; {_MANIFEST}.")
        file = str(_file(text, path.parent, where, line))
        if file in paths:
            raise DemurError(
                f"{where} repeats the image of line {paths[file]}. Each image counts once: "
                "remove a line."
            )
        paths[file] = line
        labels.append(label)
    if not paths:
        raise DemurError(f"{printable(path)} names no images; {_MANIFEST}.")
    classes = class_order(list(set(labels)))
    place = {name: number for number, name in enumerate(classes)}
    members = torch.tensor([place[label] for label in labels])
    return Listing(tuple(paths), tuple(classes), members)


def _rows(path: Path) -> Iterator[tuple[int, str, str]]:
    """Give line number, path and label of each line of a manifest."""
    try:
        with opened(path, MANIFEST) as file:
            reader = csv.reader(TextIOWrapper(file, encoding="utf-8-sig", newline=""))
            columns: tuple[int, int] | None = None
            width = 2
            for row in reader:
                if not any(cell.strip() for cell in row):
                    continue
                if columns is None:
                    columns = _header(row)
                    width = len(row)
                    if columns is not None:
                        continue
                    columns = (0, 1)
                if len(row) != width or width < 2:
                    raise DemurError(
                        f"{printable(path)}, line {reader.line_num}: it has {len(row)} columns "
                        f"separated by commas, not {max(width, 2)}; {_MANIFEST}."
                    )
                yield reader.line_num, row[columns[0]], row[columns[1]].strip()
    except UnicodeDecodeError as error:
        raise DemurError(f"{printable(path)} is not a text file in UTF-8.") from error
    except csv.Error as error:
        raise DemurError(f"{printable(path)} is not a CSV file: {error}.") from error


def _header(row: list[str]) -> tuple[int, int] | None:
    """Give the columns of path and label if a line is a header."""
    names = [cell.strip().lower() for cell in row]
    if "path" in names and "label" in names:
        return names.index("path"), names.index("label")
    if len(row) > 2:
        raise DemurError(
            f"a manifest with {len(row)} columns needs a header that names the columns path and "
            f"label; its first line begins with {quoted(row[0])}."
        )
    return None


def _file(text: str, folder: Path, where: str, line: int) -> Path:
    """Resolve the path of a manifest and check that it is a regular file."""
    given = Path(text)
    if not given.is_absolute() and ".." in given.parts:
        raise DemurError(
            f"{where}: {quoted(text)} may lead out of the folder of the manifest. Give the "
            "absolute path."
        )
    file = folder / given
    try:
        mode = file.stat().st_mode
    except (OSError, ValueError) as error:
        hint = "; the header of a manifest is path,label" if line == 1 else ""
        raise DemurError(f"{where}: there is no file {printable(file)}{hint}.") from error
    if not stat.S_ISREG(mode):
        raise DemurError(f"{where}: {irregular(file)}")
    return file
