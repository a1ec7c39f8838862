"""The steps of `demur harden`, and those that reject by a network as it is.

Each is a frozen dataclass of its settings with their defaults.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from demur.classifier import Classifier
from demur.commands.harden_layers import default_layers, full_names
from demur.data import ImageSet, to_float
from demur.defenses import (
    CertifiedConsistency,
    ConfidenceThreshold,
    DeepNeuralRejection,
    EitherRejects,
    NeuralRejection,
)
from demur.defenses.rbf_fitting import check_sizes
from demur.errors import DemurError


@dataclass(frozen=True)
class Given:
    """What a step makes a classifier from.

    Parameters
    ----------
    base : Classifier
        A copy that the step may change, on the device.
    images : ImageSet
        Images to learn from.
    held_out : ImageSet
        Images that set the threshold.
    background : Tensor of shape (n, C, H, W), uint8, optional
        Of none of the classes.
    seed : int
    device : {"cpu", "cuda"}
    checkpoint : Path
        A file of its own, for a training that is killed and resumed.
    """

    base: Classifier
    images: ImageSet
    held_out: ImageSet
    background: Tensor | None
    seed: int
    device: str
    checkpoint: Path

    @property
    def num_classes(self) -> int:
        """Number of classes of the model."""
        return self.base.num_classes

    @property
    def image(self) -> Tensor:
        """One image (1, C, H, W) in [0, 1], on the device."""
        return to_float(self.images.images[:1].to(self.device))


@dataclass(frozen=True)
class Step(ABC):
    """A defence, added to a model."""

    name: ClassVar[str] = ""
    trains: ClassVar[bool] = False
    """Whether the network learns: then it comes before rejections of a fixed network."""

    rejects: ClassVar[bool] = False

    def check(self, images: ImageSet, base: Classifier) -> None:  # noqa: B027 - few need one
        """Raise DemurError for images to learn from, or a base, that do not suffice."""

    @abstractmethod
    def make(self, given: Given) -> Classifier:
        """Make the defended classifier."""


@dataclass(frozen=True)
class Confidence(Step):
    """`ConfidenceThreshold`, the baseline of all rejections."""

    name: ClassVar[str] = "confidence-threshold"
    rejects: ClassVar[bool] = True
    score: str = "max-prob"

    def check(self, images: ImageSet, base: Classifier) -> None:
        """The base must not reject."""
        if base.rejects:
            raise DemurError(
                "confidence-threshold is for a model without a reject column, and this one has one."
            )

    def make(self, given: Given) -> Classifier:
        """Wrap the model."""
        kind: Any = self.score
        defense = ConfidenceThreshold(given.base, given.num_classes, score=kind)
        return defense.fit(given.held_out.images, given.held_out.labels, batch_size=64)


@dataclass(frozen=True)
class Consistency(Step):
    """`CertifiedConsistency`: answers that are proven constant within delta. The threshold of the
    command is delta.
    """

    name: ClassVar[str] = "certified-consistency"
    rejects: ClassVar[bool] = True
    check_by: str = "ibp"

    def check(self, images: ImageSet, base: Classifier) -> None:
        """The base must not reject, and its layers must have bounds."""
        if base.rejects:
            raise DemurError(
                "certified-consistency is for a model without a reject column, and this one has "
                "one."
            )
        self._defense(base, base.num_classes).scores(images.to_float(torch.arange(1)))

    def make(self, given: Given) -> Classifier:
        """Wrap the model."""
        return self._defense(given.base, given.num_classes)

    def _defense(self, base: Classifier, num_classes: int) -> CertifiedConsistency:
        kind: Any = self.check_by
        return CertifiedConsistency(base, num_classes, 0.0, kind)


@dataclass(frozen=True)
class _Machines(Step):
    """What both neural rejections share."""

    rejects: ClassVar[bool] = True
    layers: str = ""
    C: float = 1.0
    gamma: str | float = "scale"
    folds: int = 5
    images: int = 10_000
    max_features: int = 4096
    scores: str = "probability"

    def check(self, images: ImageSet, base: Classifier) -> None:
        """Each class needs an image in each fold."""
        check_sizes(images.labels, base.num_classes, self.folds)

    def options(self) -> dict[str, Any]:
        """Give the arguments of the defence."""
        gamma = self.gamma if self.gamma == "scale" else float(self.gamma)
        options = {"C": self.C, "gamma": gamma, "folds": self.folds, "scores": self.scores}
        return {**options, "max_features": self.max_features}

    def named(self, given: Given, count: int) -> list[str]:
        """Give the layers: the user's, or the last activations."""
        if self.layers:
            return full_names(given.base, [one.strip() for one in self.layers.split(",")])
        return default_layers(given.base, given.image, count)

    def fitted(self, defense: DeepNeuralRejection, given: Given) -> Classifier:
        """Fit the machines. Where the model rejects already, both may reject."""
        images = given.images.sample(self.images, given.seed) if self.images else given.images
        defense.to(given.device).fit(images.images, images.labels)
        if given.base.scores(given.image).shape[1] == given.num_classes:
            return defense
        return EitherRejects(defense, given.base)


@dataclass(frozen=True)
class Single(_Machines):
    """`NeuralRejection` on the last activation."""

    name: ClassVar[str] = "neural-rejection"

    def make(self, given: Given) -> Classifier:
        """Fit machines on one layer."""
        layer = self.named(given, 1)
        if len(layer) != 1:
            raise DemurError("neural-rejection reads one layer; deep-neural-rejection reads more.")
        options = self.options()
        defense = NeuralRejection(
            given.base, given.num_classes, layer[0], seed=given.seed, **options
        )
        return self.fitted(defense, given)


@dataclass(frozen=True)
class Deep(_Machines):
    """`DeepNeuralRejection` on the last three activations."""

    name: ClassVar[str] = "deep-neural-rejection"
    combiner_C: float = 1.0  # noqa: N815 - C, as everybody calls it

    def make(self, given: Given) -> Classifier:
        """Fit machines on several layers."""
        layers = self.named(given, 3)
        options: dict[str, Any] = {**self.options(), "combiner_C": self.combiner_C}
        defense = DeepNeuralRejection(
            given.base,
            given.num_classes,
            layers,
            combiner_gamma="scale",
            seed=given.seed,
            **options,
        )
        return self.fitted(defense, given)
