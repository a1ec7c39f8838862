"""One step of a training, and the results of an epoch."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from demur.classifier import evaluating, raising_module_errors
from demur.data import to_float
from demur.errors import DemurError
from demur.progress import Job
from demur.training.batches import Batch, Batches
from demur.training.stopping import Best, EarlyStopping

BatchTransform = Callable[[nn.Module, Tensor, Tensor, int], tuple[Tensor, Tensor]]
"""(network, images in [0, 1], labels, step) -> the images and labels to train on."""

Loss = Callable[[nn.Module, Tensor, Tensor, float], tuple[Tensor, Tensor]]
"""(network, images in [0, 1], labels, epochs that are done) -> the loss, and the clean scores."""

VALIDATION_BATCH = 512


@dataclass(frozen=True)
class Epoch:
    """Results of one epoch.

    Attributes
    ----------
    loss : float
        Mean cross-entropy of the batches, as trained on.
    accuracy : float
        Share of their images that were classified correctly, in [0, 1].
    validation_loss : float or None
        Mean cross-entropy of the validation images after the epoch, in evaluation mode.
    validation_accuracy : float or None
        Share of them that were classified correctly, in [0, 1].

    Examples
    --------
    >>> Epoch(loss=0.5, accuracy=0.8).validation_loss is None
    True
    """

    loss: float
    accuracy: float
    validation_loss: float | None = None
    validation_accuracy: float | None = None


@dataclass(frozen=True)
class Training:
    """What does not change while a network is trained."""

    fabric: Fabric
    network: nn.Module
    model: nn.Module  # the network as Fabric wraps it
    optimizer: Any  # likewise
    schedule: LRScheduler | None
    batches: Batches
    transform: BatchTransform | None
    validation: tuple[Tensor, Tensor] | None
    total: int
    seed: int
    checkpoint: Path | None
    key: str
    stopping: EarlyStopping | None = None
    loss: Loss | None = None
    max_gradient_norm: float | None = None


@dataclass
class State:
    """What changes: a checkpoint holds the first three, and the best weights."""

    step: int = 0
    history: list[Epoch] = field(default_factory=list)
    sums: Tensor = field(default_factory=lambda: torch.zeros(3, dtype=torch.float64))
    """Of the epoch so far: sum of losses, number of correct images, number of images."""
    pending: list[Tensor] = field(default_factory=list)
    """The same three of each step since the last reading, on the device."""
    best: Best | None = None
    saved_at: float = field(default_factory=time.monotonic)


def take_step(training: Training, batch: Batch, step: int) -> Tensor:
    """Take one step; return (sum of losses, number correct, number of images), on the device."""
    device = training.fabric.device
    images = to_float(batch.images.to(device))
    labels = batch.labels.to(device, torch.int64)
    if training.transform is not None:
        images, labels = training.transform(training.model, images, labels, step)
    images = _laid_out(training.network, images)
    training.optimizer.zero_grad(set_to_none=True)
    if training.loss is None:
        scores = _scores(training.model, images)
        _check_highest(batch, scores)
        loss = nn.functional.cross_entropy(scores, labels)
    else:
        epoch = step / training.batches.steps
        loss, scores = training.loss(training.network, images, labels, epoch)
    if not loss.requires_grad:
        raise DemurError(
            "the network's scores do not depend on a parameter that can learn: nothing may detach "
            "them, or compute them under torch.no_grad."
        )
    with raising_module_errors(images):
        training.fabric.backward(loss)
    if training.max_gradient_norm is not None:
        nn.utils.clip_grad_norm_(training.network.parameters(), training.max_gradient_norm)
    training.optimizer.step()
    if training.schedule is not None:
        training.schedule.step()
    with torch.no_grad():
        correct = (scores.argmax(1) == labels).sum().double()
        count = torch.full_like(loss, len(labels)).double()
        return torch.stack([loss.double() * len(labels), correct, count])


def _check_highest(batch: Batch, scores: Tensor) -> None:
    if batch.highest >= scores.shape[1]:
        raise DemurError(
            f"a label is {batch.highest}, but the network has {scores.shape[1]} outputs."
        )


def _scores(network: nn.Module, images: Tensor) -> Tensor:
    """The scores (n, outputs), in float32."""
    with raising_module_errors(images):
        scores = network(images)
    if not isinstance(scores, Tensor) or scores.ndim != 2 or len(scores) != len(images):
        shape = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise DemurError(
            f"the network must give one row of scores for each of the {len(images)} images, "
            f"not {shape}."
        )
    return scores.float()


def _laid_out(network: nn.Module, images: Tensor) -> Tensor:
    """The images in the network's precision, with the layout in memory that is fast."""
    parameter = next(network.parameters(), None)
    if parameter is not None and parameter.is_floating_point():
        images = images.to(parameter.dtype)
    if images.ndim == 4:
        images = images.contiguous(memory_format=torch.channels_last)
    return images


def collect(state: State, progress: Job, epoch: str) -> None:
    """Add the pending steps to the sums; fail if the loss of one of them is not finite."""
    rows = torch.stack(state.pending).cpu()
    bad = (~torch.isfinite(rows[:, 0])).nonzero().flatten()
    if len(bad):
        first = state.step - len(rows) + int(bad[0])
        raise DemurError(
            f"the training loss is not finite at step {first}: lower the learning rate, or check "
            "the images of that step."
        )
    state.sums = state.sums + torch.cat([rows[:, :2].sum(0), rows[:, 2:].sum(0)])
    lost, correct, count = rows[-1].tolist()
    progress.advance(len(rows), f"{epoch}, loss {lost / count:.3f}, accuracy {correct / count:.1%}")
    state.pending.clear()


def measured(training: Training, sums: Tensor) -> Epoch:
    """Results of the epoch that ended, over all processes."""
    fabric = training.fabric
    everywhere = torch.as_tensor(fabric.all_reduce(sums.to(fabric.device), reduce_op="sum"))
    loss, accuracy = (everywhere[:2] / everywhere[2]).tolist()
    if training.validation is None:
        return Epoch(loss, accuracy)
    # Batch statistics differ between processes: the first one's count, as its weights are kept.
    found: Any = None
    if fabric.is_global_zero:
        found = _validated(training, *training.validation)
    return Epoch(loss, accuracy, *fabric.broadcast(found))


@torch.no_grad()
def _validated(training: Training, images: Tensor, labels: Tensor) -> tuple[float, float]:
    """Mean cross-entropy and accuracy, in evaluation mode and float32."""
    network = training.network
    device = training.fabric.device
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    with evaluating(network), torch.autocast(device.type, enabled=False):
        for start in range(0, len(images), VALIDATION_BATCH):
            some = images[start : start + VALIDATION_BATCH]
            true = labels[start : start + VALIDATION_BATCH]
            scores = _scores(network, _laid_out(network, to_float(some.to(device))))
            if int(true.max()) >= scores.shape[1]:
                raise DemurError(
                    f"a validation label is {int(true.max())}, but the network has "
                    f"{scores.shape[1]} outputs."
                )
            true = true.to(device, torch.int64)
            loss = nn.functional.cross_entropy(scores, true, reduction="sum").double()
            sums += torch.stack([loss, (scores.argmax(1) == true).sum().double()])
    loss, accuracy = (sums / len(images)).tolist()
    return loss, accuracy
