"""Data sets by name: where each lies under the data root, how it is read, and whether it can be downloaded."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from shlex import quote
from typing import Literal

import torch
from sklearn.datasets import load_digits
from torch.nn import functional
from torchvision import datasets

from demur.data import downloads
from demur.data.downloads import Download
from demur.data.formats import NoSplitError, no_split, read_folder, read_npz
from demur.data.images import ImageSet
from demur.errors import DemurError, unknown
from demur.files import file_digest

SPLITS = ("train", "test")
DIGITS = tuple("0123456789")
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

MNIST_SHA256 = {  # of the official files, unpacked
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}
CIFAR10_BATCHES = [file for file, _ in (*datasets.CIFAR10.train_list, *datasets.CIFAR10.test_list)]


@dataclass(frozen=True)
class Layout:
    """One way in which a data set lies under the root."""

    files: Mapping[str, str]
    """Paths under the root, all of which must be there, with their SHA-256 ("" where it is not known)."""
    images: Mapping[str, int]
    """How many images each split has; a set in one piece has `train` only."""
    read: Callable[[Path, str], ImageSet]


@dataclass(frozen=True)
class Source:
    """A data set that is known by name; of its layouts, the first that is there is read."""

    about: str
    classes: int
    layouts: tuple[Layout, ...]
    download: Download | None = None
    instead: str = ""
    """What to download where this one cannot be."""

    def layout(self, root: Path) -> Layout | None:
        """The layout to read, or None where none is complete."""
        return next((layout for layout in self.layouts if all((root / file).is_file() for file in layout.files)), None)


@dataclass(frozen=True)
class SourceStatus:
    """What is known of a data set without reading it."""

    name: str
    about: str
    classes: int
    images: Mapping[str, int]
    """How many images each split has, in the layout that is there, or else in the one that would be downloaded."""
    where: str | None
    """The file (the first of them) under the root, or "embedded"; None where it is not there."""
    megabytes: int | None
    """The size of the download; None where there is nothing to download."""
    subset_of: Mapping[str, int] | None = None
    """How many images each split of the whole set has, where only a part of it is there."""


@dataclass(frozen=True)
class CheckResult:
    """What a check of a data set found."""

    name: str
    state: Literal["ok", "missing", "bad"]
    reason: str


def data_root(root: str | Path | None = None) -> Path:
    """The folder that data sets are in: `root`, else the environment's DEMUR_DATA, else one in the user's cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "demur"
    return Path(root or os.environ.get("DEMUR_DATA") or cache).expanduser()


def load(name: str | Path, split: str = "train", root: str | Path | None = None) -> ImageSet:
    """Load a data set: by its name (see `describe`), or from an .npz file or a folder with a subfolder for each class.

    Args:
        name: `digits`, `mnist`, `emnist-balanced`, ..., or a path (formats.py says what may be in it).
        split: `train` or `test`; a set without an official split is all `train`.
        root: the data root, as in `data_root`; paths do not depend on it.

    Raises: DemurError for an unknown name or split, for a set that is not there (saying where it was looked for and how
        to get it), and for one that is damaged.
    """
    if split not in SPLITS:
        raise unknown("split", split, SPLITS)
    if isinstance(name, str) and name in SOURCES:
        folder = data_root(root)
        layout = SOURCES[name].layout(folder)
        if layout is None:
            raise DemurError(f"{_missing(name, folder)} {_remedy(name, folder)}")
        if split not in layout.images:
            raise no_split(name, split)
        if fault := _wrong_checksum(name, layout, folder):
            raise DemurError(fault)
        return replace(layout.read(folder, split), name=name)
    path = Path(name).expanduser()
    _expect(path, str(name))
    try:
        if path.is_dir():
            return read_folder(path, split)
    except OSError as error:
        raise DemurError(f"cannot read {path}: {error.strerror}.") from error
    if path.suffix == ".npz":
        return read_npz(path, split)
    raise DemurError(f"{path} is neither an .npz file nor a folder.")


def describe(root: str | Path | None = None) -> list[SourceStatus]:
    """Say of each known data set whether it is under the root, and whether it could be downloaded."""
    folder = data_root(root)
    statuses = []
    for name, source in SOURCES.items():
        found = source.layout(folder)
        layout = found or source.layouts[0]
        where = str(folder / next(iter(layout.files))) if layout.files else "embedded"
        megabytes = source.download.megabytes if source.download else None
        whole = source.layouts[0].images if layout is not source.layouts[0] else None
        statuses.append(SourceStatus(name, source.about, source.classes, layout.images, where if found else None, megabytes, whole))
    return statuses


def get(name: str, root: str | Path | None = None) -> None:
    """Download a data set into the root, unless it is there.

    Raises: DemurError for an unknown name, a set that cannot be downloaded, or a download that failed.
    """
    source, folder = _source(name), data_root(root)
    if not all((folder / file).is_file() for file in source.layouts[0].files):
        if source.download is None:
            raise DemurError(_remedy(name, folder))
        downloads.fetch(source.download, folder)


def check(root: str | Path | None = None, names: Sequence[str] | None = None) -> list[CheckResult]:
    """Read the data sets of these names (default: all) and verify checksums, counts, labels and the range of pixels.

    A name may be a path, as in `load`; of such a set nothing is known beforehand, and its counts and ranges are told.

    Raises: DemurError for a name that is neither known nor a file or folder.
    """
    folder = data_root(root)
    return [_check(name, SOURCES[name], folder) if name in SOURCES else _check_path(name) for name in (SOURCES if names is None else names)]


def _check(name: str, source: Source, root: Path) -> CheckResult:
    layout = source.layout(root)
    if layout is None:
        return CheckResult(name, "missing", _missing(name, root))
    if fault := _fault(name, source, layout, root):
        return CheckResult(name, "bad", fault)
    counts = counted(layout.images)
    if layout is not source.layouts[0]:
        counts += f" (a subset of {counted(source.layouts[0].images)})"
    checksums = ", checksums match" if any(layout.files.values()) else ""
    return CheckResult(name, "ok", f"{counts} images, {source.classes} classes{checksums}")


def _check_path(name: str) -> CheckResult:
    """What is in an .npz file or a folder: images of each split, their shape and range, and how the classes share them."""
    _expect(Path(name).expanduser(), name)
    try:
        sets = {"train": load(name)}
        with suppress(NoSplitError):
            sets["test"] = load(name, "test")
    except DemurError as error:
        return CheckResult(name, "bad", str(error))
    first = sets["train"]
    channels, height, width = first.images.shape[1:]
    low, high = (min(int(one.images.min()) for one in sets.values()), max(int(one.images.max()) for one in sets.values()))
    counts = first.counts()
    fewest, most = (f"{int(counts[label]):,} ({first.class_names[label]})" for label in (counts.argmin(), counts.argmax()))
    reason = (
        f"{counted({split: len(one) for split, one in sets.items()})} images of {width}x{height} {'grey' if channels == 1 else 'colour'}, "
        f"pixels from {low} to {high}; {first.num_classes} classes, {fewest} to {most} images of each"
    )
    return CheckResult(name, "ok", reason)


def counted(images: Mapping[str, int]) -> str:
    """The images of each split, as in "60,000 + 10,000"."""
    return " + ".join(f"{count:,}" for count in images.values())


def _expect(path: Path, name: str) -> None:
    """Raise DemurError where a name that no data set has is of no file or folder either."""
    try:
        if path.exists():
            return
    except OSError as error:
        raise DemurError(f"cannot read {path}: {error.strerror}.") from error
    if len(path.parts) > 1 or path.suffix == ".npz":
        raise DemurError(f"{name}: there is no data set of this name, and no such file or folder.")
    raise DemurError(f"{unknown('data set', name, SOURCES)} There is no such file or folder, either.")


def _wrong_checksum(name: str, layout: Layout, root: Path) -> str:
    """The first file that is not the known one; "" if there is none."""
    for file, checksum in layout.files.items():
        if checksum and file_digest(root / file) != checksum:
            return f"{root / file} has the wrong checksum (SHA-256). Remove it. {_remedy(name, root)}"
    return ""


def _fault(name: str, source: Source, layout: Layout, root: Path) -> str:
    """What is wrong with a data set that is there; "" if nothing is."""
    for split, count in layout.images.items():
        try:
            images = load(name, split, root)
        except DemurError as error:
            return str(error)
        if len(images) != count:
            return f"{split} has {len(images):,} images, not {count:,}."
        present = int((images.counts() > 0).sum())
        if present != source.classes:
            return f"{split} has images of {present} classes, not {source.classes}."
        low, high = int(images.images.min()), int(images.images.max())
        if (low, high) != (0, 255):
            return f"{split} has pixels from {low} to {high}, not from 0 to 255."
    return ""


def _source(name: str) -> Source:
    if name not in SOURCES:
        raise unknown("data set", name, SOURCES)
    return SOURCES[name]


def _missing(name: str, root: Path) -> str:
    files = [next(file for file in layout.files if not (root / file).is_file()) for layout in SOURCES[name].layouts]
    return f"{name}: there is no {' nor '.join(files)} in {root}."


def _remedy(name: str, root: Path) -> str:
    source = SOURCES[name]
    command = f"demur data get {source.instead or name} --data-root {quote(str(root))}"
    return f"{name} cannot be downloaded, but {source.instead} can: {command}" if source.instead else f"Get it with: {command}"


@contextmanager
def _damaged(name: str, root: Path) -> Iterator[None]:
    """Inside, what torchvision and the image set object to becomes an error that says what to do."""
    try:
        yield
    except (RuntimeError, ValueError, TypeError, LookupError, AssertionError, OSError, EOFError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DemurError(f"{name} in {root} is damaged ({reason}). Remove its files there. {_remedy(name, root)}") from error


def _digits(_: Path, split: str) -> ImageSet:
    """scikit-learn's 1,797 handwritten digits (Alpaydin & Kaynak 1998), 8x8 block counts of 0..16, brought to 28x28.

    They look like MNIST's. A fixed, stratified 80:20 split makes `train` and `test`.
    """
    digits = load_digits()
    pixels = functional.pad(torch.from_numpy(digits.images).float()[:, None] / 16, (1, 1, 1, 1))
    pixels = functional.interpolate(pixels, size=(28, 28), mode="bicubic", align_corners=False)
    pixels = (1.5 * (pixels - 0.5) + 0.5).clamp(0, 1)  # strokes as full as MNIST's, which block counts are not
    images = ImageSet((255 * pixels).round().byte(), torch.from_numpy(digits.target).long(), DIGITS)
    train, test = images.split(0.2, seed=0)
    return train if split == "train" else test


def _mnist(root: Path, split: str) -> ImageSet:
    with _damaged("mnist", root):
        mnist = datasets.MNIST(root, train=split == "train")
        return ImageSet(mnist.data[:, None], mnist.targets, DIGITS)


def _emnist(variant: str) -> Callable[[Path, str], ImageSet]:
    def read(root: Path, split: str) -> ImageSet:
        with _damaged(f"emnist-{variant}", root):
            emnist = datasets.EMNIST(root, variant, train=split == "train")
            first = 1 if variant == "letters" else 0  # its labels count from 1
            upright = emnist.data.transpose(1, 2).contiguous()  # the files hold each image transposed
            return ImageSet(upright[:, None], emnist.targets - first, tuple(emnist.classes[first:]))

    return read


def _cifar10(root: Path, split: str) -> ImageSet:
    with _damaged("cifar10", root):
        # The official batches are pickles. torchvision verifies the md5 of each before it unpickles any.
        cifar10 = datasets.CIFAR10(root, train=split == "train")
        images = torch.from_numpy(cifar10.data).permute(0, 3, 1, 2).contiguous()
        return ImageSet(images, torch.tensor(cifar10.targets), CIFAR10_CLASSES)


def _emnist_source(variant: str, train: int, test: int, about: str) -> Source:
    parts = ("train-images-idx3", "train-labels-idx1", "test-images-idx3", "test-labels-idx1")
    files = {f"EMNIST/raw/emnist-{variant}-{part}-ubyte": "" for part in parts}
    classes = len(datasets.EMNIST.classes_split_dict[variant]) - (variant == "letters")
    return Source(
        f"EMNIST {about} (Cohen et al. 2017), 28x28 grey",
        classes,
        (Layout(files, {"train": train, "test": test}, _emnist(variant)),),
        downloads.EMNIST,
    )


SOURCES: Mapping[str, Source] = {
    "digits": Source(
        "scikit-learn's handwritten digits, 8x8 brought to 28x28 grey",
        10,
        (Layout({}, {"train": 1438, "test": 359}, _digits),),
    ),
    "mnist": Source(
        "MNIST handwritten digits (LeCun et al. 1998), 28x28 grey",
        10,
        (
            Layout(
                {f"MNIST/raw/{file}": checksum for file, checksum in MNIST_SHA256.items()},
                {"train": 60_000, "test": 10_000},
                _mnist,
            ),
        ),
        downloads.MNIST,
    ),
    "emnist-balanced": _emnist_source("balanced", 112_800, 18_800, "digits and letters, as many of each of 47 classes"),
    "emnist-bymerge": _emnist_source("bymerge", 697_932, 116_323, "digits and letters, letters of similar case merged"),
    "emnist-byclass": _emnist_source("byclass", 697_932, 116_323, "digits and letters, upper and lower case apart"),
    "emnist-letters": _emnist_source("letters", 124_800, 20_800, "letters, upper and lower case together"),
    "emnist-digits": _emnist_source("digits", 240_000, 40_000, "digits"),
    "emnist-mnist": _emnist_source("mnist", 60_000, 10_000, "digits, as many as MNIST"),
    "emnist-merge": Source(
        "EMNIST By Merge, the part packed with this project's data: one file, no official split, 28x28 grey",
        47,
        (
            Layout(
                {"emnist_merge.npz": "2871ad3c78ff40c0e0ff3e4c10ddc6e1492d1a17a1120fcb4c281e12181b3893"},
                {"train": 299_933},
                lambda root, split: read_npz(root / "emnist_merge.npz", split),
            ),
        ),
        instead="emnist-bymerge",
    ),
    "cifar10": Source(
        "CIFAR-10 photographs of 10 kinds of things (Krizhevsky 2009), 32x32 colour",
        10,
        (
            Layout(  # no SHA-256: torchvision verifies the md5 of each file when it is read
                {f"cifar-10-batches-py/{file}": "" for file in (*CIFAR10_BATCHES, "batches.meta")},
                {"train": 50_000, "test": 10_000},
                _cifar10,
            ),
            Layout(  # the packed part: 25,000 and 5,000 of the images
                {"cifar10.npz": "acdf8adfd4cdbbb89fe23fe4c950fcf0e6eb8d9d2cb786658a5aa6d99021a9b3"},
                {"train": 25_000, "test": 5_000},
                lambda root, split: read_npz(root / "cifar10.npz", split, CIFAR10_CLASSES),
            ),
        ),
        downloads.CIFAR10,
    ),
}
