"""One-versus-rest machines with an RBF kernel: fitted by scikit-learn on one shared Gram matrix, used as a differentiable module.

Decision value of class k: sum_i w_ik exp(-gamma ||x - x_i||^2) + b_k over the support vectors x_i of all classes together; its
probability 1 / (1 + exp(A_k f_k + B_k)) (Platt 1999), normalised over classes as scikit-learn's OneVsRestClassifier does.
"""

import math
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from scipy.optimize import minimize
from sklearn.model_selection import StratifiedKFold
from sklearn.svm import SVC
from torch import Tensor, nn

from demur.errors import DemurError

KERNEL_ENTRIES = 1 << 24  # of one piece of the kernel matrix: 64 MiB in float32


class RBFMachines(nn.Module):
    """K machines that share one pass over the union of their S support vectors, of D features each.

    Buffers: support (S, D), less its centre (D,): distances do not change, and rounding takes less from them; squares (S,), the squared
    lengths of the support; weights (S, K), intercepts (K,), platt (K, 2): slope and offset of each class's sigmoid.

    `widened`, in (0, 1], is an attacker's, who sets it by `attacks.widened`: where gradients are computed, they are those of a gamma so
    many times as large. Far from all support vectors a kernel is flat, and gradients are nothing (R14); values stay what they are.
    """

    support: Tensor
    centre: Tensor
    squares: Tensor
    weights: Tensor
    intercepts: Tensor
    platt: Tensor
    widened = 1.0

    def __init__(self, support: Tensor, centre: Tensor, weights: Tensor, intercepts: Tensor, platt: Tensor, *, gamma: float) -> None:
        super().__init__()
        self.gamma = gamma
        named = {"support": support, "centre": centre, "weights": weights, "intercepts": intercepts, "platt": platt}
        for name, tensor in {**named, "squares": support.square().sum(1)}.items():
            self.register_buffer(name, tensor)
        self._rounded: tuple[object, Tensor] | None = None

    def forward(self, features: Tensor) -> Tensor:
        """Decision values (N, K) of features (N, D), in the precision of the machines.

        In an autocast to bfloat16 with gradients, as attacks have it, the products of features are computed in bfloat16; what
        is added to them is not, since distances are differences of large numbers.
        """
        kind = features.device.type
        half = torch.is_grad_enabled() and torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.bfloat16
        rows = max(1, KERNEL_ENTRIES // max(1, len(self.support)))
        with torch.autocast(kind, enabled=False):
            centred = features.to(self.support) - self.centre
            pieces = [self._kernel(piece, half) @ self.weights for piece in torch.split(centred, rows)]
            return torch.cat(pieces) + self.intercepts

    def _kernel(self, centred: Tensor, half: bool) -> Tensor:
        """The kernel (N, S) of features less the centre (N, D)."""
        products = (centred.bfloat16() @ self._half().T).float() if half else centred @ self.support.T
        square = (centred.square().sum(1, keepdim=True) + self.squares - 2 * products).clamp(min=0)
        kernel = torch.exp(-self.gamma * square)
        if self.widened == 1 or not torch.is_grad_enabled():
            return kernel
        wide = torch.exp(-self.gamma * self.widened * square)
        return wide + (kernel - wide).detach()

    def _half(self) -> Tensor:
        """The support in bfloat16, made once."""
        key = (self.support.data_ptr(), self.support._version, self.support.device)
        if self._rounded is None or self._rounded[0] != key:
            self._rounded = (key, self.support.bfloat16())
        return self._rounded[1]

    def probabilities(self, values: Tensor) -> Tensor:
        """Platt's probabilities (N, K) of decision values (N, K), normalised to a sum of 1."""
        return nn.functional.logsigmoid(-(values * self.platt[:, 0] + self.platt[:, 1])).softmax(1)


def rbf(left: Tensor, right: Tensor, gamma: float) -> Tensor:
    """The kernel exp(-gamma ||x - y||^2) of each pair of rows: (N, D), (M, D) -> (N, M), by one matrix product."""
    square = torch.addmm(right.square().sum(1)[None, :], left, right.T, alpha=-2) + left.square().sum(1, keepdim=True)
    return torch.exp(-gamma * square.clamp(min=0))


@torch.no_grad()
def gram(features: Tensor, gamma: float) -> np.ndarray:
    """The kernel of the features (n, D) with themselves, (n, n) float64, which scikit-learn wants: 8 n^2 bytes.

    Distances are taken from the mean, which keeps what float32 rounds away small, and in the features' precision.
    """
    centred = features - features.mean(0)
    result = torch.empty(len(features), len(features), dtype=torch.float64)
    rows = max(1, KERNEL_ENTRIES // len(features))
    for start in range(0, len(features), rows):
        result[start : start + rows] = rbf(centred[start : start + rows], centred, gamma)
    result.fill_diagonal_(1)
    return result.numpy()


def fit_rbf_svm(
    features: Tensor, labels: Tensor, num_classes: int, *, C: float, gamma: float, folds: int = 5, seed: int = 0
) -> tuple[RBFMachines, Tensor]:
    """Fit one machine a class against the rest, and the sigmoids to decision values out of fold.

    Args:
        features: (n, D) float32 or float64, which is then the precision of the machines.
        labels: (n,) integers in 0..num_classes-1, each at least `folds` times.
        C, gamma: the penalty, and the kernel's width.

    Returns: the machines, and their decision values out of fold (n, K), to fit on what comes next (Sotgiu et al. 2020).
    Raises: DemurError for features that are not finite, or classes that are too small.
    """
    if not bool(torch.isfinite(features).all()):
        raise DemurError("the features hold NaN or infinite values: no machine can be fitted on them.")
    if not (C > 0 and gamma > 0 and math.isfinite(C) and math.isfinite(gamma)):
        raise DemurError(f"C and gamma must be positive and finite, not {C} and {gamma}.")
    counts = torch.bincount(labels, minlength=num_classes)
    if len(counts) > num_classes or int(counts.min()) < folds:
        raise DemurError(f"each of the {num_classes} classes needs at least {folds} images; the smallest has {int(counts.min())}.")
    features, targets = features.detach().cpu(), labels.cpu().numpy()
    kernel = gram(features, gamma)
    support, weights, intercepts = _solve(kernel, targets, num_classes, C)
    outside = np.empty((len(targets), num_classes))
    for train, test in StratifiedKFold(folds, shuffle=True, random_state=seed).split(targets, targets):
        inside, duals, offsets = _solve(np.ascontiguousarray(kernel[np.ix_(train, train)]), targets[train], num_classes, C)
        outside[test] = kernel[np.ix_(test, train[inside])] @ duals + offsets
    platt = np.array([_sigmoid(outside[:, k], targets == k) for k in range(num_classes)])
    centre, tensors = features.mean(0), (torch.from_numpy(array).to(features.dtype) for array in (weights, intercepts, platt))
    machines = RBFMachines(features[torch.from_numpy(support)] - centre, centre, *tensors, gamma=gamma)
    return machines, torch.from_numpy(outside).to(features.dtype)


def search_rbf_svm(
    features: Tensor, labels: Tensor, num_classes: int, *, Cs: list[float], gammas: list[float], folds: int = 5, seed: int = 0
) -> tuple[float, float, dict[tuple[float, float], float]]:
    """The best (C, gamma) by cross-validated accuracy, the smaller first among equals, and the accuracy of each pair."""
    targets, accuracy = labels.cpu().numpy(), {}
    for gamma in sorted(gammas):
        kernel = gram(features.detach().cpu(), gamma)
        for C in sorted(Cs):
            right = 0
            for train, test in StratifiedKFold(folds, shuffle=True, random_state=seed).split(targets, targets):
                inside, duals, offsets = _solve(np.ascontiguousarray(kernel[np.ix_(train, train)]), targets[train], num_classes, C)
                values = kernel[np.ix_(test, train[inside])] @ duals + offsets
                right += int((values.argmax(1) == targets[test]).sum())
            accuracy[C, gamma] = right / len(targets)
    (C, gamma) = max(accuracy, key=lambda pair: accuracy[pair])
    return C, gamma, accuracy


def _solve(kernel: np.ndarray, targets: np.ndarray, num_classes: int, C: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """K binary problems on one kernel: indices of the union of support vectors (S,), weights (S, K), intercepts (K,)."""
    weights, intercepts = np.zeros((len(targets), num_classes)), np.empty(num_classes)
    with ThreadPoolExecutor(os.cpu_count()) as threads:  # the solver lets go of the interpreter
        machines = threads.map(lambda k: SVC(kernel="precomputed", C=C).fit(kernel, targets == k), range(num_classes))
        for k, machine in enumerate(machines):
            weights[machine.support_, k] = machine.dual_coef_[0]
            intercepts[k] = machine.intercept_[0]
    support = np.flatnonzero(weights.any(1))
    return support, weights[support], intercepts


def _sigmoid(values: np.ndarray, positive: np.ndarray) -> np.ndarray:
    """Platt's slope and offset (2,): the likeliest sigmoid, with his targets, which keep it from certainty (Platt 1999, sec. 2.2)."""
    many, few = positive.sum(), (~positive).sum()
    target = np.where(positive, (many + 1) / (many + 2), 1 / (few + 2))
    scale = max(float(np.abs(values).max()), 1e-12)

    def loss(place: np.ndarray) -> tuple[float, np.ndarray]:
        exponent = place[0] * values / scale + place[1]
        slope = target - 1 / (1 + np.exp(exponent.clip(-500, 500)))
        total = float((target * exponent + np.logaddexp(0, -exponent)).sum())
        return total, np.array([slope @ values / scale, slope.sum()])

    found = minimize(loss, np.array([0.0, math.log((few + 1) / (many + 1))]), jac=True, method="BFGS").x
    return np.array([found[0] / scale, found[1]])
