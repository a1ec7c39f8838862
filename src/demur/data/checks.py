"""Checks of the parts of image sets, and of indices into them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from demur.classifier import check_labels
from demur.errors import DemurError


def check_labelled(labels: Tensor, count: int, class_names: Sequence[str]) -> None:
    """Raise DemurError unless `count` images have labels (N,) int64 of at least 2 named classes."""
    if len(class_names) < 2:
        raise DemurError(f"an image set needs at least 2 classes, got {len(class_names)}.")
    if len(set(class_names)) < len(class_names):
        twice = next(name for name in class_names if list(class_names).count(name) > 1)
        raise DemurError(f"class names must differ, but {twice!r} stands for two classes.")
    if labels.dtype != torch.int64:
        raise DemurError(f"labels must be int64, got {labels.dtype}.")
    check_labels(labels, count, len(class_names))


def checked_indices(indices: Tensor | Sequence[int], count: int) -> Tensor:
    """Return indices as int64, or raise DemurError unless they are integers in 0..count-1.

    Examples
    --------
    >>> checked_indices([2, 0], 3)
    tensor([2, 0])
    """
    chosen = torch.as_tensor(indices)
    integers = not chosen.is_floating_point() and chosen.dtype != torch.bool
    if chosen.ndim != 1 or len(chosen) == 0 or not integers:
        raise DemurError("a subset needs a list of at least one index, each an integer.")
    low = int(chosen.min())
    high = int(chosen.max())
    if low < 0 or high >= count:
        raise DemurError(f"indices must lie in 0..{count - 1}, but reach from {low} to {high}.")
    return chosen.long().cpu()


def row_numbers(rows: slice | Tensor, count: int) -> list[int]:
    """List the rows that a slice or indices name, out of `count`.

    Examples
    --------
    >>> row_numbers(slice(1, 9), 4)
    [1, 2, 3]
    """
    if isinstance(rows, slice):
        return list(range(count)[rows])
    return checked_indices(rows, count).tolist()
