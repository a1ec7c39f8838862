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
from demur.metrics.rejection import acceptance_threshold
from demur.networks import certified_cnn
from demur.threat import ThreatModel
from demur.training import SmoothingLoss, certified_fit, fit
from demur.training.certified import tenths

RATE = 1e-3
"""Adam's learning rate for trainings without certificates."""
FEWER = 1000


@dataclass(frozen=True)
class SmallCnn:
    """Train the small network of certified training (a recipe).

    Parameters
    ----------
    epochs, batch_size : int
    eps : float, optional
        Certified training within this Linf eps.
    ramp, kappa, learning_rate : float
        Of certified training.
    attack : Attack, optional
        Adversarial training, within `threat`.
    threat : ThreatModel, optional
    backgrounds : int, default 0
        Synthetic backgrounds of each kind. With any, they are one further class.
    reject : bool, default False
        Certified training of a learned reject column, the last output.
    """

    epochs: int
    batch_size: int
    eps: float | None = None
    ramp: float = 1.0
    kappa: float = 0.5
    learning_rate: float = 5e-4
    attack: Attack | None = None
    threat: ThreatModel | None = None
    backgrounds: int = 0
    reject: bool = False

    def train(self, given: TrainingInputs) -> Classifier:
        """Train; see `demur.evaluation.scoring.Recipe`."""
        data = given.data
        classes = data.num_classes
        channels, size, _ = data.image_shape
        network = certified_cnn(
            classes + (self.backgrounds > 0 or self.reject),
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
            options |= {"learning_rate": self.learning_rate, "reject": self.reject}
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
        return Classifier(network, classes, rejects=self.reject)


@dataclass(frozen=True)
class Threshold:
    """Add a confidence threshold to the base model (a recipe).

    Parameters
    ----------
    rate : float
        The share of the correct held-out images that is rejected.
    """

    rate: float

    def train(self, given: TrainingInputs) -> Classifier:
        """Set it; see `demur.evaluation.scoring.Recipe`."""
        assert given.base is not None
        data = given.data
        made = ConfidenceThreshold(given.base.module, data.num_classes, score="margin")
        made = made.to(torch.device(given.device))
        answers = given.base.to(torch.device(given.device)).predict(data.to_float())
        right = (answers.cpu() == data.labels).nonzero().flatten()
        correct = data.subset(right)
        return made.fit(correct.images, correct.labels, false_rejection_rate=self.rate)


@dataclass(frozen=True)
class ColumnAtRate:
    """Move the threshold of a learned reject column (a recipe).

    Parameters
    ----------
    rate : float
        The share of the correct held-out images that is rejected.
    """

    rate: float

    def train(self, given: TrainingInputs) -> Classifier:
        """Move it; see `demur.evaluation.scoring.Recipe`."""
        assert given.base is not None
        data = given.data
        made = given.base.to(torch.device(given.device))
        scores = made.scores(data.to_float()).cpu().double()
        classes = scores[:, : data.num_classes]
        margin = classes.amax(1) - scores[:, -1] + float(made.threshold or 0)
        found = acceptance_threshold(margin, classes.argmax(1) == data.labels, 1 - self.rate)
        # The reject score moves in float32: the image at the threshold stays accepted.
        made.set_threshold(found - 1e-5 * max(1.0, abs(found)))
        return made


@dataclass(frozen=True)
class Consistency:
    """Add a check of consistency to the base model (a recipe): with delta, or at a rate of false
    rejections. The check "pgd" finds delta on 1,000 images.
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
            if self.check == "pgd":
                data = data.sample(min(FEWER, len(data)), given.seed)
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


@dataclass(frozen=True)
class Noisy:
    """Train the small network for randomized smoothing, by consistency under noise (a recipe).

    Parameters
    ----------
    epochs, batch_size : int
    sigma : float
        Deviation of the noise.
    weight : float
        Of the consistency.
    """

    epochs: int
    batch_size: int
    sigma: float
    weight: float

    def train(self, given: TrainingInputs) -> Classifier:
        """Train; see `demur.evaluation.scoring.Recipe`."""
        data = given.data
        channels, size, _ = data.image_shape
        own = seeds.derive(given.seed, "network")
        network = certified_cnn(data.num_classes, channels=channels, size=size, seed=own)
        options = given.options(self.epochs, self.batch_size)
        options["optimizer"] = partial(torch.optim.Adam, lr=RATE)
        loss = SmoothingLoss(self.sigma, self.weight)
        fit(network, data.images, data.labels, loss=loss, scheduler=tenths, **options)
        return Classifier(network, data.num_classes)


@dataclass(frozen=True)
class Smoothed:
    """Put certified consistency by randomized smoothing around the base model (a recipe).

    Parameters
    ----------
    sigma, delta : float
    draws : int
        Noisy copies of each image, at prediction and for proofs.
    alpha : float
    """

    sigma: float
    delta: float
    draws: int
    alpha: float

    def train(self, given: TrainingInputs) -> Classifier:
        """Add it; see `demur.evaluation.scoring.Recipe`."""
        assert given.base is not None
        return CertifiedConsistency(
            given.base.module,
            given.data.num_classes,
            self.delta,
            "smoothing",
            sigma=self.sigma,
            draws=self.draws,
            alpha=self.alpha,
            seed=given.seed,
        )
