"""Which data set an experiment takes, of those that its profile names, and what is said of that."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch

from demur import data, seeds
from demur.data import ImageSet, NoSplitError, SourceStatus
from demur.errors import DemurError
from demur.evaluation.results import Data
from demur.files import digest


def first_at_hand(entries: Sequence[str], known: Mapping[str, SourceStatus]) -> str:
    """Give the first of these data sets that is there, else the first that users can download."""
    there = (entry for entry in entries if entry not in known or known[entry].where)
    downloadable = (entry for entry in entries if known[entry].megabytes)
    return next(there, None) or next(downloadable, entries[0])


def passed_over(entries: Sequence[str], taken: str, root: Path | None) -> str:
    """Say which entries the profile would rather have had."""
    missing = entries[: entries.index(taken)]
    return (
        f"; {' and '.join(missing)}, named first, {'is' if len(missing) == 1 else 'are'} not in "
        f"{data.data_root(root)}"
        if missing
        else ""
    )


def counted(images: ImageSet) -> str:
    """Say what a set is, in a few words."""
    return f"{images.name}, {len(images):,} images of {images.num_classes} classes"


def load_splits(entry: str, root: Path | None, seed: int) -> tuple[ImageSet, ImageSet]:
    """Give training and test images. Without a test split, a fifth of the images is held out."""
    images = load_entry(entry, root)
    try:
        return images, data.load(entry, "test", root)
    except NoSplitError:
        return images.split(0.2, seed)


def load_entry(entry: str, root: Path | None) -> ImageSet:
    """Load a data set, named as in the profile: a file may have the name of another data set."""
    return replace(data.load(entry, root=root), name=entry)


@dataclass(frozen=True)
class Loaded:
    """The data set that was taken of several."""

    entry: str
    images: ImageSet
    where: str
    """"" for a user's file or folder, "embedded", or a place under the data root."""
    missing: str
    """A clause on the sets that are named before it."""


def load_first(entries: Sequence[str], root: Path | None) -> Loaded:
    """Load the first of these data sets that is there."""
    known = {status.name: status for status in data.list_datasets(root)}
    entry = first_at_hand(entries, known)
    images = load_entry(entry, root)
    where = known[entry].where if entry in known else ""
    return Loaded(entry, images, where or "", passed_over(entries, entry, root))


class SetWanted(Protocol):
    """What a profile says of one of several data sets."""

    @property
    def data(self) -> Sequence[str]:
        """Entries, of which the first that is there is taken."""

    @property
    def train_images(self) -> int | None:
        """How many to train on; all if None."""


Settings = TypeVar("Settings", bound=SetWanted)


@dataclass(frozen=True)
class Part(Generic[Settings]):
    """One of several data sets: its settings, the images to train on, and those to attack."""

    settings: Settings
    train: ImageSet
    test: ImageSet
    rooted: bool
    taken: str
    """Which set it is, in a few words."""

    @property
    def size(self) -> int:
        """Pixels a side."""
        return self.test.images.shape[3]

    @property
    def fingerprint(self) -> str:
        """A digest of all its images."""
        return digest(self.train.fingerprint, self.test.fingerprint)


def gather_part(
    settings: Settings,
    attacked: int,
    data_root: Path | None,
    seed: int,
    said: str = "attack.images",
) -> Part[Settings]:
    """Load the images of one data set. `said` is what the profile calls the number of attacked
    images.

    Raises
    ------
    DemurError
        For too few images, and for images that are not square.
    """
    known = {status.name: status for status in data.list_datasets(data_root)}
    entry = first_at_hand(settings.data, known)
    train, test = load_splits(entry, data_root, seeds.derive(seed, "test"))
    if settings.train_images is not None:
        if settings.train_images > len(train):
            raise DemurError(
                f"train_images is {settings.train_images}, but {entry} has {len(train)} training "
                "images."
            )
        train = train.sample(settings.train_images, seeds.derive(seed, "train"))
    if attacked > len(test):
        raise DemurError(f"{said} is {attacked}, but {entry} has {len(test)} test images.")
    check_square(test, entry)
    where = known[entry].where if entry in known else ""
    return Part(
        settings,
        train,
        test,
        where not in ("", "embedded"),
        f"{counted(train)}{passed_over(settings.data, entry, data_root)}",
    )


def check_square(images: ImageSet, name: str) -> None:
    """Raise DemurError for images that are not square."""
    _, height, width = images.image_shape
    if height != width:
        raise DemurError(f"the networks need square images; those of {name} are {height}x{width}.")


def in_random_order(images: ImageSet, seed: int) -> ImageSet:
    """Give the same images in random order: the first ones are then a fair sample."""
    return images.subset(
        torch.randperm(len(images), generator=seeds.generator(seed, "in random order"))
    )


def describe_parts(parts: Sequence[Part[Any]], photographs: str | None) -> Data:
    """Say what a run on several sets, and perhaps on photographs, was measured on."""
    names = [part.train.name for part in parts] + (["photographs"] if photographs else [])
    return Data(
        " and ".join(names),
        digest(*(part.fingerprint for part in parts), photographs or ""),
        sum(len(part.train) + len(part.test) for part in parts),
        sum(part.train.num_classes for part in parts),
        photographs is not None or any(part.rooted for part in parts),
    )
