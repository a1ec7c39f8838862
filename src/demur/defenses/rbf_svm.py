"""One-versus-rest support vector machines with an RBF kernel, as a differentiable module.

The decision value of class k is sum_i w_ik exp(-gamma ||x - x_i||^2) + b_k. The x_i are the support
vectors of all classes together. The probability of class k is 1 / (1 + exp(A_k f_k + B_k)) (Platt
1999), normalised over the classes as in scikit-learn's OneVsRestClassifier. `rbf_fitting` fits the
machines with scikit-learn.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn

from demur.attacks import KernelMachine
from demur.classifier.cache import Cache
from demur.defenses.rbf_bounds import combination_bounds
from demur.errors import DemurError
from demur.hardware import changes_of

KERNEL_ENTRIES = 1 << 24
"""Entries in one piece of the kernel matrix: 64 MiB in float32."""

PARTS = ("support", "centre", "weights", "intercepts", "platt")
"""The buffers that are given. `squares` follows from them."""


class OneVsRestRBFSVM(KernelMachine):
    """K support vector machines that share the union of their S support vectors of D features.

    Parameters
    ----------
    support : Tensor of shape (S, D)
        Support vectors, minus the centre. Shifting does not change distances, and it reduces their
        rounding error.
    centre : Tensor of shape (D,)
    weights : Tensor of shape (S, K)
        Dual coefficients; 0 where a vector does not support a class.
    intercepts : Tensor of shape (K,)
    platt : Tensor of shape (K, 2)
        Slope and offset of the sigmoid of each class.
    gamma : float
        Width parameter of the kernel.

    Attributes
    ----------
    wider_kernels : float in (0, 1], default 1
        `attacks.wider_kernels` sets it. Gradients are those of a gamma multiplied by it, and
        decision values do not change. Far from all support vectors, the kernel is flat and its
        gradient vanishes (R14); wider kernels have a gradient there.

    Examples
    --------
    >>> import torch
    >>> from demur.defenses.rbf_svm import OneVsRestRBFSVM
    >>> parts = torch.eye(2), torch.zeros(2), torch.eye(2), torch.zeros(2), torch.zeros(2, 2)
    >>> machines = OneVsRestRBFSVM(*parts, gamma=0.5)
    >>> machines(torch.tensor([[1.0, 0.0]]))
    tensor([[1.0000, 0.3679]])
    """

    support: Tensor
    centre: Tensor
    squares: Tensor
    weights: Tensor
    intercepts: Tensor
    platt: Tensor

    def __init__(
        self,
        support: Tensor,
        centre: Tensor,
        weights: Tensor,
        intercepts: Tensor,
        platt: Tensor,
        *,
        gamma: float,
    ) -> None:
        super().__init__()
        self.gamma = gamma
        self.register_buffer("support", support)
        self.register_buffer("centre", centre)
        self.register_buffer("weights", weights)
        self.register_buffer("intercepts", intercepts)
        self.register_buffer("platt", platt)
        self.register_buffer("squares", support.square().sum(1))
        self._rounded = Cache[tuple[object, Tensor] | None](None)

    def forward(self, features: Tensor) -> Tensor:
        """Compute decision values (N, K) of features (N, D), in the precision of the machines.

        Attacks compute gradients in an autocast to bfloat16. There, the products of features are
        computed in bfloat16. The rest is not, because a distance is a difference of large numbers.
        """
        if features.ndim != 2 or features.shape[1] != len(self.centre):
            raise DemurError(
                f"the machines take {len(self.centre)} features; the layer gives "
                f"{tuple(features.shape)}. They were fitted on another layer or image size."
            )
        kind = features.device.type
        half = (
            torch.is_grad_enabled()
            and torch.is_autocast_enabled(kind)
            and torch.get_autocast_dtype(kind) == torch.bfloat16
        )
        rows = max(1, KERNEL_ENTRIES // max(1, len(self.support)))
        with torch.autocast(kind, enabled=False):
            centred = features.to(self.support) - self.centre
            # A graph is exported for any number of images: they cannot be counted here.
            parts = [centred] if torch.compiler.is_exporting() else torch.split(centred, rows)
            pieces = [self._kernel(piece, half) @ self.weights for piece in parts]
            return torch.cat(pieces) + self.intercepts

    def _kernel(self, centred: Tensor, half: bool) -> Tensor:
        """The kernel (N, S) of features minus the centre (N, D)."""
        if half:
            products = (centred.bfloat16() @ self._half().T).float()
        else:
            products = centred @ self.support.T
        square = (centred.square().sum(1, keepdim=True) + self.squares - 2 * products).clamp(min=0)
        kernel = torch.exp(-self.gamma * square)
        if self.wider_kernels == 1 or not torch.is_grad_enabled():
            return kernel
        wide = torch.exp(-self.gamma * self.wider_kernels * square)
        return wide + (kernel - wide).detach()

    def _half(self) -> Tensor:
        """The support vectors in bfloat16. They are rounded again when the buffer has changed."""
        version = changes_of(self.support)
        if version is None:
            return self.support.bfloat16()
        key = (self.support.data_ptr(), version, self.support.device)
        if self._rounded.value is None or self._rounded.value[0] != key:
            self._rounded.value = (key, self.support.bfloat16())
        return self._rounded.value[1]

    combines: ClassVar[bool] = True
    """For `demur.bounds`: `interval` takes combinations of the decision values."""

    def interval(
        self, lower: Tensor, upper: Tensor, rows: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Bound decision values, or combinations of them, for features in a box.

        Parameters
        ----------
        lower, upper : Tensor of shape (N, D)
        rows : Tensor of shape (N, M, K), optional
            Coefficients. Default: each decision value, M = K.

        Returns
        -------
        low, high : Tensor of shape (N, M)
            In the precision of the bounds. See `rbf_bounds.combination_bounds`.
        """
        weights = self.weights.to(lower).T
        offset = self.intercepts.to(lower)
        if rows is not None:
            offset = rows @ offset
            weights = rows @ weights
        support = self.support.to(lower)
        centre = self.centre.to(lower)
        low, high = combination_bounds(lower - centre, upper - centre, support, self.gamma, weights)
        return low + offset, high + offset

    def probabilities(self, values: Tensor) -> Tensor:
        """Turn decision values (N, K) into Platt's probabilities (N, K), normalised to sum 1."""
        return nn.functional.logsigmoid(-(values * self.platt[:, 0] + self.platt[:, 1])).softmax(1)
