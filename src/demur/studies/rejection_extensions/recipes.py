"""How the machines of this study are made."""

from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from demur import seeds
from demur.attacks.base import Attack
from demur.classifier import Classifier
from demur.data import ImageSet
from demur.defenses import DeepNeuralRejection, NeuralRejection
from demur.evaluation.scoring import TrainingInputs
from demur.threat import ThreatModel

ALL_LAYERS: Final = {
    "1": "layer 1",
    "3": "layer 2",
    "6": "layer 3",
    "8": "layer 5",
    "12": "layer 7",
    "15": "layer 8",
}
"""All rectifiers of the network, by module path; the paper counts the pooling as a layer."""


@dataclass(frozen=True)
class Grid:
    """Values that a cross-validation chooses from, for each layer.

    Parameters
    ----------
    per_class : int
    C, gamma : tuple of float
    """

    per_class: int
    C: tuple[float, ...]
    gamma: tuple[float, ...]


@dataclass(frozen=True)
class Made:
    """Adversarial images that the machines learn from, with their true classes.

    Parameters
    ----------
    attack : Attack
        Against the machines of the round before.
    threat : ThreatModel
    rounds, images : int
        Attacked training images of each round.
    """

    attack: Attack
    threat: ThreatModel
    rounds: int
    images: int


@dataclass(frozen=True)
class Machines:
    """Fit machines on layers of the base model, and set their threshold (a recipe).

    Parameters
    ----------
    layers : tuple of str
        On one, neural rejection; on several, deep neural rejection.
    per_class : int
        Images of each class to learn from.
    C, gamma : float
        Of the layers' and of the combining machines.
    false_rejection_rate : float
        On the validation images.
    grid : Grid, optional
        Chooses C and gamma of each layer instead.
    made : Made, optional
        Adversarial images to learn from too.
    """

    layers: tuple[str, ...]
    per_class: int
    C: float
    gamma: float
    false_rejection_rate: float
    grid: Grid | None = None
    made: Made | None = None

    def train(self, given: TrainingInputs) -> Classifier:
        """Fit; see `demur.evaluation.scoring.Recipe`."""
        assert given.base is not None
        data = given.data
        model = self._new(given)
        if self.grid is not None:
            some = data.balanced(self.grid.per_class, seeds.derive(given.seed, "search"))
            model.search(some.images, some.labels, Cs=self.grid.C, gammas=self.grid.gamma)
            for layer, penalty, gamma in zip(self.layers, model.C, model.gamma, strict=True):
                name = ALL_LAYERS.get(layer, layer)
                given.notes.update({f"{name}: C": penalty, f"{name}: gamma": float(gamma)})
        chosen = data.balanced(self.per_class, given.seed)
        images, labels = chosen.images, chosen.labels
        self._fit(model, images, labels, given)
        for number in range(1, (self.made.rounds if self.made else 0) + 1):
            assert self.made is not None
            found, classes = attacked(model, data, self.made, seeds.derive(given.seed, number))
            images, labels = torch.cat([images, found]), torch.cat([labels, classes])
            model = self._new(given)
            self._fit(model, images, labels, given)
        return model

    def _new(self, given: TrainingInputs) -> DeepNeuralRejection:
        assert given.base is not None
        options: dict[str, Any] = {
            "C": self.C,
            "gamma": self.gamma,
            "false_rejection_rate": self.false_rejection_rate,
            "seed": given.seed,
        }
        network = given.base.module.to(given.device)
        classes = given.data.num_classes
        if len(self.layers) == 1:
            return NeuralRejection(network, classes, self.layers[0], **options).to(given.device)
        options |= {"combiner_C": self.C, "combiner_gamma": self.gamma}
        deep = DeepNeuralRejection(network, classes, list(self.layers), **options)
        return deep.to(given.device)

    def _fit(
        self, model: DeepNeuralRejection, images: Tensor, labels: Tensor, given: TrainingInputs
    ) -> None:
        assert given.validation is not None
        model.fit(images, labels, (given.validation.images, given.validation.labels))


def attacked(model: Classifier, data: ImageSet, made: Made, seed: int) -> tuple[Tensor, Tensor]:
    """Attack some images; give what would be sent (n, C, H, W), uint8, and the true classes."""
    chosen = data.sample(made.images, seed)
    clean = chosen.to_float()
    sent = made.attack(model.eval(), clean, chosen.labels, made.threat, seed=seed).candidates
    return (255 * sent).round().to(torch.uint8).cpu(), chosen.labels
