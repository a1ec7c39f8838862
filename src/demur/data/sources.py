"""Loading, listing and downloading of data sets, by name or from a path."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from demur.data import downloads
from demur.data.catalogue import SOURCES, Layout, Source, missing, remedy
from demur.data.formats import no_split, read_folder, read_npz
from demur.data.images import ImageSet
from demur.errors import DemurError, unknown
from demur.files import file_digest
from demur.untrusted import ARRAYS, opened, user_path

SPLITS = ("train", "test")


@dataclass(frozen=True)
class SourceStatus:
    """What is known of a data set without reading it.

    Parameters
    ----------
    name : str
        Name of the data set.
    about : str
        Description in one line.
    classes : int
        Number of classes.
    images : mapping of str to int
        Images of each split, in the layout that is present, else in the one to download.
    where : str or None
        Its first file under the data root, or "embedded"; None if it is missing.
    megabytes : int or None
        Size of the download; None if it cannot be downloaded.
    subset_of : mapping of str to int, optional
        Images of each split of the whole data set, where only a part is present.
    """

    name: str
    about: str
    classes: int
    images: Mapping[str, int]
    where: str | None
    megabytes: int | None
    subset_of: Mapping[str, int] | None = None


def data_root(root: str | Path | None = None) -> Path:
    """Return the folder of the data sets.

    Parameters
    ----------
    root : str or Path, optional
        The folder. Default: the environment variable DEMUR_DATA, else a folder in the user's cache;
        where there is no home folder, .cache in the current folder.

    Returns
    -------
    Path
        The folder, which need not exist.

    Examples
    --------
    >>> data_root("datasets").name
    'datasets'
    """
    if given := root or os.environ.get("DEMUR_DATA"):
        return user_path(given)
    cache = os.environ.get("XDG_CACHE_HOME")
    return Path(cache, "demur") if cache else _home() / ".cache" / "demur"


def _home() -> Path:
    try:
        return Path.home()
    except RuntimeError:  # the user of a container may have no home
        return Path()


def load(name: str | Path, split: str = "train", root: str | Path | None = None) -> ImageSet:
    """Load a data set by its name, or from an .npz file or a folder of images by class.

    Parameters
    ----------
    name : str or Path
        A name of `list_datasets`, such as "digits" or "mnist", or a path as for
        `demur.data.formats`.
    split : {"train", "test"}, default="train"
        Part to load. A data set without an official split is all "train".
    root : str or Path, optional
        The data root, as in `data_root`. Paths do not depend on it.

    Returns
    -------
    ImageSet
        Its images.

    Raises
    ------
    NoSplitError
        For a data set without that split.
    DemurError
        For an unknown name or split, and for a data set that is missing or damaged.

    Examples
    --------
    >>> load("digits", "test")
    ImageSet('digits': 359 images of 1x28x28, 10 classes)
    """
    if split not in SPLITS:
        raise unknown("split", split, SPLITS)
    if isinstance(name, str) and name in SOURCES:
        return _load_known(name, split, data_root(root))
    path = user_path(name)
    expect_path(path, str(name))
    try:
        if path.is_dir():
            return read_folder(path, split)
    except OSError as error:
        raise DemurError(f"cannot read {path}: {error.strerror}.") from error
    if path.suffix == ".npz":
        return read_npz(path, split)
    raise DemurError(f"{path} is neither an .npz file nor a folder.")


def _load_known(name: str, split: str, folder: Path) -> ImageSet:
    layout = SOURCES[name].layout(folder)
    if layout is None:
        raise DemurError(f"{missing(name, folder)} {remedy(name, folder)}")
    if split not in layout.images:
        raise no_split(name, split)
    for file in layout.files:
        with opened(folder / file, ARRAYS):
            pass
    if fault := _wrong_checksum(name, layout, folder):
        raise DemurError(fault)
    return replace(layout.read(folder, split), name=name)


def _wrong_checksum(name: str, layout: Layout, root: Path) -> str:
    """Name the first file with a wrong checksum; "" if there is none."""
    for file, checksum in layout.files.items():
        if checksum and file_digest(root / file) != checksum:
            return (
                f"{root / file} has the wrong checksum (SHA-256). Remove it. {remedy(name, root)}"
            )
    return ""


def list_datasets(root: str | Path | None = None) -> list[SourceStatus]:
    """List the known data sets: present under the root or not, and their downloads.

    Parameters
    ----------
    root : str or Path, optional
        The data root, as in `data_root`.

    Returns
    -------
    list of SourceStatus
        One status for each data set.

    Examples
    --------
    >>> [status.name for status in list_datasets() if status.where == "embedded"]
    ['digits']
    """
    folder = data_root(root)
    statuses = []
    for name, source in SOURCES.items():
        found = source.layout(folder)
        whole = source.layouts[0]
        layout = found or whole
        place = str(folder / next(iter(layout.files))) if layout.files else "embedded"
        status = SourceStatus(
            name,
            source.about,
            source.classes,
            layout.images,
            place if found else None,
            source.download.megabytes if source.download else None,
            None if layout is whole else whole.images,
        )
        statuses.append(status)
    return statuses


def download(name: str, root: str | Path | None = None) -> None:
    """Download a data set into the root. One that is present and undamaged is left unchanged.

    Parameters
    ----------
    name : str
        A name of `list_datasets`.
    root : str or Path, optional
        The data root, as in `data_root`.

    Raises
    ------
    DemurError
        For an unknown name, a data set that cannot be downloaded, or a failed download.

    Examples
    --------
    >>> download("digits")  # embedded: nothing to download
    """
    source = _known(name)
    folder = data_root(root)
    if _is_whole(name, folder):
        return
    if source.download is None:
        raise DemurError(remedy(name, folder))
    downloads.fetch(source.download, folder)


def _is_whole(name: str, folder: Path) -> bool:
    """Whether the data set that a download brings is present and undamaged."""
    layout = SOURCES[name].layouts[0]
    if SOURCES[name].layout(folder) is not layout:
        return False
    try:
        for split in layout.images:
            _load_known(name, split, folder)
    except DemurError:
        return False
    return True


def _known(name: str) -> Source:
    if name not in SOURCES:
        raise unknown("data set", name, SOURCES)
    return SOURCES[name]


def expect_path(path: Path, name: str) -> None:
    """Raise DemurError if `path` does not exist; `name` is no known data set either."""
    try:
        if path.exists():
            return
    except OSError as error:
        raise DemurError(f"cannot read {path}: {error.strerror}.") from error
    if name.endswith(("/", os.sep)):
        raise DemurError(f"there is no folder {name}.")
    if len(path.parts) > 1 or path.suffix or name.startswith((".", "~")):
        raise DemurError(f"{name}: there is no data set of this name, and no such file or folder.")
    message = unknown("data set", name, SOURCES)
    raise DemurError(f"{message} There is no such file or folder, either.")


def counted(images: Mapping[str, int]) -> str:
    """Write the number of images of each split.

    Examples
    --------
    >>> counted({"train": 60_000, "test": 10_000})
    '60,000 + 10,000'
    """
    return " + ".join(f"{count:,}" for count in images.values())
