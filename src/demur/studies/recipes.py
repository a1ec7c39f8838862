"""Recipes and measurements of several studies."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from demur import networks, seeds
from demur.classifier import REJECT, Classifier
from demur.data import ImageSet, synthetic_backgrounds, to_float
from demur.defenses import GaussianBlur, MedianBlur
from demur.evaluation.curves import offset_for
from demur.evaluation.scoring import Row, TrainingInputs
from demur.metrics import wilson_interval
from demur.networks import background_class_network
from demur.training import fit


@dataclass(frozen=True)
class SmallNetwork:
    """Train the network of the background-class paper (a recipe).

    Parameters
    ----------
    epochs, batch_size : int
    backgrounds : int, default 0
        Synthetic backgrounds of each kind. With any, they are one further class.
    sigma : float, optional
        Standard deviation, in pixels, of a Gaussian blur before the network.
    window : int, optional
        Side, in pixels, of a median blur before the network.
    """

    epochs: int
    batch_size: int
    backgrounds: int = 0
    sigma: float | None = None
    window: int | None = None

    def untrained(self, images: ImageSet, seed: int) -> Classifier:
        """Give the classifier with new weights. Raise DemurError if the images do not fit it."""
        classes = images.num_classes
        network = small_network(images, classes + (self.backgrounds > 0), seed)
        if self.sigma is not None:
            return GaussianBlur(network, classes, self.sigma)
        if self.window is not None:
            return MedianBlur(network, classes, self.window)
        return Classifier(network, classes)

    def train(self, given: TrainingInputs) -> Classifier:
        """Train; see `demur.evaluation.scoring.Recipe`."""
        data = given.data
        whole = self.untrained(data, given.seed)
        if self.backgrounds:
            data = synthetic_backgrounds(data, self.backgrounds, seeds.derive(given.seed, "made"))
        # All kinds of background are one further class.
        labels = data.labels.clamp(max=given.data.num_classes)
        options = given.options(self.epochs, self.batch_size)
        fit(whole.module, data.images, labels, **options)
        return whole


def small_network(images: ImageSet, outputs: int, seed: int) -> nn.Sequential:
    """Give the network of the background-class paper, for these images."""
    channels, size, _ = images.image_shape
    own = seeds.derive(seed, "network")
    return background_class_network(outputs, channels=channels, size=size, seed=own)


@dataclass(frozen=True)
class FalseRejectionRate:
    """Set the threshold of the base model, on the clean images of the node (a recipe).

    Parameters
    ----------
    rate : float
        Largest share of these images that is rejected, in [0, 1).
    """

    rate: float

    def train(self, given: TrainingInputs) -> Classifier:
        """Set it; see `demur.evaluation.scoring.Recipe`."""
        assert given.base is not None
        model = given.base.to(torch.device(given.device))
        model.set_threshold(offset_for(model, given.data.to_float(), self.rate))
        return model


@dataclass(frozen=True)
class WithoutReject:
    """Take the reject output away from a base model whose network has it (a recipe).

    The scores of the classes do not change.
    """

    def train(self, given: TrainingInputs) -> Classifier:
        """Take it away; see `demur.evaluation.scoring.Recipe`."""
        assert given.base is not None
        classes = given.base.num_classes
        described: Any = given.base.module.architecture
        arguments = {**described["arguments"], "num_outputs": classes}
        network = networks.build({**described, "arguments": arguments})
        whole = given.base.module.state_dict()
        own = network.state_dict().items()
        # Only the last layers are larger: by the reject output.
        network.load_state_dict(
            {name: whole[name][: len(one)] if one.ndim else whole[name] for name, one in own}
        )
        return Classifier(network, classes)


def rejected(model: Classifier, *kinds: tuple[str, Tensor]) -> list[Row]:
    """Measure the share of rejected images (n, C, H, W), uint8, of each kind (for a `Measure`)."""
    rows = []
    for kind, images in kinds:
        count = int((model.predict(to_float(images)) == REJECT).sum())
        low, high = wilson_interval(count, len(images))
        rows.append(Row(kind, count / len(images), len(images), low, high))
    return rows
