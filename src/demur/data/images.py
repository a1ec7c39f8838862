"""Labelled images in memory, and the seeded ways to choose among them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

import numpy as np
import torch
from sklearn.model_selection import StratifiedKFold
from torch import Tensor

from demur.classifier import check_images, check_labels
from demur.errors import DemurError, unknown
from demur.files import digest
from demur.seeds import derive, generator


def as_floats(images: Tensor) -> Tensor:
    """Convert uint8 images to float32 in [0, 1]; float images pass, as float32.

    Raises: DemurError for float images that are not in [0, 1], and for any other dtype.
    """
    if images.dtype == torch.uint8:
        return images.to(torch.float32).div_(255)
    check_images(images)
    return images.to(torch.float32)


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Labelled images: uint8 (N, C, H, W), labels (N,) int64 in 0..K-1, the K classes' names, and a name for the set.

    Subsets keep all K classes, even those that no image is left of, so that labels keep their meaning.

    Raises: DemurError where the parts do not fit each other, there is no image, or fewer than 2 classes.
    """

    images: Tensor
    labels: Tensor
    class_names: tuple[str, ...]
    name: str = "images"

    def __post_init__(self) -> None:
        if self.images.dtype != torch.uint8:
            raise DemurError(f"an image set holds uint8 images, not {self.images.dtype}; round images in [0, 1] times 255.")
        if self.images.ndim != 4:
            raise DemurError(f"an image set holds images of shape (N, C, H, W), not {tuple(self.images.shape)}.")
        if self.images.numel() == 0:
            raise DemurError(f"there are no images: their shape is {tuple(self.images.shape)}.")
        if len(self.class_names) < 2:
            raise DemurError(f"an image set needs at least 2 classes, not {len(self.class_names)}.")
        if len(set(self.class_names)) < len(self.class_names):
            twice = next(name for name in self.class_names if self.class_names.count(name) > 1)
            raise DemurError(f"class names must differ, but {twice!r} stands for two classes.")
        if self.labels.dtype != torch.int64:
            raise DemurError(f"labels must be int64, not {self.labels.dtype}.")
        check_labels(self.labels, len(self.images), self.num_classes)

    def __repr__(self) -> str:
        shape = "x".join(map(str, self.images.shape[1:]))
        return f"ImageSet({self.name!r}: {len(self):,} images of {shape}, {self.num_classes} classes)"

    def __len__(self) -> int:
        return len(self.images)

    @property
    def num_classes(self) -> int:
        """K, the number of classes."""
        return len(self.class_names)

    def counts(self) -> Tensor:
        """Count the images of each class: (K,) int64."""
        return torch.bincount(self.labels, minlength=self.num_classes)

    @cached_property
    def fingerprint(self) -> str:
        """A digest of the images, labels and class names: two sets share it exactly if they hold the same."""
        chunks = (
            digest(self.images[start : start + 10_000].cpu().numpy().tobytes()) for start in range(0, len(self), 10_000)
        )  # never a second copy of all
        shape = str(tuple(self.images.shape))
        return digest(shape, *chunks, self.labels.cpu().numpy().tobytes(), str(self.class_names))

    def floats(self, indices: Tensor | None = None) -> Tensor:
        """The images, or those at `indices` (n,), as float32 in [0, 1]: (n, C, H, W)."""
        return as_floats(self.images if indices is None else self.images[indices])

    def subset(self, indices: Tensor | Sequence[int]) -> "ImageSet":
        """Take the images at `indices`, in that order.

        Raises: DemurError if they are none, not integers, or beyond the set.
        """
        chosen = torch.as_tensor(indices)
        if chosen.ndim != 1 or len(chosen) == 0 or chosen.is_floating_point() or chosen.dtype == torch.bool:
            raise DemurError("a subset needs a list of at least one index, each an integer.")
        if int(chosen.min()) < 0 or int(chosen.max()) >= len(self):
            raise DemurError(f"indices must lie in 0..{len(self) - 1}, but reach from {int(chosen.min())} to {int(chosen.max())}.")
        chosen = chosen.long()
        return ImageSet(self.images[chosen], self.labels[chosen], self.class_names, self.name)

    def take(self, n: int, seed: int) -> "ImageSet":
        """Draw n images at random, in the order of the set, the classes in their proportions; all if it has no more."""
        if n < 1:
            raise DemurError(f"cannot take {n} images; take at least 1.")
        return self if n >= len(self) else self.subset(self._drawn(self._quota(n), seed, "take").nonzero().flatten())

    def balanced(self, per_class: int, seed: int) -> "ImageSet":
        """Draw `per_class` images of each class at random, in the order of the set.

        Raises: DemurError naming the rarest class and its count, if they are too few.
        """
        counts = self.counts()
        rarest = int(counts.argmin())
        if not 1 <= per_class <= int(counts[rarest]):
            raise DemurError(
                f"cannot draw {per_class} images of each class of {self.name}: "
                f"the rarest, {self.class_names[rarest]!r}, has {int(counts[rarest])}."
            )
        quota = torch.full_like(counts, per_class)
        return self.subset(self._drawn(quota, seed, "balanced").nonzero().flatten())

    def split(self, fraction: float, seed: int) -> tuple["ImageSet", "ImageSet"]:
        """Split at random into (the rest, the held-out `fraction`), the classes in their proportions in both.

        Raises: DemurError unless both sides get an image.
        """
        held_out = round(fraction * len(self)) if 0 < fraction < 1 else 0
        if not 0 < held_out < len(self):
            raise DemurError(f"cannot hold out {fraction:g} of {len(self)} images: both sides of a split need at least one.")
        drawn = self._drawn(self._quota(held_out), seed, "split")
        return self.subset((~drawn).nonzero().flatten()), self.subset(drawn.nonzero().flatten())

    def folds(self, k: int, seed: int) -> list[tuple[Tensor, Tensor]]:
        """Make k stratified folds: (training indices, test indices); each image is tested in exactly one.

        Raises: DemurError if k < 2, or a class that has images has fewer than k.
        """
        counts = self.counts()
        rarest = int(torch.where(counts == 0, len(self) + 1, counts).argmin())
        if k < 2 or int(counts[rarest]) < k:
            raise DemurError(
                f"cannot make {k} folds of {self.name}: at least 2, and no more than the images of the rarest class, "
                f"{self.class_names[rarest]!r}, which has {int(counts[rarest])}."
            )
        # scikit-learn takes seeds of 32 bits only
        folds = StratifiedKFold(k, shuffle=True, random_state=derive(seed, "folds", k) % 2**32)
        labels = self.labels.numpy()
        return [(torch.from_numpy(train), torch.from_numpy(test)) for train, test in folds.split(np.zeros(len(labels)), labels)]

    def only(self, classes: Sequence[str | int]) -> "ImageSet":
        """Keep the images of these classes (names or indices), relabelled in the given order."""
        indices = self.class_indices(classes)
        return self.merged({self.class_names[index]: [index] for index in indices})

    def merged(self, groups: Mapping[str, Sequence[str | int]]) -> "ImageSet":
        """Make one class of each group of classes, in the given order and under the group's name; others are left out.

        Raises: DemurError for an unknown class, one that is in two groups, or groups without any image.
        """
        groups = {group: list(classes) for group, classes in groups.items()}
        labels_of_groups = [label for label, classes in enumerate(groups.values()) for _ in classes]
        relabel = torch.full((self.num_classes,), -1)
        relabel[self.class_indices(chain(*groups.values()))] = torch.tensor(labels_of_groups, dtype=torch.int64)
        labels = relabel[self.labels]
        kept = (labels >= 0).nonzero().flatten()
        return ImageSet(self.images[kept], labels[kept], tuple(groups), self.name)

    def class_indices(self, classes: Iterable[str | int]) -> list[int]:
        """Find the labels of these classes (names or indices).

        Raises: DemurError for an unknown class, with the nearest name, and for one that is named twice.
        """
        position = {name: index for index, name in enumerate(self.class_names)}
        indices: list[int] = []
        for name in classes:
            if isinstance(name, str) and name not in position:
                raise unknown("class", name, self.class_names)
            index = position[name] if isinstance(name, str) else int(name)
            if not 0 <= index < self.num_classes:
                raise DemurError(f"there is no class {name}: {self.name} has the classes 0..{self.num_classes - 1}.")
            if index in indices:
                raise DemurError(f"class {self.class_names[index]!r} is named twice; it can only be in one place.")
            indices.append(index)
        return indices

    def _quota(self, n: int) -> Tensor:
        """How many of n images fall to each class, in proportion to the counts (largest remainders): (K,) int64."""
        counts = self.counts()
        exact = counts.double() * n / len(self)
        quota = exact.floor().long()
        short = n - int(quota.sum())
        quota[(exact - quota).argsort(descending=True, stable=True)[:short]] += 1
        return quota

    def _drawn(self, quota: Tensor, seed: int, purpose: str) -> Tensor:
        """Mark `quota` (K,) images of each class, drawn at random: (N,) bool."""
        order = torch.randperm(len(self), generator=generator(seed, purpose))
        order = order[self.labels[order].argsort(stable=True)]  # by class, at random within each
        labels = self.labels[order]
        rank = torch.arange(len(self)) - (self.counts().cumsum(0) - self.counts())[labels]
        drawn = torch.zeros(len(self), dtype=torch.bool)
        drawn[order[rank < quota[labels]]] = True
        return drawn
