"""Fitting of RBF machines with scikit-learn, on one Gram matrix that all classes share."""

import itertools
import math
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from demur.classifier import check_counts, check_labels
from demur.defenses.rbf_svm import KERNEL_ENTRIES, OneVsRestRBFSVM
from demur.errors import DemurError

VALIDATION = 0.1
"""Share of the training images that a threshold is set on."""

Array = NDArray[np.float64]
Indices = NDArray[np.intp]


def rbf(left: Tensor, right: Tensor, gamma: float) -> Tensor:
    """Compute exp(-gamma ||x - y||^2) for each pair of rows: (N, D), (M, D) -> (N, M)."""
    squares = right.square().sum(1)[None, :]
    square = torch.addmm(squares, left, right.T, alpha=-2) + left.square().sum(1, keepdim=True)
    return torch.exp(-gamma * square.clamp(min=0))


@torch.no_grad()
def gram(features: Tensor, gamma: float) -> Array:
    """Compute the kernel matrix of features with themselves, as scikit-learn takes it.

    Parameters
    ----------
    features : Tensor of shape (n, D)
        The kernel is computed in their precision. Distances are taken from the mean, which reduces
        the rounding error of float32.
    gamma : float

    Returns
    -------
    array of shape (n, n), float64
        It takes 8 n^2 bytes.

    Examples
    --------
    >>> import torch
    >>> from demur.defenses.rbf_fitting import gram
    >>> gram(torch.tensor([[0.0], [1.0]]), gamma=0.5).round(4).tolist()
    [[1.0, 0.6065], [0.6065, 1.0]]
    """
    centred = features - features.mean(0)
    result = torch.empty(len(features), len(features), dtype=torch.float64)
    rows = max(1, KERNEL_ENTRIES // len(features))
    for start in range(0, len(features), rows):
        result[start : start + rows] = rbf(centred[start : start + rows], centred, gamma)
    result.fill_diagonal_(1)
    return result.numpy()


def fit_rbf_svm(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    *,
    C: float,
    gamma: float | Literal["scale"],
    folds: int = 5,
    seed: int = 0,
) -> tuple[OneVsRestRBFSVM, Tensor]:
    """Fit one machine for each class against the others, and the sigmoids of their probabilities.

    Parameters
    ----------
    features : Tensor of shape (n, D), float32 or float64
        Their precision becomes the precision of the machines.
    labels : Tensor of shape (n,), integers in 0..num_classes-1
        Each class at least `folds` times.
    num_classes : int
    C, gamma : float
        Penalty and width parameter of the kernel. The gamma "scale" is 1 / (D * variance of all
        features), as in scikit-learn.
    folds : int, default 5
        Folds of the cross-validation that gives out-of-fold values; the sigmoids are fitted to
        them.
    seed : int, default 0
        Seed of the folds.

    Returns
    -------
    machines : OneVsRestRBFSVM
    values : Tensor of shape (n, num_classes)
        Out-of-fold decision values, to fit the next machines on (Sotgiu et al. 2020).

    Raises
    ------
    DemurError
        If features are not finite, C or gamma is not positive, or a class is too small.

    Examples
    --------
    >>> import torch
    >>> from demur.defenses.rbf_fitting import fit_rbf_svm
    >>> features, labels = torch.tensor([[0.0], [1.0]] * 5), torch.tensor([0, 1] * 5)
    >>> machines, values = fit_rbf_svm(features, labels, 2, C=1.0, gamma=0.5)
    >>> machines(features[:2]).argmax(1)
    tensor([0, 1])
    """
    if not bool(torch.isfinite(features).all()):
        raise DemurError("the features contain NaN or infinite values: no machine can be fitted.")
    if gamma == "scale":
        gamma = 1 / max(features.shape[1] * float(features.double().var(correction=0)), 1e-12)
    _check_positive(C, gamma)
    check_sizes(labels, num_classes, folds)
    features = features.detach().cpu()
    targets = labels.cpu().numpy()
    kernel = gram(features, gamma)
    support, weights, intercepts = _solve(kernel, targets, num_classes, C)
    outside = np.empty((len(targets), num_classes))
    for test, values in _out_of_fold(kernel, targets, num_classes, C, folds, seed):
        outside[test] = values
    platt = np.array([_sigmoid(outside[:, k], targets == k) for k in range(num_classes)])
    centre = features.mean(0)
    learned = [torch.from_numpy(part).to(features.dtype) for part in (weights, intercepts, platt)]
    vectors = features[torch.from_numpy(support)] - centre
    machines = OneVsRestRBFSVM(vectors, centre, *learned, gamma=gamma)
    return machines, torch.from_numpy(outside).to(features.dtype)


def search_rbf_svm(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    *,
    Cs: Sequence[float],
    gammas: Sequence[float],
    folds: int = 5,
    seed: int = 0,
) -> tuple[float, float, dict[tuple[float, float], float]]:
    """Find the C and gamma with the best cross-validated accuracy.

    Parameters
    ----------
    features, labels, num_classes, folds, seed
        As for `fit_rbf_svm`.
    Cs, gammas : sequence of float
        Every pair is tried.

    Returns
    -------
    C, gamma : float
        The best pair; of equal ones, the smallest gamma and then the smallest C.
    accuracy : dict
        Accuracy in 0..1 of each (C, gamma).

    Examples
    --------
    >>> import torch
    >>> from demur.defenses.rbf_fitting import search_rbf_svm
    >>> features, labels = torch.tensor([[0.0], [1.0]] * 5), torch.tensor([0, 1] * 5)
    >>> search_rbf_svm(features, labels, 2, Cs=[1.0], gammas=[0.5])
    (1.0, 0.5, {(1.0, 0.5): 1.0})
    """
    if not Cs or not gammas:
        raise DemurError("a search needs at least one C and one gamma.")
    for C, gamma in itertools.product(Cs, gammas):
        _check_positive(C, gamma)
    check_sizes(labels, num_classes, folds)
    targets = labels.cpu().numpy()
    accuracy = {}
    for gamma in sorted(gammas):
        kernel = gram(features.detach().cpu(), gamma)
        for C in sorted(Cs):
            correct = sum(
                int((values.argmax(1) == targets[test]).sum())
                for test, values in _out_of_fold(kernel, targets, num_classes, C, folds, seed)
            )
            accuracy[C, gamma] = correct / len(targets)
    (C, gamma) = max(accuracy, key=lambda pair: accuracy[pair])
    return C, gamma, accuracy


def set_aside(labels: Tensor, seed: int) -> tuple[list[int], list[int]]:
    """Split images into those for the machines and a tenth for the threshold, class by class.

    Returns
    -------
    kept, aside : list of int
        Indices.
    """
    from sklearn.model_selection import train_test_split

    rows = range(len(labels))
    try:
        kept, aside = train_test_split(
            rows, test_size=VALIDATION, stratify=labels.tolist(), random_state=seed
        )
    except ValueError as error:
        raise DemurError(
            f"a tenth of the images cannot be set aside for the threshold: {error} "
            "Give more images, or validation images."
        ) from error
    return kept, aside


def check_validation(validation: object, images: Tensor, num_classes: int) -> None:
    """Raise DemurError unless `validation` is a pair of images like `images`, and their labels."""
    if not isinstance(validation, tuple | list) or len(validation) != 2:
        raise DemurError("validation must be a pair of images and labels.")
    theirs, labels = validation
    if not isinstance(theirs, Tensor) or theirs.shape[1:] != images.shape[1:] or not len(theirs):
        shape = tuple(theirs.shape) if isinstance(theirs, Tensor) else type(theirs).__name__
        raise DemurError(f"validation images {shape} do not fit images {tuple(images.shape)}.")
    check_labels(labels, len(theirs), num_classes)


def _check_positive(C: float, gamma: float) -> None:
    if not (C > 0 and gamma > 0 and math.isfinite(C) and math.isfinite(gamma)):
        raise DemurError(f"C and gamma must be positive and finite, not {C} and {gamma}.")


def check_sizes(labels: Tensor, num_classes: int, folds: int) -> None:
    """Raise DemurError unless each class has an image in each fold."""
    check_counts(2, folds=folds)
    counts = torch.bincount(labels, minlength=num_classes)
    if len(counts) > num_classes or int(counts.min()) < folds:
        raise DemurError(
            f"each of the {num_classes} classes needs at least {folds} images; the smallest has "
            f"{int(counts.min())}."
        )


def _out_of_fold(
    kernel: Array, targets: Indices, num_classes: int, C: float, folds: int, seed: int
) -> Iterator[tuple[Indices, Array]]:
    """For each fold: the indices of its images, and their values by machines of the other folds."""
    from sklearn.model_selection import StratifiedKFold

    splitter = StratifiedKFold(folds, shuffle=True, random_state=seed)
    for train, test in splitter.split(targets, targets):
        inside = np.ascontiguousarray(kernel[np.ix_(train, train)])
        support, weights, intercepts = _solve(inside, targets[train], num_classes, C)
        yield test, kernel[np.ix_(test, train[support])] @ weights + intercepts


def _solve(
    kernel: Array, targets: Indices, num_classes: int, C: float
) -> tuple[Indices, Array, Array]:
    """Solve K binary problems: support vectors (S,) by index, weights (S, K), intercepts (K,)."""
    from sklearn.svm import SVC

    def fitted(k: int) -> SVC:
        return SVC(kernel="precomputed", C=C).fit(kernel, targets == k)

    weights = np.zeros((len(targets), num_classes))
    intercepts = np.empty(num_classes)
    with ThreadPoolExecutor(os.cpu_count()) as threads:  # the solver releases the interpreter lock
        for k, machine in enumerate(threads.map(fitted, range(num_classes))):
            weights[machine.support_, k] = machine.dual_coef_[0]
            intercepts[k] = machine.intercept_[0]
    support = np.flatnonzero(weights.any(1))
    return support, weights[support], intercepts


def _sigmoid(values: Array, positive: NDArray[np.bool_]) -> Array:
    """Slope and offset (2,) of the most likely sigmoid, with Platt's targets (1999, sec. 2.2)."""
    from scipy.optimize import minimize

    many = positive.sum()
    few = (~positive).sum()
    target = np.where(positive, (many + 1) / (many + 2), 1 / (few + 2))
    scale = max(float(np.abs(values).max()), 1e-12)

    def loss(place: Array) -> tuple[float, Array]:
        exponent = place[0] * values / scale + place[1]
        slope = target - 1 / (1 + np.exp(exponent.clip(-500, 500)))
        total = float((target * exponent + np.logaddexp(0, -exponent)).sum())
        return total, np.array([slope @ values / scale, slope.sum()])

    start = np.array([0.0, math.log((few + 1) / (many + 1))])
    found = minimize(loss, start, jac=True, method="BFGS").x
    return np.array([found[0] / scale, found[1]])
