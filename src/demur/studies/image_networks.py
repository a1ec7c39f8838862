"""Recipes of base networks for CIFAR-10. They import no attack: their results stay valid."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from demur import seeds
from demur.classifier import Classifier, evaluating
from demur.data import ImageSet, to_float
from demur.errors import DemurError
from demur.evaluation.scoring import TrainingInputs
from demur.hardware import tuned
from demur.networks import enlarged_imagenet_network, resnet9
from demur.training import CropAndFlip, fit, one_cycle_sgd

AT_ONCE = 64
"""Images of one forward pass for features."""


@dataclass(frozen=True)
class SmallResNet:
    """Train a `resnet9` with shifted and mirrored images and a one-cycle learning rate (a recipe).

    Parameters
    ----------
    epochs : int, default 15
    batch_size : int, default 128
    learning_rate : float, default 0.1
        The largest one.
    width : int, default 32
        Of the network.
    """

    epochs: int = 15
    batch_size: int = 128
    learning_rate: float = 0.1
    width: int = 32

    def train(self, given: TrainingInputs) -> Classifier:
        """Train; see `demur.evaluation.scoring.Recipe`."""
        data = given.data
        channels, size, _ = data.image_shape
        seed = seeds.derive(given.seed, "network")
        network = resnet9(
            data.num_classes, channels=channels, size=size, width=self.width, seed=seed
        )
        steps = self.epochs * (len(data) // self.batch_size)
        options = given.options(self.epochs, self.batch_size)
        options["optimizer"] = partial(one_cycle_sgd, steps=steps, rate=self.learning_rate)
        last = fit(network, data.images, data.labels, transform=CropAndFlip(), **options)[-1]
        given.notes["training: cross-entropy"] = last.loss
        given.notes["training: accuracy"] = last.accuracy
        return Classifier(network, data.num_classes)


@dataclass(frozen=True)
class HeadOnFeatures:
    """Train a new last layer for the features of an ImageNet network, the base model (a recipe).

    The other layers stay as they are. Features are computed once, from the images and from their
    mirror images.

    Parameters
    ----------
    name : str, default "resnet18"
        Of the base model's architecture.
    size : int, default 112
        Pixels a side that images are enlarged to.
    epochs : int, default 20
    learning_rate : float, default 0.01
    """

    name: str = "resnet18"
    size: int = 112
    epochs: int = 20
    learning_rate: float = 0.01

    def train(self, given: TrainingInputs) -> Classifier:
        """Train; see `demur.evaluation.scoring.Recipe`."""
        if given.base is None:
            raise DemurError("features need a base model with the weights of ImageNet.")
        data = given.data
        own: Any = given.base.module
        mean, std = (one.flatten().tolist() for one in (own.mean, own.std))
        whole: Any = enlarged_imagenet_network(
            self.name, data.num_classes, size=self.size, mean=mean, std=std
        )
        head = whole.network.fc
        kept = {
            name: value
            for name, value in own.network.state_dict().items()
            if not name.startswith("fc.")
        }
        whole.network.load_state_dict(kept, strict=False)
        whole.network.fc = nn.Identity()
        whole.to(given.device)
        both = [features_of(whole, data, mirrored) for mirrored in (False, True)]
        options = given.options(self.epochs, AT_ONCE)
        options["optimizer"] = partial(torch.optim.SGD, lr=self.learning_rate, momentum=0.9)
        labels = torch.cat([data.labels, data.labels])
        last = fit(head, torch.cat(both), labels, precision="float32", **options)[-1]
        given.notes["training: accuracy"] = last.accuracy
        whole.network.fc = head
        return Classifier(whole, data.num_classes)


@torch.no_grad()
def features_of(network: nn.Module, data: ImageSet, mirrored: bool) -> Tensor:
    """Compute the outputs (n, D) of a network, on the CPU."""
    device = next(network.parameters()).device
    with evaluating(network), tuned():
        parts = [
            network(to_float(part.flip(3) if mirrored else part).to(device)).cpu()
            for part in torch.split(data.images, AT_ONCE)
        ]
    return torch.cat(parts)
