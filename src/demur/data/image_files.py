"""Labelled images that are decoded on demand: memory does not grow with their number."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from demur.classifier import Preprocess
from demur.data.checks import check_labelled, checked_indices, row_numbers
from demur.data.decoding import hash_image_file, read_image, read_size
from demur.data.geometry import fit_pixels, geometry_text
from demur.data.images import ImageSet
from demur.data.messages import printable
from demur.data.sampling import stratified_sample
from demur.data.threads import in_threads
from demur.errors import DemurError
from demur.files import digest

_Streamed = TypeVar("_Streamed", "ImageFiles", "ResizedImages")


@dataclass(frozen=True, eq=False)
class ImageFiles:
    """Labelled image files. Images are decoded, resized and cropped when they are read.

    A set of a million files holds their paths, labels and hashes only. Each file is read once for
    its hash, when `hashes` or `fingerprint` is asked for, and once each time that its pixels are.

    Parameters
    ----------
    paths : tuple of str
        N files, at least 1.
    labels : Tensor
        int64 labels (N,) in 0..K-1.
    class_names : tuple of str
        K different names, K at least 2.
    name : str, default="images"
        Name of the set, for tables and messages.
    preprocess : Preprocess, default=Preprocess()
        Size, resize, interpolation and channels of the images. Its mean and std are not applied:
        they belong to the model. Without a size, all images must have the same one.
    notes : tuple of str, default=()
        Sentences about what was done to read the images, for a report.

    Raises
    ------
    DemurError
        If the parts do not fit each other. Files are opened later.

    Examples
    --------
    >>> import tempfile
    >>> from PIL import Image
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     paths = tuple(str(Path(folder, f"{number}.png")) for number in range(3))
    ...     for path in paths:
    ...         Image.new("RGB", (300, 200)).save(path)
    ...     preprocess = Preprocess(size=(224, 224), resize=256)
    ...     files = ImageFiles(paths, torch.tensor([0, 1, 1]), ("cat", "dog"), "pets", preprocess)
    ...     files, files.read(slice(0, 2)).shape
    (ImageFiles('pets': 3 files, 2 classes), torch.Size([2, 3, 224, 224]))
    """

    paths: tuple[str, ...]
    labels: Tensor
    class_names: tuple[str, ...]
    name: str = "images"
    preprocess: Preprocess = field(default_factory=Preprocess)
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.paths:
            raise DemurError("there are no image files.")
        check_labelled(self.labels, len(self.paths), self.class_names)

    def __repr__(self) -> str:
        return f"ImageFiles({self.name!r}: {len(self):,} files, {self.num_classes} classes)"

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def num_classes(self) -> int:
        """K, the number of classes."""
        return len(self.class_names)

    def counts(self) -> Tensor:
        """Count the images of each class, as (K,) int64."""
        return torch.bincount(self.labels, minlength=self.num_classes)

    @cached_property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of each image.

        Raises
        ------
        DemurError
            If the model's size is not known and two images differ in size.
        """
        if self.preprocess.size is not None:
            return (self.preprocess.channels, *self.preprocess.size)
        sizes = in_threads(_size_of, self.paths)
        first = next(sizes)
        for path, size in zip(self.paths[1:], sizes, strict=True):
            if size != first:
                raise _sizes_differ(self.paths[0], first, path, size)
        return (self.preprocess.channels, *first)

    @cached_property
    def hashes(self) -> tuple[str, ...]:
        """The digest of the bytes of each file.

        Raises
        ------
        DemurError
            If a file is missing or no image.
        """
        return tuple(in_threads(_hash_of, self.paths))

    @cached_property
    def fingerprint(self) -> str:
        """A digest of the files' content, the geometry, the labels and the class names."""
        labels = self.labels.cpu().numpy().tobytes()
        geometry = geometry_text(self.preprocess)
        return digest("files", geometry, *self.hashes, labels, str(self.class_names))

    def read(self, rows: slice | Tensor) -> Tensor:
        """Decode some images.

        Parameters
        ----------
        rows : slice or Tensor
            A range of rows, or indices (n,).

        Returns
        -------
        Tensor
            uint8 images (n, C, H, W).

        Raises
        ------
        DemurError
            If a file cannot be read, or changed after its hash was computed.
        """
        return _stacked(self._pixels, row_numbers(rows, len(self)), self.image_shape)

    def _pixels(self, row: int) -> NDArray[np.uint8]:
        path = Path(self.paths[row])
        pixels = fit_pixels(read_image(path), self.preprocess, path)
        if "hashes" in vars(self) and hash_image_file(path) != self.hashes[row]:
            raise DemurError(
                f"{printable(path)} changed while it was used. Start again with files that stay."
            )
        if pixels.shape != self.image_shape:
            size = pixels.shape[1], pixels.shape[2]
            raise _sizes_differ(self.paths[0], self.image_shape[1:], str(path), size)
        return pixels

    def subset(self, indices: Tensor | Sequence[int]) -> "ImageFiles":
        """Select the images at `indices`, in that order.

        Parameters
        ----------
        indices : Tensor or sequence of int
            At least one integer in 0..N-1.

        Raises
        ------
        DemurError
            If `indices` is empty, holds no integers, or reaches beyond the set.
        """
        chosen = checked_indices(indices, len(self))
        rows = chosen.tolist()
        part = replace(
            self, paths=tuple(self.paths[row] for row in rows), labels=self.labels[chosen]
        )
        # What is known of the files is kept, so that they are read once.
        if "image_shape" in vars(self):
            vars(part)["image_shape"] = self.image_shape
        if "hashes" in vars(self):
            vars(part)["hashes"] = tuple(self.hashes[row] for row in rows)
        return part

    def sample(self, n: int, seed: int) -> "ImageFiles":
        """Draw n images at random, with the classes in their proportions, in the order of this set.

        The draw is that of `ImageSet.sample` for the same labels.

        Parameters
        ----------
        n : int
            Number of images, at least 1. If the set has no more, the whole set is returned.
        seed : int
            Seed of the draw.

        Raises
        ------
        DemurError
            If n is less than 1.
        """
        return _sampled(self, n, seed)


@dataclass(frozen=True, eq=False)
class ResizedImages:
    """Images in memory that are brought to the size and the channels of a model when read.

    Parameters
    ----------
    base : ImageSet
        The images in their own size.
    preprocess : Preprocess
        Size, resize, interpolation and channels. Its mean and std are not applied.
    notes : tuple of str, default=()
        Sentences about what was done to read the images, for a report.

    Examples
    --------
    >>> from demur import data
    >>> digits = data.load("digits", "test")
    >>> resized = ResizedImages(digits, Preprocess(size=(64, 64)))
    >>> resized.image_shape, resized.hashes == digits.hashes
    ((3, 64, 64), True)
    """

    base: ImageSet
    preprocess: Preprocess
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        shape = "x".join(map(str, self.image_shape))
        return (
            f"ResizedImages({self.name!r}: {len(self):,} images of {shape}, "
            f"{self.num_classes} classes)"
        )

    def __len__(self) -> int:
        return len(self.base)

    @property
    def labels(self) -> Tensor:
        """Labels (N,) int64 in 0..K-1."""
        return self.base.labels

    @property
    def class_names(self) -> tuple[str, ...]:
        """K different names."""
        return self.base.class_names

    @property
    def name(self) -> str:
        """Name of the set."""
        return self.base.name

    @property
    def num_classes(self) -> int:
        """K, the number of classes."""
        return self.base.num_classes

    def counts(self) -> Tensor:
        """Count the images of each class, as (K,) int64."""
        return self.base.counts()

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of each image."""
        return (self.preprocess.channels, *(self.preprocess.size or self.base.image_shape[1:]))

    @property
    def hashes(self) -> tuple[str, ...]:
        """The digest of the pixels of each image in its own size."""
        return self.base.hashes

    @cached_property
    def fingerprint(self) -> str:
        """A digest of the images in their own size, the geometry, the labels and the names."""
        return digest("resized", geometry_text(self.preprocess), self.base.fingerprint)

    def read(self, rows: slice | Tensor) -> Tensor:
        """Give the uint8 images (n, C, H, W) of some rows: a slice, or indices (n,)."""
        return _stacked(self._pixels, row_numbers(rows, len(self)), self.image_shape)

    def _pixels(self, row: int) -> NDArray[np.uint8]:
        image = self.base.images[row].cpu()
        own = image[0] if len(image) == 1 else image.permute(1, 2, 0)
        return fit_pixels(own.contiguous().numpy(), self.preprocess, f"image {row} of {self.name}")

    def subset(self, indices: Tensor | Sequence[int]) -> "ResizedImages":
        """Select the images at `indices`, in that order, as `ImageSet.subset` does."""
        return replace(self, base=self.base.subset(indices))

    def sample(self, n: int, seed: int) -> "ResizedImages":
        """Draw n images at random, as `ImageSet.sample` does."""
        return _sampled(self, n, seed)


def _sampled(source: _Streamed, n: int, seed: int) -> _Streamed:
    drawn = stratified_sample(source.labels, source.num_classes, n, seed)
    return source if drawn is None else source.subset(drawn)


def _stacked(
    pixels_of: Callable[[int], NDArray[np.uint8]], rows: list[int], shape: tuple[int, int, int]
) -> Tensor:
    """Read some rows in a few threads, each image directly into its place."""
    images = np.empty((len(rows), *shape), np.uint8)

    def fill(place: int) -> None:
        images[place] = pixels_of(rows[place])

    for _ in in_threads(fill, range(len(rows))):
        pass
    return torch.from_numpy(images)


def _size_of(path: str) -> tuple[int, int]:
    return read_size(Path(path))


def _hash_of(path: str) -> str:
    return hash_image_file(Path(path))


def _sizes_differ(
    first: str, size: tuple[int, int], other: str, other_size: tuple[int, int]
) -> DemurError:
    return DemurError(
        f"images differ in size: {printable(first)} is {size[1]}x{size[0]}, {printable(other)} is "
        f"{other_size[1]}x{other_size[0]}. Give the size of the model's images with --img-size."
    )
