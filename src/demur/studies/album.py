"""Photographs and the networks for ImageNet that are at hand to look at them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from demur import data, masks
from demur.classifier import Classifier
from demur.data import ImageSet, Photo, fitted, read_photos, to_float
from demur.evaluation.scoring import Row, mean_row
from demur.files import digest, file_digest
from demur.metrics import wilson_interval
from demur.networks import CLASSES, Detector, imagenet_network, weights
from demur.networks.imagenet import ImageNetNetwork
from demur.studies.fields import PhotographsProfile

TOPS = {"correct": 1, "top 5": 5, "top 10": 10}
BATCH = 25
"""Photographs at once."""
AVERAGE, ALL = "average of these", "all photographs"


@dataclass(frozen=True)
class Album:
    """The photographs, the networks whose weights are found, and notes on what is missing."""

    photos: list[Photo]
    networks: dict[str, Path]
    notes: tuple[str, ...]

    @property
    def fingerprint(self) -> str:
        """A digest of all photographs, their boxes and classes, and of the networks' weights."""
        said = [
            part
            for photo in self.photos
            for part in (photo.pixels.numpy().tobytes(), str(photo.boxes), str(photo.label))
        ]
        return digest(*said, *(file_digest(path) for path in self.networks.values()))

    def __str__(self) -> str:
        """In a few words."""
        return f"{len(self.photos)} photographs for {', '.join(self.networks)}"


def gather(wanted: PhotographsProfile | None, data_root: Path | None) -> Album | None:
    """Find the photographs and the networks under the data root.

    None where the profile wants none, or where either is missing.
    """
    if wanted is None:
        return None
    known = ((name, weights.find(name, data_root)) for name in wanted.networks)
    networks = {name: path for name, path in known if path is not None}
    folder = data.data_root(data_root) / wanted.folder
    if not networks or not folder.is_dir():
        return None
    photos = read_photos(folder)
    largest = max(imagenet_network(name, path).size for name, path in networks.items())
    enough = [photo for photo in photos if min(photo.size) >= largest][: wanted.images]
    missing = [name for name in wanted.networks if name not in networks]
    notes = [f"No weights of {' and '.join(missing)} are at hand."] if missing else []
    if len(enough) < wanted.images:
        notes.append(
            f"Only {len(enough)} of {len(photos)} photographs are as large as the networks need "
            f"({largest} pixels)."
        )
    return Album(_boxed(enough, data_root), networks, tuple(notes)) if enough else None


def without_album(wanted: PhotographsProfile | None) -> list[str]:
    """Say that there are no photographs, where a profile wants some."""
    return (
        ["no photographs: there is no such folder under the data root, or no weights of a network"]
        if wanted
        else []
    )


def _boxed(photos: Sequence[Photo], data_root: Path | None) -> list[Photo]:
    """Give the detector's boxes to photographs without one, if the detector's weights are found."""
    if (
        all(photo.boxes for photo in photos)
        or weights.find("ssdlite320_mobilenet_v3_large", data_root) is None
    ):
        return list(photos)
    suggested = Detector(root=data_root).boxes([photo.pixels for photo in photos])
    pairs = zip(photos, suggested, strict=True)
    return [
        photo if photo.boxes else Photo(photo.pixels, photo.name, boxes, photo.label)
        for photo, boxes in pairs
    ]


def at_size(photos: Sequence[Photo], resize: int, size: int) -> ImageSet:
    """Photographs as a network sees them: (N, 3, size, size), with ImageNet's classes."""
    pixels = torch.stack([fitted(photo, resize, size).pixels for photo in photos])
    return ImageSet(pixels, _labels(photos), DISTINCT, "photographs")


def _labels(photos: Sequence[Photo]) -> Tensor:
    return torch.tensor([0 if photo.label is None else photo.label for photo in photos])


DISTINCT = tuple(
    name if CLASSES.index(name) == place else f"{name} ({place})"
    for place, name in enumerate(CLASSES)
)
"""ImageNet's class names. Two names stand for two classes each: the second gets its number."""


def seen_by(classifier: Classifier, photos: Sequence[Photo]) -> tuple[ImageSet, Tensor]:
    """Give the photographs as a network of `Public` sees them, and a mask (N, 1, H, W) of
    their objects: their boxes or, without a box, where the network itself sees the class.
    """
    (network,) = cast(nn.Sequential, classifier.module)
    assert isinstance(network, ImageNetNetwork)
    images = at_size(photos, network.resize, network.size)
    boxes = [fitted(photo, network.resize, network.size).boxes for photo in photos]
    inside = masks.inside_boxes((network.size, network.size), boxes)
    without = torch.tensor([not own for own in boxes])
    if bool(without.any()):
        seen = images.to_float(without)
        inside[without] = masks.class_activation(classifier, seen, images.labels[without])
    return images, inside


def answers(
    classifier: Classifier,
    photos: ImageSet,
    names: Sequence[str],
    sent: Tensor | None = None,
) -> list[Row]:
    """Measure the answers to photographs, or to what was `sent` in their place in 8 bits.

    Of each of the first ones, which have names, and of their average: the pixels that differ in %,
    whether its class is among the first ones in %, the confidence in its class, and the number of
    the class that scores highest. Of all photographs: the same, and how many are not altered.
    """
    pixels = photos.images if sent is None else sent
    scores = torch.cat([classifier.scores(to_float(part)) for part in torch.split(pixels, BATCH)])
    own = scores.gather(1, photos.labels[:, None])
    altered = (pixels != photos.images).any(1).double().mean((1, 2))
    columns = {"altered": 100 * altered}
    for column, limit in TOPS.items():
        columns[column] = 100 * ((scores > own).sum(1) < limit).double()
    columns["confidence"] = scores.softmax(1).gather(1, photos.labels[:, None])[:, 0]
    rows = []
    for place, name in enumerate(names):
        each = {**columns, "guess": scores.argmax(1)}
        rows += [
            Row(f"{name}: {column}", float(values[place]), 1) for column, values in each.items()
        ]
    for column, values in columns.items():
        rows.append(mean_row(f"{AVERAGE}: {column}", values[: len(names)]))
    for column, values in {**columns, "not altered": 100 * (altered == 0).double()}.items():
        found = mean_row(f"{ALL}: {column}", values)
        if column in (*TOPS, "not altered"):
            low, high = wilson_interval(float(values.sum()) / 100, len(values))
            found = replace(found, low=100 * low, high=100 * high)
        rows.append(found)
    return rows
