"""The recipe of a base network for CIFAR-10 from one for ImageNet. It imports no attack."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from demur.classifier import Classifier, evaluating
from demur.data import ImageSet, to_float
from demur.errors import DemurError
from demur.evaluation.scoring import TrainingInputs
from demur.hardware import tuned
from demur.networks import enlarged_imagenet_network
from demur.training import fit

AT_ONCE = 64
"""Images of one forward pass for features, and of one step."""


@dataclass(frozen=True)
class HeadOnFeatures:
    """Train a new last layer for the features of an ImageNet network, the base model (a recipe).

    The other layers stay as they are, so the features of each image are computed once. They are
    scaled to [0, 1] for the training, and the scale becomes part of the new layer's weights.

    Parameters
    ----------
    name : str, default "resnet18"
        Of the base model's architecture.
    size : int, default 112
        Pixels a side that images are enlarged to.
    epochs : int, default 20
    learning_rate : float, default 1.0
    mirrored : bool, default False
        Whether it learns from the mirror images too.
    """

    name: str = "resnet18"
    size: int = 112
    epochs: int = 20
    learning_rate: float = 1.0
    mirrored: bool = False

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
        sides = (False, True) if self.mirrored else (False,)
        features = torch.cat([features_of(whole, data, mirrored) for mirrored in sides])
        options = given.options(self.epochs, AT_ONCE)
        options["optimizer"] = partial(torch.optim.SGD, lr=self.learning_rate, momentum=0.9)
        labels = data.labels.repeat(len(sides))
        largest = features.amax()  # a rectifier and a mean are before: none is negative
        last = fit(head, features / largest, labels, precision="float32", **options)[-1]
        with torch.no_grad():
            head.weight /= largest
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
