"""Losses of certified training: those of the worst-case scores that intervals allow.

IBP (Gowal et al. 2018) with the initial weights, the short ramp and the regularisers of Shi et al.
2021; CROWN-IBP (Zhang et al. 2020). With a learned reject column: Sheikholeslami et al. 2021. Batch
norms take the statistics of the clean images, for the clean scores and for the bounds (Shi et al.
2021; De Palma et al. 2024, MTL-IBP).
"""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from demur.bounds import Interval, Propagation, Region, trace
from demur.bounds.curved import Rectifier
from demur.bounds.tracing import Traced
from demur.errors import DemurError, unknown

TOLERANCE = 0.5
"""Layers count in the regularisers below this ratio (tau in Shi et al. 2021)."""
ETAS = (0.0, 0.1, 0.5, 0.9)
"""Shares of the reject column: none, and those of the bounds with rejection."""
TINY = 1e-12
MIDDLE = 0.25
"""The first quarter of the ramp grows with the fourth power, the rest linearly."""


class HalvedProducts(TorchFunctionMode):
    """Within it, dense layers and convolutions compute in bfloat16, and give what they were given.

    Autocast alone would give bfloat16, and all that follows would lose digits. Float64 stays.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Compute a product in bfloat16, and all else as it is."""
        kwargs = kwargs or {}
        if func not in (nn.functional.linear, nn.functional.conv2d):
            return func(*args, **kwargs)
        if Traced in types:
            with self:  # torch would record the product outside of this mode
                return Traced.__torch_function__(func, types, args, kwargs)
        given = args[0] if args else kwargs["input"]
        with torch.autocast(given.device.type, torch.bfloat16):
            return func(*args, **kwargs).to(given.dtype)


@dataclass(frozen=True)
class CertifiedLoss:
    """A loss for `fit`: kappa CE(scores) + (1 - kappa) CE(worst-case scores), and regularisers.

    Parameters
    ----------
    eps : float
        Linf radius of the box at the end of the ramp, in the unit of pixels. About 1.33 times the
        radius that is to be certified.
    warmup : float, default 1
        Epochs on clean images alone.
    ramp : float, default 20
        Epochs in which eps grows from 0.
    kappa : float in [0, 1], default 0.5
        Share of the clean loss after the ramp. It falls from 1.
    regularizer : float, default 0.5
        Weight of the regularisers of tightness and of the balance of rectifiers, during warm-up and
        ramp (Shi et al. 2021, sec. 3.3). It falls to 0 as eps grows.
    method : {"ibp", "crown-ibp"}, default "ibp"
        "crown-ibp" mixes its bound with that of IBP: the share of CROWN-IBP falls from 1 to 0
        during the ramp (Zhang et al. 2020).
    precision : {"float32", "bfloat16"}, default "float32"
        Of the products of dense layers and convolutions, for scores and intervals. All else is
        float32.

    Examples
    --------
    >>> loss = CertifiedLoss(eps=0.1, ramp=2)
    >>> [round(loss.progress(epoch), 3) for epoch in (0.5, 1, 2, 3, 9)]
    [0.0, 0.0, 0.385, 1.0, 1.0]
    """

    eps: float
    warmup: float = 1.0
    ramp: float = 20.0
    kappa: float = 0.5
    regularizer: float = 0.5
    method: Literal["ibp", "crown-ibp"] = "ibp"
    precision: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        if self.precision not in ("float32", "bfloat16"):
            raise unknown("precision", self.precision, ("float32", "bfloat16"))
        if self.method not in get_args(Literal["ibp", "crown-ibp"]):
            raise unknown("method of certified training", self.method, ("ibp", "crown-ibp"))
        if not (0 < self.eps <= 1 and 0 <= self.kappa <= 1):
            raise DemurError("certified training needs eps in (0, 1] and kappa in [0, 1].")
        if min(self.warmup, self.ramp, self.regularizer) < 0:
            raise DemurError("warmup, ramp and regularizer must not be negative.")

    @property
    def _weight(self) -> float:
        """Of the clean loss."""
        return 1.0

    def progress(self, epoch: float) -> float:
        """Give the share of eps at a time, counted in epochs."""
        if epoch <= self.warmup:
            return 0.0
        share = min(1.0, (epoch - self.warmup) / max(self.ramp, TINY))
        start = 1 / (MIDDLE**4 + 4 * MIDDLE**3 * (1 - MIDDLE))
        if share < MIDDLE:
            return start * share**4
        return start * (MIDDLE**4 + 4 * MIDDLE**3 * (share - MIDDLE))

    def __call__(
        self, network: nn.Module, images: Tensor, labels: Tensor, epoch: float
    ) -> tuple[Tensor, Tensor]:
        """Compute the loss, and the clean scores.

        Parameters
        ----------
        network : nn.Module
            In training mode.
        images : Tensor of shape (n, ...), in [0, 1]
        labels : Tensor of shape (n,), int64
        epoch : float
            Epochs that are done, with a fraction.

        Returns
        -------
        loss : Tensor of shape ()
        scores : Tensor of shape (n, outputs)
        """
        with torch.autocast(images.device.type, enabled=False):
            half = self.precision == "bfloat16"
            share = self.progress(epoch)
            left = 1 - share
            # Before the ramp, the regularisers see a box of the first step of eps.
            eps = self.eps * max(share, 1e-3)
            with HalvedProducts() if half else nullcontext():
                graph, scores = trace(network, images)
                propagation = Propagation(graph, network, Region.around(images, eps))
                if share or self.regularizer:
                    propagation.forwards()
            clean = self._weight * nn.functional.cross_entropy(scores, labels)
            kappa = 1 - (1 - self.kappa) * share
            loss = kappa * clean
            if kappa < 1:
                loss = loss + (1 - kappa) * self._robust(propagation, labels, left)
            if self.regularizer and left > 0:
                loss = loss + self.regularizer * left * regularisers(propagation)
            return loss, scores

    def _robust(self, propagation: Propagation, labels: Tensor, share: float) -> Tensor:
        """Give the cross-entropy of scores that are as bad as the bounds allow."""
        eye = self._columns(propagation, labels)
        lower = self._lower(propagation, eye[labels][:, None] - eye, share)
        return _worst(lower, labels)

    def _columns(self, propagation: Propagation, labels: Tensor) -> Tensor:
        count = propagation.graph.nodes[propagation.graph.output].shape[0]
        return torch.eye(count, dtype=propagation.like.dtype, device=labels.device)

    def _lower(self, propagation: Propagation, rows: Tensor, share: float) -> Tensor:
        """Bound rows (N, M, columns) @ scores from below, (N, M)."""
        place = propagation.graph.output
        lower = propagation.lower_by_intervals(place, rows).lower
        if self.method == "crown-ibp" and share > 0:
            count, each = rows.shape[:2]
            owner = torch.arange(count, device=rows.device).repeat_interleave(each)
            linear = propagation.backwards(place, rows.flatten(0, 1), owner).lower
            lower = share * linear.view(count, each) + (1 - share) * lower
        return lower


@dataclass(frozen=True)
class CertifiedRejectLoss(CertifiedLoss):
    """A loss for `fit` of a network whose last column is the reject score (Sheikholeslami et al.
    2021): kappa clean_weight CE(scores) + (1 - kappa) [CE(worst without rejection) + reject_weight
    CE(worst with rejection)].

    A wrong class k is accepted nowhere in the box if (1 - eta) s_y + eta s_r > s_k there for one
    eta. The worst scores with rejection are the best of these bounds over a grid of eta from .1 to
    .9; those without have eta = 0. The label of a clean image is its class: no
    clean image is to be rejected.

    Parameters
    ----------
    eps, warmup, ramp, kappa, regularizer, method, precision
        As for `CertifiedLoss`.
    clean_weight : float, default 2
        Lambda_2 of the authors' code: 2 for MNIST at eps .3, and 1 at .4.
    reject_weight : float, default 1
        Lambda_1: 1 at eps .3, and .6 at .4.

    Notes
    -----
    Each image and class has the best eta of the grid. The authors' code differs in the choice of
    eta, and has neither regularisers nor batch norm.

    Examples
    --------
    >>> CertifiedRejectLoss(eps=0.1).progress(0.5)
    0.0
    """

    clean_weight: float = 2.0
    reject_weight: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.clean_weight, self.reject_weight) < 0:
            raise DemurError("clean_weight and reject_weight must not be negative.")

    @property
    def _weight(self) -> float:
        return self.clean_weight

    def _robust(self, propagation: Propagation, labels: Tensor, share: float) -> Tensor:
        """Give the weighted sum of both cross-entropies."""
        eye = self._columns(propagation, labels)
        eta = torch.tensor(ETAS, dtype=eye.dtype, device=eye.device)[:, None]
        best = (1 - eta) * eye[labels][:, None] + eta * eye[-1]
        rows = best[:, :, None] - eye[:-1]
        lower = self._lower(propagation, rows.flatten(1, 2), share).view(rows.shape[:3])
        without = _worst(lower[:, 0], labels)
        return without + self.reject_weight * _worst(lower[:, 1:].amax(1), labels)


def _worst(lower: Tensor, labels: Tensor) -> Tensor:
    """Give the cross-entropy of worst scores, from bounds (N, K) of s_y - s_k."""
    # The bound of the label itself is 0, but for rounding; a rejection changes it.
    itself = nn.functional.one_hot(labels, lower.shape[1]).bool()
    return nn.functional.cross_entropy(-lower.masked_fill(itself, 0.0), labels)


def regularisers(propagation: Propagation) -> Tensor:
    """Compute the regularisers of tightness and balance (Shi et al. 2021, eq. 9 to 12).

    Tightness: the mean width of the inputs of a rectifier is at most 1 / tau of that of the images.
    Balance: active and inactive neurons have centres of about the same sum and spread.
    """
    box = propagation.allowed.box
    width = (box.upper - box.lower).mean()
    found = [
        propagation.intervals[node.inputs[0]]
        for node in propagation.graph.nodes
        if isinstance(node.operation, Rectifier)
    ]
    if not found:
        return torch.zeros((), dtype=width.dtype, device=width.device)
    terms = [_tightness(one, width) + _balance(one) for one in found]
    return torch.stack(terms).mean()


def _tightness(interval: Interval, width: Tensor) -> Tensor:
    wide = (interval.upper - interval.lower).mean()
    return (TOLERANCE - width / wide.clamp(min=TINY)).relu() / TOLERANCE


def _balance(interval: Interval) -> Tensor:
    centre = interval.centre
    active = (centre > 0).to(centre.dtype)
    spread = (centre - centre.mean()).square()
    pairs = [(centre * active, -centre * (1 - active)), (spread * active, spread * (1 - active))]
    total = torch.zeros((), dtype=centre.dtype, device=centre.device)
    for one, other in pairs:
        ratio = one.sum().clamp(min=TINY) / other.sum().clamp(min=TINY)
        total = total + (TOLERANCE - torch.minimum(ratio, 1 / ratio)).relu() / TOLERANCE
    return total
