"""How the models of this study are made, and how they are certified."""

from dataclasses import dataclass
from functools import partial

import torch

from demur import seeds
from demur.attacks.base import Attack
from demur.classifier import Classifier
from demur.data import synthetic_backgrounds
from demur.defenses import (
    AdversarialTraining,
    BackgroundClass,
    CertifiedConsistency,
    ConfidenceThreshold,
    GaussianBlur,
)
from demur.defenses.consistency_checks import Check
from demur.evaluation.scoring import TrainingInputs
from demur.networks import certified_cnn
from demur.threat import ThreatModel
from demur.training import certified_fit, fit

RATE = 1e-3
"""Adam's learning rate for trainings without certificates."""


@dataclass(frozen=True)
class SmallCnn:
    """Train the small network of certified training (a recipe).

    Parameters
    ----------
    epochs, batch_size : int
    eps : float, optional
        Certified training within this Linf eps.
    ramp, kappa : float
        Of certified training.
    attack : Attack, optional
        Adversarial training, within `threat`.
    threat : ThreatModel, optional
    backgrounds : int, default 0
        Synthetic backgrounds of each kind. With any, they are one further class.
    """

    epochs: int
    batch_size: int
    eps: float | None = None
    ramp: float = 1.0
    kappa: float = 0.5
    attack: Attack | None = None
    threat: ThreatModel | None = None
    backgrounds: int = 0

    def train(self, given: TrainingInputs) -> Classifier:
        """Train; see `demur.evaluation.scoring.Recipe`."""
        data = given.data
        classes = data.num_classes
        channels, size, _ = data.image_shape
        network = certified_cnn(
            classes + (self.backgrounds > 0),
            channels=channels,
            size=size,
            seed=seeds.derive(given.seed, "network"),
        )
        if self.backgrounds:
            data = synthetic_backgrounds(data, self.backgrounds, seeds.derive(given.seed, "made"))
        images, labels = data.images, data.labels.clamp(max=classes)
        options = given.options(self.epochs, self.batch_size)
        if self.eps is not None:
            options |= {"eps": self.eps, "ramp": self.ramp, "kappa": self.kappa}
            certified_fit(network, images, labels, **options)
        else:
            options["optimizer"] = partial(torch.optim.Adam, lr=RATE)
            if self.attack is None or self.threat is None:
                fit(network, images, labels, **options)
            else:
                defense = AdversarialTraining(network, classes, self.attack, self.threat)
                defense.fit(images, labels, **options)
        if self.backgrounds:
            return BackgroundClass(network, classes, prefit=True)
        return Classifier(network, classes)


@dataclass(frozen=True)
class Threshold:
    """Add a confidence threshold at this false rejection rate to the base model (a recipe)."""

    rate: float

    def train(self, given: TrainingInputs) -> Classifier:
        """Set it; see `demur.evaluation.scoring.Recipe`."""
        assert given.base is not None
        data = given.data
        made = ConfidenceThreshold(given.base.module, data.num_classes, score="margin")
        made = made.to(torch.device(given.device))
        return made.fit(data.images, data.labels, false_rejection_rate=self.rate)


@dataclass(frozen=True)
class Consistency:
    """Add a check of consistency to the base model (a recipe): with delta, or at a rate of false
    rejections.
    """

    check: Check
    delta: float | None = None
    rate: float | None = None

    def train(self, given: TrainingInputs) -> Classifier:
        """Add it; see `demur.evaluation.scoring.Recipe`."""
        assert given.base is not None
        data = given.data
        made = CertifiedConsistency(
            given.base.module,
            data.num_classes,
            self.delta,
            self.check,
            false_rejection_rate=self.rate,
        )
        if self.delta is None:
            made = made.to(torch.device(given.device)).fit(data.images, data.labels)
            given.notes["delta"] = float(made.threshold)
        return made


@dataclass(frozen=True)
class Blur:
    """Put a Gaussian blur before the base model (a recipe)."""

    sigma: float

    def train(self, given: TrainingInputs) -> Classifier:
        """Add it; see `demur.evaluation.scoring.Recipe`."""
        assert given.base is not None
        classes = given.base.num_classes
        return GaussianBlur(given.base.module, classes, self.sigma)
