"""Labelled images in memory, and seeded ways to split them and to draw from them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

import torch
from torch import Tensor

from demur.classifier import check_images
from demur.data.checks import check_labelled, checked_indices
from demur.data.sampling import draw, proportional_quota, stratified_folds, stratified_sample
from demur.errors import DemurError, unknown
from demur.files import digest

_CHUNK = 10_000  # images that are copied at a time


def to_float(images: Tensor) -> Tensor:
    """Convert uint8 images to float32 in [0, 1].

    Parameters
    ----------
    images : Tensor
        Images of any shape, uint8, or floating point in [0, 1].

    Returns
    -------
    Tensor
        uint8 images divided by 255; floating-point images as float32.

    Raises
    ------
    DemurError
        For floating-point images outside [0, 1], and for other dtypes.

    Examples
    --------
    >>> to_float(torch.tensor([[[[0, 51, 255]]]], dtype=torch.uint8)).flatten().tolist()
    [0.0, 0.20000000298023224, 1.0]
    """
    if images.dtype == torch.uint8:
        return images.to(torch.float32).div_(255)
    check_images(images)
    return images.to(torch.float32)


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Labelled images with named classes.

    A subset keeps all K classes, including classes without images, so that a label keeps its
    meaning.

    Parameters
    ----------
    images : Tensor
        uint8 images (N, C, H, W), N at least 1.
    labels : Tensor
        int64 labels (N,) in 0..K-1.
    class_names : tuple of str
        K different names, K at least 2.
    name : str, default="images"
        Name of the set, for messages.
    notes : tuple of str, default=()
        Sentences about what was done to read the images, for a report.

    Raises
    ------
    DemurError
        If the parts do not fit each other.

    Examples
    --------
    >>> images = torch.zeros(3, 1, 2, 2, dtype=torch.uint8)
    >>> ImageSet(images, torch.tensor([0, 1, 1]), ("cat", "dog"), "pets")
    ImageSet('pets': 3 images of 1x2x2, 2 classes)
    """

    images: Tensor
    labels: Tensor
    class_names: tuple[str, ...]
    name: str = "images"
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check_images(self.images)
        check_labelled(self.labels, len(self.images), self.class_names)

    def __repr__(self) -> str:
        shape = "x".join(map(str, self.image_shape))
        return (
            f"ImageSet({self.name!r}: {len(self):,} images of {shape}, {self.num_classes} classes)"
        )

    def __len__(self) -> int:
        return len(self.images)

    @property
    def num_classes(self) -> int:
        """K, the number of classes."""
        return len(self.class_names)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of each image."""
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    def counts(self) -> Tensor:
        """Count the images of each class, as (K,) int64."""
        return torch.bincount(self.labels, minlength=self.num_classes)

    @cached_property
    def hashes(self) -> tuple[str, ...]:
        """The digest of the pixels of each image."""
        return tuple(digest(image.cpu().numpy().tobytes())[:16] for image in self.images)

    def read(self, rows: slice | Tensor) -> Tensor:
        """Give the uint8 images (n, C, H, W) of some rows: a slice, or indices (n,)."""
        return self.images[rows if isinstance(rows, slice) else checked_indices(rows, len(self))]

    @cached_property
    def fingerprint(self) -> str:
        """A digest of the images, the labels and the class names, but not of the name."""
        chunks = (
            digest(self.images[start : start + _CHUNK].cpu().numpy().tobytes())
            for start in range(0, len(self), _CHUNK)
        )
        shape = str(tuple(self.images.shape))
        return digest(shape, *chunks, self.labels.cpu().numpy().tobytes(), str(self.class_names))

    def to_float(self, indices: Tensor | None = None) -> Tensor:
        """Return all images, or those at `indices` (n,), as float32 in [0, 1]."""
        return to_float(self.images if indices is None else self.images[indices])

    def subset(self, indices: Tensor | Sequence[int]) -> "ImageSet":
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
        return ImageSet(
            self.images[chosen], self.labels[chosen], self.class_names, self.name, self.notes
        )

    def sample(self, n: int, seed: int) -> "ImageSet":
        """Draw n images at random, with the classes in their proportions, in the order of this set.

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

        Examples
        --------
        >>> from demur import data
        >>> len(data.load("digits", "test").sample(20, seed=0))
        20
        """
        drawn = stratified_sample(self.labels, self.num_classes, n, seed)
        return self if drawn is None else self.subset(drawn)

    def balanced(self, per_class: int, seed: int) -> "ImageSet":
        """Draw the same number of images of each class at random, in the order of this set.

        Parameters
        ----------
        per_class : int
            Number of images of each class, at least 1.
        seed : int
            Seed of the draw.

        Raises
        ------
        DemurError
            If a class has fewer images.
        """
        counts = self.counts()
        rarest = int(counts.argmin())
        if not 1 <= per_class <= int(counts[rarest]):
            raise DemurError(
                f"cannot draw {per_class} images of each class of {self.name}: "
                f"the rarest, {self.class_names[rarest]!r}, has {int(counts[rarest])}."
            )
        quota = torch.full_like(counts, per_class)
        return self.subset(draw(self.labels, quota, seed, "balanced").nonzero().flatten())

    def split(self, fraction: float, seed: int) -> tuple["ImageSet", "ImageSet"]:
        """Hold out a part of the images at random, with the classes in their proportions.

        Parameters
        ----------
        fraction : float
            Fraction that is held out, in (0, 1).
        seed : int
            Seed of the draw.

        Returns
        -------
        rest, held_out : ImageSet
            Both in the order of this set.

        Raises
        ------
        DemurError
            If either part would be empty.

        Examples
        --------
        >>> from demur import data
        >>> rest, held_out = data.load("digits", "test").split(0.25, seed=0)
        >>> len(rest), len(held_out)
        (269, 90)
        """
        held_out = round(fraction * len(self)) if 0 < fraction < 1 else 0
        if not 0 < held_out < len(self):
            raise DemurError(
                f"cannot hold out {fraction:g} of {len(self)} images: "
                "both sides of a split need at least one."
            )
        quota = proportional_quota(self.counts(), held_out)
        drawn = draw(self.labels, quota, seed, "split")
        return self.subset((~drawn).nonzero().flatten()), self.subset(drawn.nonzero().flatten())

    def folds(self, k: int, seed: int) -> list[tuple[Tensor, Tensor]]:
        """Make k stratified folds for cross-validation.

        Parameters
        ----------
        k : int
            Number of folds, from 2 to the number of images of the rarest class.
        seed : int
            Seed of the draw.

        Returns
        -------
        list of (Tensor, Tensor)
            Training and test indices of each fold. Each image is in one test part.

        Raises
        ------
        DemurError
            If k is out of range. Classes without images do not count.
        """
        counts = self.counts()
        rarest = int(torch.where(counts == 0, len(self) + 1, counts).argmin())
        if k < 2 or int(counts[rarest]) < k:
            raise DemurError(
                f"cannot make {k} folds of {self.name}: k must be at least 2 and at most the "
                f"number of images of the rarest class, {self.class_names[rarest]!r}, "
                f"which has {int(counts[rarest])}."
            )
        return stratified_folds(self.labels, k, seed)

    def select_classes(self, classes: Sequence[str | int]) -> "ImageSet":
        """Keep the images of some classes (names or indices), relabelled in the given order."""
        indices = self.class_indices(classes)
        return self.merge_classes({self.class_names[index]: [index] for index in indices})

    def merge_classes(self, groups: Mapping[str, Sequence[str | int]]) -> "ImageSet":
        """Merge groups of classes into one class each, and drop all other classes.

        Parameters
        ----------
        groups : mapping of str to sequence of str or int
            Name of each new class, with the classes (names or indices) that it takes.

        Returns
        -------
        ImageSet
            The images of the groups, labelled in the order of `groups`.

        Raises
        ------
        DemurError
            For an unknown class, a class in two groups, or groups without any image.

        Examples
        --------
        >>> from demur import data
        >>> digits = data.load("digits", "test")
        >>> digits.merge_classes({"even": "02468", "odd": "13579"}).counts().tolist()
        [178, 181]
        """
        groups = {group: list(classes) for group, classes in groups.items()}
        new_labels = [label for label, classes in enumerate(groups.values()) for _ in classes]
        relabel = torch.full((self.num_classes,), -1)
        indices = self.class_indices(chain(*groups.values()))
        relabel[indices] = torch.tensor(new_labels, dtype=torch.int64)
        labels = relabel[self.labels]
        kept = (labels >= 0).nonzero().flatten()
        return ImageSet(self.images[kept], labels[kept], tuple(groups), self.name)

    def class_indices(self, classes: Iterable[str | int]) -> list[int]:
        """Return the labels of some classes (names or indices).

        Raises
        ------
        DemurError
            For an unknown class, with the nearest name, and for a class that is named twice.
        """
        position = {name: index for index, name in enumerate(self.class_names)}
        indices: list[int] = []
        for name in classes:
            if isinstance(name, str) and name not in position:
                raise unknown("class", name, self.class_names)
            index = position[name] if isinstance(name, str) else int(name)
            if not 0 <= index < self.num_classes:
                raise DemurError(
                    f"there is no class {name}: "
                    f"{self.name} has the classes 0..{self.num_classes - 1}."
                )
            if index in indices:
                raise DemurError(
                    f"class {self.class_names[index]!r} is named twice; "
                    "a class can be in one place only."
                )
            indices.append(index)
        return indices


def _check_images(images: Tensor) -> None:
    if images.dtype != torch.uint8:
        raise DemurError(
            f"an image set holds uint8 images, got {images.dtype}; "
            "multiply images in [0, 1] by 255 and round them."
        )
    shape = tuple(images.shape)
    if images.ndim != 4:
        raise DemurError(f"an image set holds images of shape (N, C, H, W), got {shape}.")
    if images.numel() == 0:
        raise DemurError(f"there are no images: their shape is {shape}.")
