"""How the models of the rejection study are made, and what is measured of them. No attack is
imported here: a change in one does not train models again.
"""

from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from demur import seeds
from demur.attacks.base import Attack
from demur.classifier import Classifier
from demur.data import ImageSet
from demur.defenses import AdversarialTraining, DeepNeuralRejection, NeuralRejection
from demur.evaluation.scoring import Row, TrainingInputs
from demur.networks import dnr_cnn
from demur.threat import ThreatModel
from demur.training import fit, rejection_sgd

LAYERS = {"8": "layer 5", "12": "layer 7", "15": "layer 8"}
"""The paper's layers after their rectifiers, by module path: 12,544, 200 and 200 features."""


@dataclass(frozen=True)
class NetworkTraining:
    """Train the network of Table 1 as Table 2 says, or train the base model on.

    With `attack`, every batch is attacked; with `attacked` too, in the two steps of sec. 3.4: so
    many training images are attacked once, and those that break the model are added.
    """

    epochs: int
    batch_size: int
    learning_rate: float = 0.01  # from the minimum: at the first rate, .1, it would begin anew
    attack: Attack | None = None
    threat: ThreatModel | None = None
    attacked: int | None = None

    def train(self, given: TrainingInputs) -> Classifier:
        """Train; see `demur.evaluation.scoring.Recipe`."""
        data = given.data
        images = (data.images, data.labels)
        options = given.options(self.epochs, self.batch_size)
        if self.attack is None or self.threat is None or given.base is None:
            channels, size, _ = data.image_shape
            weights = seeds.derive(given.seed, "weights")
            network = dnr_cnn(data.num_classes, channels=channels, size=size, seed=weights)
            optimizer = partial(rejection_sgd, rate=self.learning_rate)
            last = fit(network, *images, optimizer=optimizer, **options)[-1]
            given.notes["training: cross-entropy"] = last.loss
            given.notes["training: accuracy"] = last.accuracy
            return Classifier(network, data.num_classes)
        once = self.attacked is not None
        inner = _module(given)
        defense = AdversarialTraining(
            inner, data.num_classes, self.attack, self.threat, prefit=once
        )
        options["optimizer"] = partial(torch.optim.SGD, lr=self.learning_rate, momentum=0.9)
        if once:
            order = torch.randperm(len(data), generator=seeds.generator(given.seed, "retraining"))
            defense.augment_and_finetune(*images, order[: self.attacked], **options)
        else:
            defense.fit(*images, **options)
        return Classifier(inner, data.num_classes)


@dataclass(frozen=True)
class Rejection:
    """Fit machines on layers of the base model (sec. 2.4): on one NR, on several DNR."""

    layers: tuple[str, ...]
    per_class: int | None
    C: float
    gamma: float
    combiner_C: float  # noqa: N815 - C, as everybody calls it
    combiner_gamma: float
    threshold: float

    def train(self, given: TrainingInputs) -> Classifier:
        """Fit; see `demur.evaluation.scoring.Recipe`."""
        assert given.validation is not None
        data = given.data
        network, classes = _module(given), data.num_classes
        how: Any = {"C": self.C, "gamma": self.gamma, "threshold": self.threshold}
        how["seed"] = given.seed
        both: Any = {"combiner_C": self.combiner_C, "combiner_gamma": self.combiner_gamma}
        model = (
            NeuralRejection(network, classes, self.layers[0], **how)
            if len(self.layers) == 1
            else DeepNeuralRejection(network, classes, self.layers, **how, **both)
        )
        chosen = data if self.per_class is None else data.balanced(self.per_class, given.seed)
        validation = (given.validation.images, given.validation.labels)
        return model.to(given.device).fit(chosen.images, chosen.labels, validation)


def _module(given: TrainingInputs) -> nn.Module:
    """Give the network of the base model, in the layout that training leaves."""
    assert given.base is not None
    return given.base.module.to(given.device).to(memory_format=torch.channels_last)


def network_figures(classifier: Classifier, train: ImageSet, test: ImageSet) -> list[Row]:
    """Loss and accuracy, without dropout (Table 3)."""
    rows = []
    for name, images in (("test", test), ("training, without dropout", train)):
        scores = classifier.scores(images.to_float())
        loss = float(nn.functional.cross_entropy(scores, images.labels))
        rows += [
            Row(f"{name}: cross-entropy", loss, len(images)),
            _accuracy(name, scores, images),
        ]
    return rows


def machine_figures(classifier: DeepNeuralRejection, test: ImageSet) -> list[Row]:
    """Accuracy of each layer's machines and of all, nothing rejected (Figures 7 and 8)."""
    seen: dict[str, list[Tensor]] = {layer: [] for layer in classifier.layers}
    pairs = list(zip(classifier.layers, classifier.machines_, strict=True))
    with ExitStack() as hooks:
        for layer, machine in pairs:
            hooks.enter_context(machine.register_forward_hook(partial(_note, seen[layer])))
        scores = classifier.scores(test.to_float())
    rows = []
    for layer, machine in pairs:
        rows.append(_accuracy(LAYERS[layer], torch.cat(seen[layer]), test))
        rows.append(Row(f"{LAYERS[layer]}: support vectors", len(machine.support)))
    return [*rows, _accuracy("combined", scores[:, :-1], test)] if len(pairs) > 1 else rows


def _note(found: list[Tensor], _machine: nn.Module, _given: Any, values: Tensor) -> None:
    found.append(values.cpu())


def _accuracy(name: str, scores: Tensor, images: ImageSet) -> Row:
    right = scores.argmax(1) == images.labels
    return Row(f"{name}: accuracy", float(right.double().mean()), len(images))
