"""Early stopping: a training keeps the weights of its best epoch."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from demur.classifier import check_counts, device_of, evaluating
from demur.data import to_float

AT_ONCE = 256


@dataclass(frozen=True)
class EarlyStopping:
    """Keep the weights of the best epoch, and end a training that does not improve.

    The network is measured before the first epoch, too: if no epoch is better, it keeps the weights
    that it came with.

    Parameters
    ----------
    measure : callable
        Gives a number for the network, in evaluation mode: larger is better. A checkpoint needs it
        to be a value that `files.fingerprint` takes.
    patience : int, default 2
        The training ends after so many epochs that are not better than the best one.

    Examples
    --------
    >>> import torch
    >>> images, labels = torch.rand(8, 1, 2, 2), torch.tensor([0, 1] * 4)
    >>> EarlyStopping(Accuracy(images, labels), patience=1).patience
    1
    """

    measure: Callable[[nn.Module], float]
    patience: int = 2

    def __post_init__(self) -> None:
        check_counts(patience=self.patience)


@dataclass
class Best:
    """The best weights so far, their number, and the epoch after which they were measured."""

    value: float
    epoch: int
    weights: dict[str, Any]


@dataclass(frozen=True, eq=False)
class Accuracy:
    """The share of held-out images that a network gives the right column, a measure.

    Parameters
    ----------
    images : Tensor of shape (N, C, H, W), uint8 or float in [0, 1]
    labels : Tensor of shape (N,)

    Examples
    --------
    >>> import torch
    >>> measure = Accuracy(torch.tensor([[[[0.1, 0.9]]]]), torch.tensor([1]))
    >>> measure(nn.Flatten())
    1.0
    """

    images: Tensor
    labels: Tensor

    @torch.no_grad()
    def __call__(self, network: nn.Module) -> float:
        """Measure a network."""
        device = device_of(network, torch.device("cpu"))
        correct = 0
        with evaluating(network), torch.autocast(device.type, enabled=False):
            for start in range(0, len(self.images), AT_ONCE):
                scores = network(to_float(self.images[start : start + AT_ONCE].to(device)))
                true = self.labels[start : start + AT_ONCE].to(device)
                correct += int((scores.argmax(1) == true).sum())
        return correct / len(self.images)


def look(stopping: EarlyStopping | None, network: nn.Module, epoch: int, best: Any) -> Best | None:
    """Measure the network after an epoch, and give the best weights so far."""
    if stopping is None:
        return None
    with evaluating(network):
        value = float(stopping.measure(network))
    if isinstance(best, Best) and not value > best.value:
        return best
    state = network.state_dict()
    return Best(value, epoch, {name: one.detach().cpu().clone() for name, one in state.items()})


def ended(stopping: EarlyStopping | None, epoch: int, best: Best | None) -> bool:
    """Say whether the patience with a training is over."""
    return stopping is not None and best is not None and epoch - best.epoch >= stopping.patience
