"""The recipe of a base network for CIFAR-10. It imports no attack: its results stay valid."""

from dataclasses import dataclass
from functools import partial

from demur import seeds
from demur.classifier import Classifier
from demur.evaluation.scoring import TrainingInputs
from demur.networks import resnet9
from demur.training import CropAndFlip, fit, one_cycle_sgd


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
