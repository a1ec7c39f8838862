"""Labels that do not fit a model: shifted by one, or of another order of classes.

A check fires only on evidence: models with a low accuracy, few images and unequal classes are
ordinary.
"""

from dataclasses import dataclass
from typing import Final

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from demur.metrics.intervals import paired_p_value

SURE: Final = 1e-4
"""The largest p-value that counts as evidence."""

CONSISTENT: Final = 0.6
"""The smallest mean share, over the classes, of images that another order must explain."""


@dataclass(frozen=True)
class Relabelled:
    """Labels that fit the answers better than the given ones.

    Parameters
    ----------
    before, after : float
        The accuracy with the given labels, and with the better ones.
    pairs : tuple of (int, int)
        Given labels and the classes that the model answers, the most frequent ones first.
    """

    before: float
    after: float
    pairs: tuple[tuple[int, int], ...]


def shifted_labels(classes: Tensor, labels: Tensor, num_classes: int) -> Relabelled | None:
    """Find out whether every label is one too large or one too small.

    Parameters
    ----------
    classes, labels : Tensor of shape (n,), int64
        The best class of each image, and its label.
    num_classes : int

    Returns
    -------
    Relabelled or None
        None unless the shifted labels are better by a paired test (p < 1e-4), at three classes or
        more, and none of them is out of range. The mean accuracy of the classes must at least
        triple: a model that always answers the same class is no evidence.

    Examples
    --------
    >>> labels = torch.arange(40) % 4 + 1
    >>> shifted_labels(labels - 1, labels, 6).pairs[:2]
    ((1, 0), (2, 1))
    """
    before = classes == labels
    present = _present(labels)
    for shift in (-1, 1):
        moved = labels + shift
        if int(moved.min()) < 0 or int(moved.max()) >= num_classes:
            continue
        after = classes == moved
        if len(_present(labels[after])) < 3 or not better(before, after):
            continue
        mean = _mean_of_classes(after, labels)
        if mean >= max(0.2, 3 * _mean_of_classes(before, labels)):
            pairs = tuple((int(one), int(one) + shift) for one in present)
            return Relabelled(share(before), share(after), pairs)
    return None


def permuted_classes(classes: Tensor, labels: Tensor, num_classes: int) -> Relabelled | None:
    """Find out whether the model answers each label as one other class.

    The images of each label are split into halves. One half proposes a different class for each
    label (the assignment that explains most images), and the other half tests it.

    Parameters
    ----------
    classes, labels, num_classes
        As in `shifted_labels`.

    Returns
    -------
    Relabelled or None
        None unless the proposed labels are better by a paired test (p < 1e-4), at three classes or
        more (two if there are only two), and explain most images of most classes.

    Examples
    --------
    >>> labels = torch.arange(40) % 4
    >>> permuted_classes(torch.tensor([2, 3, 1, 0])[labels], labels, 4).pairs
    ((0, 2), (1, 3), (2, 1), (3, 0))
    """
    present = _present(labels)
    rows = torch.searchsorted(present, labels)
    half = _rank_within(rows) % 2
    proposed = torch.full_like(labels, -1)
    tested = torch.zeros_like(labels, dtype=torch.bool)
    for one in (0, 1):
        others = rows[half != one]
        found = _assignment(classes[half != one], others, len(present), num_classes)
        mine = rows[half == one]
        proposed[half == one] = found[mine]
        tested[half == one] = torch.isin(mine, others)
    if not bool(tested.any()):
        return None
    before = (classes == labels)[tested]
    after = (classes == proposed)[tested]
    least = min(3, num_classes)
    moved = after & (proposed != labels)[tested]
    if len(_present(labels[tested][moved])) < least or not better(before, after):
        return None
    mean = _mean_of_classes(after, labels[tested])
    needed = CONSISTENT if num_classes > 2 else 0.8
    if mean < needed or _mean_of_classes(before, labels[tested]) > mean / 2:
        return None
    whole = _assignment(classes, rows, len(present), num_classes)
    counts = torch.tensor(
        [int((classes[rows == row] == whole[row]).sum()) for row in range(len(present))]
    )
    order = counts.argsort(descending=True, stable=True).tolist()
    pairs = [(int(present[row]), int(whole[row])) for row in order if whole[row] >= 0]
    return Relabelled(
        share(before), share(after), tuple(pair for pair in pairs if pair[0] != pair[1])
    )


def _assignment(classes: Tensor, rows: Tensor, count: int, num_classes: int) -> Tensor:
    """Give each of `count` labels a different class, or -1 where no image was answered so."""
    table = torch.zeros(count, num_classes, dtype=torch.int64)
    table.index_put_((rows, classes), torch.ones_like(rows), accumulate=True)
    row, column = linear_sum_assignment(table.numpy(), maximize=True)
    found = torch.full((count,), -1)
    chosen = torch.from_numpy(row), torch.from_numpy(column)
    found[chosen[0]] = torch.where(table[chosen] > 0, chosen[1], -1)
    return found


def _rank_within(rows: Tensor) -> Tensor:
    """Count, for each image, the images of its label before it."""
    same = rows[:, None] == rows[None, :]
    return same.tril(-1).sum(1)


def better(before: Tensor, after: Tensor) -> bool:
    """Say whether the hits (n,) bool after a change are more than before, by a paired test."""
    gained = int((after & ~before).sum())
    lost = int((before & ~after).sum())
    return paired_p_value(gained, lost, len(before), alternative="greater") < SURE


def share(hits: Tensor) -> float:
    """Give the share of hits (n,) bool."""
    return float(hits.double().mean())


def _present(labels: Tensor) -> Tensor:
    return torch.bincount(labels).nonzero().flatten()


def _mean_of_classes(hits: Tensor, labels: Tensor) -> float:
    counts = torch.bincount(labels)
    shares = torch.bincount(labels, weights=hits.double()) / counts
    return float(shares[counts > 0].mean())
