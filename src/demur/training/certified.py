"""Certified training: the loss of the worst-case scores that intervals allow.

IBP (Gowal et al. 2018) with the initial weights, the short ramp and the regularisers of Shi et al.
2021; CROWN-IBP (Zhang et al. 2020). Batch norms take the statistics of the clean images, for the
clean scores and for the bounds (Shi et al. 2021; De Palma et al. 2024, MTL-IBP).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, MultiStepLR

from demur.bounds import Interval, Propagation, Region, trace
from demur.bounds.curved import Rectifier
from demur.classifier import check_counts
from demur.errors import DemurError, unknown
from demur.networks.certified import certified_weights
from demur.seeds import derive, generator
from demur.training.loop import fit
from demur.training.steps import Epoch

TOLERANCE = 0.5
"""Layers count in the regularisers below this ratio (tau in Shi et al. 2021)."""
TINY = 1e-12
MIDDLE = 0.25
"""The first quarter of the ramp grows with the fourth power, the rest linearly."""


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

    def __post_init__(self) -> None:
        if self.method not in get_args(Literal["ibp", "crown-ibp"]):
            raise unknown("method of certified training", self.method, ("ibp", "crown-ibp"))
        if not (0 < self.eps <= 1 and 0 <= self.kappa <= 1):
            raise DemurError("certified training needs eps in (0, 1] and kappa in [0, 1].")
        if min(self.warmup, self.ramp, self.regularizer) < 0:
            raise DemurError("warmup, ramp and regularizer must not be negative.")

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
            graph, scores = trace(network, images)
            clean = nn.functional.cross_entropy(scores, labels)
            share = self.progress(epoch)
            left = 1 - share
            if share == 0 and not self.regularizer:
                return clean, scores
            # Before the ramp, the regularisers see a box of the first step of eps.
            eps = self.eps * max(share, 1e-3)
            propagation = Propagation(graph, network, Region.around(images, eps))
            propagation.forwards()
            kappa = 1 - (1 - self.kappa) * share
            loss = kappa * clean
            if kappa < 1:
                worst = self._worst(propagation, labels, left)
                loss = loss + (1 - kappa) * nn.functional.cross_entropy(worst, labels)
            if self.regularizer and left > 0:
                loss = loss + self.regularizer * left * regularisers(propagation)
            return loss, scores

    def _worst(self, propagation: Propagation, labels: Tensor, share: float) -> Tensor:
        """Give scores (n, outputs) that are as bad as the bounds allow, minus that of the label."""
        place = propagation.graph.output
        count = propagation.graph.nodes[place].shape[0]
        eye = torch.eye(count, dtype=propagation.like.dtype, device=labels.device)
        rows = eye[labels][:, None] - eye
        lower = propagation.lower_by_intervals(place, rows).lower
        if self.method == "crown-ibp" and share > 0:
            owner = torch.arange(len(labels), device=labels.device).repeat_interleave(count)
            linear = propagation.backwards(place, rows.flatten(0, 1), owner).lower
            lower = share * linear.view(-1, count) + (1 - share) * lower
        # The row of the label itself is 0, but for rounding.
        return -lower.masked_fill(eye[labels] > 0, 0.0)


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


def certified_fit(
    network: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    eps: float,
    epochs: int,
    warmup: float = 1.0,
    ramp: float | None = None,
    kappa: float = 0.5,
    regularizer: float = 0.5,
    method: Literal["ibp", "crown-ibp"] = "ibp",
    batch_size: int = 256,
    learning_rate: float = 5e-4,
    initialise: bool = True,
    seed: int = 0,
    device: str = "auto",
    checkpoint: Path | str | None = None,
    validation: tuple[Tensor, Tensor] | None = None,
) -> list[Epoch]:
    """Train a network for certificates, in place, by the recipe of docs/certificates.md.

    Parameters
    ----------
    network : nn.Module
        Of layers that have bounds, such as `networks.certified_cnn(10)`.
    images : Tensor of shape (N, C, H, W)
        uint8, or float in [0, 1].
    labels : Tensor of shape (N,)
    eps, warmup, kappa, regularizer, method
        As for `CertifiedLoss`.
    epochs : int
        Passes over the images.
    ramp : float, optional
        As for `CertifiedLoss`. Default: two fifths of the epochs.
    batch_size : int, default 256
    learning_rate : float, default 5e-4
        Of Adam. A tenth after 5/7 of the steps, and again after 6/7.
    initialise : bool, default True
        Whether the weights are drawn anew, see `networks.certified_weights`.
    seed, device, checkpoint, validation
        As for `fit`.

    Returns
    -------
    list of Epoch
        The losses are those of `CertifiedLoss`, the accuracies those of clean images.

    Raises
    ------
    DemurError
        If something does not fit.
    UnsupportedLayerError
        If a layer has no bounds.

    Examples
    --------
    >>> from demur import data, networks
    >>> from demur.training import certified_fit
    >>> digits = data.load("digits")
    >>> network = networks.certified_cnn(10)
    >>> options = {"eps": 0.1, "epochs": 1, "batch_size": 64}
    >>> len(certified_fit(network, digits.images[:128], digits.labels[:128], **options))
    1
    """
    check_counts(epochs=epochs)
    ramp = 0.4 * epochs if ramp is None else ramp
    loss = CertifiedLoss(eps, warmup, ramp, kappa, regularizer, method)
    if initialise:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive(seed, "certified weights"))
            certified_weights(network)
    return fit(
        network,
        images,
        labels,
        epochs=epochs,
        batch_size=batch_size,
        optimizer=partial(adam, learning_rate=learning_rate),
        scheduler=tenths,
        loss=loss,
        max_gradient_norm=10.0,
        precision="float32",
        seed=seed,
        device=device,
        checkpoint=checkpoint,
        validation=validation,
    )


@dataclass(frozen=True)
class GaussianNoise:
    """A batch transform: noise on each image, for randomized smoothing (Cohen et al. 2019).

    Parameters
    ----------
    sigma : float
        Deviation, in the unit of pixels.
    seed : int, default 0

    Examples
    --------
    >>> images, labels = GaussianNoise(0.1)(nn.Identity(), torch.zeros(2, 4), torch.zeros(2), 0)
    >>> bool(0 < images.std() < 0.3)
    True
    """

    sigma: float
    seed: int = 0

    def __call__(
        self, network: nn.Module, images: Tensor, labels: Tensor, step: int
    ) -> tuple[Tensor, Tensor]:
        """Add noise that depends on the step."""
        draw = generator(self.seed, "noise", step)
        noise = torch.randn(images.shape, generator=draw).to(images)
        return images + self.sigma * noise, labels


def adam(parameters: Iterable[nn.Parameter], learning_rate: float) -> Optimizer:
    """Make the optimizer of certified training."""
    made: Any = torch.optim.Adam(parameters, lr=learning_rate)
    optimizer: Optimizer = made
    return optimizer


def tenths(optimizer: Optimizer, total: int) -> LRScheduler:
    """Divide the learning rate by 10 after 5/7 and after 6/7 of the steps."""
    return MultiStepLR(optimizer, [total * 5 // 7, total * 6 // 7], 0.1)
