"""How the models of the comparison are made."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from demur import masks, seeds
from demur.attacks.base import Attack
from demur.classifier import Classifier
from demur.data.images import ImageSet
from demur.data.synthetic import synthetic_backgrounds
from demur.defenses import (
    AdversarialTraining,
    DeepNeuralRejection,
    EitherRejects,
    GaussianBlur,
)
from demur.evaluation.scoring import TrainingInputs
from demur.networks import background_class_network
from demur.threat import ThreatModel
from demur.training import fit


@dataclass(frozen=True)
class NetworkTraining:
    """Train a network.

    Parameters
    ----------
    epochs, batch_size : int
    backgrounds : int, default 0
        Synthetic backgrounds of each kind. With any, they are one further class.
    sigma : float, optional
        Standard deviation of a Gaussian blur before the network, in pixels.
    """

    epochs: int
    batch_size: int
    backgrounds: int = 0
    sigma: float | None = None

    def train(self, given: TrainingInputs) -> Classifier:
        """Train; see `demur.evaluation.scoring.Recipe`."""
        images, labels = self._material(given.data, given.seed)
        classes = given.data.num_classes
        outputs = classes + (self.backgrounds > 0)
        network = _network(given, outputs)
        options = _options(given, self.epochs, self.batch_size)
        if self.sigma is None:
            fit(network, images, labels, **options)
            return Classifier(network, classes)
        GaussianBlur(network, outputs, self.sigma).fit(images, labels, **options)
        return GaussianBlur(network, classes, self.sigma)

    def _material(self, data: ImageSet, seed: int) -> tuple[Tensor, Tensor]:
        if not self.backgrounds:
            return data.images, data.labels
        mixed = synthetic_backgrounds(data, self.backgrounds, seeds.derive(seed, "made"))
        # All kinds of background are one further class.
        return mixed.images, mixed.labels.clamp(max=data.num_classes)


@dataclass(frozen=True)
class AttackedTraining:
    """Train a network on attacked images.

    Parameters
    ----------
    epochs, batch_size : int
    attack : Attack
    threat : ThreatModel
    box : int, optional
        Side of a centred box that the attack leaves alone, in pixels: localized adversarial
        training. Without it the attack may change the whole image.
    """

    epochs: int
    batch_size: int
    attack: Attack
    threat: ThreatModel
    box: int | None = None

    def train(self, given: TrainingInputs) -> Classifier:
        """Train; see `demur.evaluation.scoring.Recipe`."""
        data = given.data
        network = _network(given, data.num_classes)
        around = None
        if self.box is not None:
            height, width = data.images.shape[2:]
            around = masks.outside(masks.centre_box((height, width), self.box, self.box))
        defense = AdversarialTraining(
            network, data.num_classes, self.attack, self.threat, mask=around
        )
        options = _options(given, self.epochs, self.batch_size)
        defense.fit(data.images, data.labels, **options)
        return Classifier(network, data.num_classes)


@dataclass(frozen=True)
class Machines:
    """Fit deep neural rejection on inner layers of the base model.

    Parameters
    ----------
    layers : tuple of str
        Of the network of the base model.
    per_class : int
        Images of each class that the machines learn from.
    C : float
    false_rejection_rate : float
    combined : bool, default False
        Whether the base model, which rejects too, stays: the result rejects where either does.
    """

    layers: tuple[str, ...]
    per_class: int
    C: float
    false_rejection_rate: float
    combined: bool = False

    def train(self, given: TrainingInputs) -> Classifier:
        """Fit; see `demur.evaluation.scoring.Recipe`."""
        base = given.base
        validation = given.validation
        assert base is not None
        assert validation is not None
        deep = DeepNeuralRejection(
            base if self.combined else base.module,
            given.data.num_classes,
            list(self.layers),
            C=self.C,
            combiner_C=self.C,
            false_rejection_rate=self.false_rejection_rate,
            seed=given.seed,
        ).to(torch.device(given.device))
        train = given.data.balanced(self.per_class, given.seed)
        deep.fit(train.images, train.labels, (validation.images, validation.labels))
        return EitherRejects(deep, base) if self.combined else deep


def _network(given: TrainingInputs, outputs: int) -> nn.Sequential:
    channels, size = given.data.images.shape[1:3]
    seed = seeds.derive(given.seed, "network")
    return background_class_network(outputs, channels=channels, size=size, seed=seed)


def _options(given: TrainingInputs, epochs: int, batch_size: int) -> dict[str, Any]:
    return {
        "epochs": epochs,
        "batch_size": batch_size,
        "seed": given.seed,
        "device": given.device,
        "checkpoint": given.checkpoint,
    }
