"""The images of an audit."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from demur.classifier import Classifier, check_images
from demur.data import FoundImages, ImageFiles, ImageSet, ImageSource, find_images
from demur.data.decoding import read_image, read_size
from demur.data.listing import Listing
from demur.data.threads import in_threads
from demur.errors import DemurError
from demur.networks import imagenet

SAMPLE: Final = 256
"""Images of the handshake; fewer where they are large."""
PIXELS: Final = 1 << 22
NAMED: Final = 10
"""Image files that a message names."""


def find(
    data: str | Path | ImageSource | tuple[Tensor, Tensor], options: Mapping[str, Any]
) -> FoundImages | ImageSource | tuple[Tensor, Tensor]:
    """Find the images, before a model is loaded."""
    if isinstance(data, str | Path):
        return find_images(data, **options)
    if options:
        raise DemurError(f"{next(iter(options))} applies to data that is read from a path or name.")
    return data


def image_shape_of(
    data: FoundImages | ImageSource | tuple[Tensor, Tensor],
) -> tuple[int, ...]:
    """Give the shape of the data's own images, as no model was loaded yet."""
    if isinstance(data, tuple):
        return tuple(data[0].shape[1:])
    if not isinstance(data, FoundImages):
        return data.image_shape
    with all_named(data):
        return replace(data, label_map={}).read().image_shape


def images_for(
    data: FoundImages | ImageSource | tuple[Tensor, Tensor], classifier: Classifier
) -> ImageSource:
    """Give the images as the classifier takes them."""
    if isinstance(data, FoundImages):
        return data.read(classifier.preprocess, _names_of(classifier))
    if not isinstance(data, tuple):
        return data
    images, labels = data
    names = classifier.class_names or tuple(map(str, range(classifier.num_classes)))
    if images.dtype != torch.uint8:
        check_images(images)
        images = (255 * images.detach().cpu()).round().to(torch.uint8)
    return ImageSet(images.cpu(), labels.cpu().to(torch.int64), names, "images")


def _names_of(classifier: Classifier) -> list[tuple[str, ...]] | None:
    """Give the names of the classes; those of ImageNet have their WordNet ids beside."""
    if classifier.class_names is None:
        return None
    names: list[tuple[str, ...]] = [(name,) for name in classifier.class_names]
    if classifier.class_names == imagenet.CLASSES:
        ids = imagenet.wordnet_ids()
        return [(*name, one) for name, one in zip(names, ids, strict=True)]
    return names


def sample_of(images: ImageSource, seed: int) -> ImageSource:
    """Draw the images of the handshake."""
    channels, height, width = images.image_shape
    most = max(32, min(SAMPLE, PIXELS // (channels * height * width)))
    return images.sample(min(most, len(images)), seed)


def check_readable(images: ImageSource) -> None:
    """Decode each image file once, before anything is computed.

    Raises
    ------
    DemurError
        If some cannot be read. The message names them: all of them, up to `NAMED`.
    """
    if isinstance(images, ImageFiles):
        _check_each(images.paths, read_image)


@contextmanager
def all_named(data: object) -> Iterator[None]:
    """Inside, an error of one file becomes an error of all files whose headers cannot be read."""
    try:
        yield
    except DemurError:
        if isinstance(data, FoundImages) and isinstance(data.content, Listing):
            _check_each(data.content.paths, read_size)
        raise


def _check_each(paths: Sequence[str], read: Callable[[Path], object]) -> None:
    """Read each file, and raise DemurError for those that cannot be read."""

    def fault(path: str) -> str:
        try:
            read(Path(path))
        except DemurError as error:
            return str(error)
        return ""

    faults = list(filter(None, in_threads(fault, paths)))
    if not faults:
        return
    if len(faults) == 1:
        raise DemurError(faults[0])
    more = f" And {len(faults) - NAMED:,} more." if len(faults) > NAMED else ""
    raise DemurError(
        f"{len(faults):,} of {len(paths):,} image files cannot be read: repair them or take them "
        f"out. {' '.join(faults[:NAMED])}{more}"
    )


def described(data: object) -> str:
    """Name the data in a report."""
    if isinstance(data, str | Path):
        return str(data)
    return "images in Python" if isinstance(data, tuple) else str(getattr(data, "name", "images"))
