"""What an evaluation asks of labelled images, whether they lie in memory or in files."""

from collections.abc import Sequence
from typing import Protocol, Self

from torch import Tensor

from demur.data.images import ImageSet


class ImageSource(Protocol):
    """Labelled images: an `ImageSet` in memory, or images that are decoded on demand.

    `ImageSet`, `ImageFiles` and `ResizedImages` satisfy this protocol.
    """

    @property
    def labels(self) -> Tensor:
        """Labels (N,) int64 in 0..K-1."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """K different names."""

    @property
    def name(self) -> str:
        """Name of the images, for tables and messages."""

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences about what was done to read the images, for a report."""

    @property
    def num_classes(self) -> int:
        """K, the number of classes."""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of each image."""

    @property
    def fingerprint(self) -> str:
        """A digest of the content, the labels and the class names."""

    @property
    def hashes(self) -> tuple[str, ...]:
        """The hash of the content of each image."""

    def __len__(self) -> int:
        """Count the images."""

    def counts(self) -> Tensor:
        """Count the images of each class, as (K,) int64."""

    def read(self, rows: slice | Tensor) -> Tensor:
        """Give the uint8 images (n, C, H, W) of some rows."""

    def subset(self, indices: Tensor | Sequence[int]) -> Self:
        """Select the images at `indices`, in that order."""

    def sample(self, n: int, seed: int) -> Self:
        """Draw n images at random, with the classes in their proportions."""


def in_memory(source: ImageSource) -> ImageSet:
    """Read all images of a source into memory.

    Parameters
    ----------
    source : ImageSource
        The images.

    Returns
    -------
    ImageSet
        The same images, labels, class names, name and notes. An `ImageSet` is returned unchanged.

    Raises
    ------
    DemurError
        If a file cannot be read.

    Examples
    --------
    >>> from demur import data
    >>> digits = data.load("digits", "test")
    >>> in_memory(digits) is digits
    True
    """
    if isinstance(source, ImageSet):
        return source
    pixels = source.read(slice(None))
    return ImageSet(pixels, source.labels, source.class_names, source.name, source.notes)
