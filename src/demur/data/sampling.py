"""Stratified random draws over the labels of an image set."""

import torch
from torch import Tensor

from demur.errors import DemurError
from demur.seeds import derive, generator


def proportional_quota(counts: Tensor, n: int) -> Tensor:
    """Split a number over classes in proportion to their counts (largest remainders).

    Parameters
    ----------
    counts : Tensor
        Number of images of each class, (K,) int64.
    n : int
        Number that is split.

    Returns
    -------
    Tensor
        Part of each class, (K,) int64, of sum `n`.

    Examples
    --------
    >>> proportional_quota(torch.tensor([60, 30, 10]), 5).tolist()
    [3, 2, 0]
    """
    exact = counts.double() * n / int(counts.sum())
    quota = exact.floor().long()
    short = n - int(quota.sum())
    quota[(exact - quota).argsort(descending=True, stable=True)[:short]] += 1
    return quota


def draw(labels: Tensor, quota: Tensor, seed: int, purpose: str) -> Tensor:
    """Draw images of each class at random.

    Parameters
    ----------
    labels : Tensor
        Labels (N,) int64 in 0..K-1.
    quota : Tensor
        Number of images to draw of each class, (K,) int64.
    seed : int
        Seed of the draw.
    purpose : str
        Tag of the random generator.

    Returns
    -------
    Tensor
        (N,) bool, True where an image is drawn.

    Examples
    --------
    >>> drawn = draw(torch.tensor([0, 1, 1, 0]), torch.tensor([1, 2]), 0, "example")
    >>> drawn[1:3].tolist(), int(drawn.sum())
    ([True, True], 3)
    """
    order = torch.randperm(len(labels), generator=generator(seed, purpose))
    # Sort by class; within a class the order stays random.
    order = order[labels[order].argsort(stable=True)]
    counts = torch.bincount(labels, minlength=len(quota))
    ordered = labels[order]
    rank = torch.arange(len(labels)) - (counts.cumsum(0) - counts)[ordered]
    drawn = torch.zeros(len(labels), dtype=torch.bool)
    drawn[order[rank < quota[ordered]]] = True
    return drawn


def stratified_sample(labels: Tensor, num_classes: int, n: int, seed: int) -> Tensor | None:
    """Draw n images at random, with the classes in their proportions.

    Parameters
    ----------
    labels : Tensor
        Labels (N,) int64 in 0..num_classes-1.
    num_classes : int
        Number of classes.
    n : int
        Number of images, at least 1.
    seed : int
        Seed of the draw.

    Returns
    -------
    Tensor or None
        Indices (n,) int64 in ascending order; None if there are no more than n images.

    Raises
    ------
    DemurError
        If n is less than 1.

    Examples
    --------
    >>> labels = torch.tensor([0, 0, 1, 1])
    >>> labels[stratified_sample(labels, 2, 2, seed=0)].tolist()
    [0, 1]
    """
    if n < 1:
        raise DemurError(f"a sample has at least 1 image, got n={n}.")
    if n >= len(labels):
        return None
    # The tag "take" is an old name: another tag would draw other images.
    quota = proportional_quota(torch.bincount(labels, minlength=num_classes), n)
    return draw(labels, quota, seed, "take").nonzero().flatten()


def stratified_folds(labels: Tensor, k: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Make k stratified folds with scikit-learn.

    Parameters
    ----------
    labels : Tensor
        Labels (N,) int64.
    k : int
        Number of folds, at least 2.
    seed : int
        Seed of the draw.

    Returns
    -------
    list of (Tensor, Tensor)
        Training and test indices of each fold.

    Examples
    --------
    >>> folds = stratified_folds(torch.tensor([0, 0, 1, 1]), 2, seed=0)
    >>> sorted(index for _, test in folds for index in test.tolist())
    [0, 1, 2, 3]
    """
    from sklearn.model_selection import StratifiedKFold

    # scikit-learn accepts seeds of 32 bits only.
    state = derive(seed, "folds", k) % 2**32
    folds = StratifiedKFold(k, shuffle=True, random_state=state)
    return [
        (torch.from_numpy(train), torch.from_numpy(test))
        for train, test in folds.split(torch.zeros(len(labels)).numpy(), labels.numpy())
    ]
