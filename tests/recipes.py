"""Recipes of the small plans. This file imports no attack: their keys do not depend on attacks."""

from dataclasses import dataclass

from demur.classifier import Classifier
from demur.evaluation.scoring import Row
from demur.networks import background_class_network
from demur.training import fit


@dataclass(frozen=True)
class TinyTraining:
    """Train the small network for an epoch."""

    epochs: int = 1

    def train(self, given):
        network = background_class_network(10, channels=1, size=28, seed=given.seed)
        options = {"epochs": self.epochs, "batch_size": 32, "seed": given.seed}
        data = given.data
        fit(network, data.images, data.labels, checkpoint=given.checkpoint, **options)
        return Classifier(network, 10)


@dataclass(frozen=True)
class Copy:
    """Give the base model."""

    def train(self, given):
        return given.base


def mean_margin(records):
    return [Row("mean margin", float(records["class_margin"].mean()), n=records.height)]
