"""Certified training: the recipe of docs/certificates.md, with the losses of `certified_loss`."""

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, MultiStepLR

from demur.classifier import check_counts
from demur.hardware import has_fast_bfloat16, pick_device
from demur.networks.certified import certified_weights
from demur.seeds import derive
from demur.training.certified_loss import CertifiedLoss, CertifiedRejectLoss
from demur.training.loop import fit
from demur.training.steps import Epoch


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
    reject: bool = False,
    batch_size: int = 256,
    learning_rate: float = 5e-4,
    initialise: bool = True,
    seed: int = 0,
    device: str = "auto",
    precision: Literal["auto", "float32", "bfloat16"] = "auto",
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
    reject : bool, default False
        Whether the last column of the network is a reject score: see `CertifiedRejectLoss`.
    batch_size : int, default 256
    learning_rate : float, default 5e-4
        Of Adam. A tenth after 5/7 of the steps, and again after 6/7.
    initialise : bool, default True
        Whether the weights are drawn anew, see `networks.certified_weights`.
    seed, device, checkpoint, validation
        As for `fit`.
    precision : {"auto", "float32", "bfloat16"}, default "auto"
        As for `CertifiedLoss`; "auto" is bfloat16 where the device is fast in it.

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
    kind = CertifiedRejectLoss if reject else CertifiedLoss
    if precision == "auto":
        precision = "bfloat16" if has_fast_bfloat16(pick_device(device)) else "float32"
    loss = kind(eps, warmup, ramp, kappa, regularizer, method, precision)
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


def adam(parameters: Iterable[nn.Parameter], learning_rate: float) -> Optimizer:
    """Make the optimizer of certified training."""
    made: Any = torch.optim.Adam(parameters, lr=learning_rate)
    optimizer: Optimizer = made
    return optimizer


def tenths(optimizer: Optimizer, total: int) -> LRScheduler:
    """Divide the learning rate by 10 after 5/7 and after 6/7 of the steps."""
    return MultiStepLR(optimizer, [total * 5 // 7, total * 6 // 7], 0.1)
