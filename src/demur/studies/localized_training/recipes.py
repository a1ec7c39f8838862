"""How the models of localized training are made and attacked, and what is measured of them."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from demur import masks, seeds
from demur.attacks import PGD, AnyError
from demur.classifier import Classifier
from demur.data import ImageSet
from demur.defenses import AdversarialTraining
from demur.defenses.attacked_batches import MaskedAttack, RobustAccuracy
from demur.evaluation.scoring import Row, TrainingInputs, change_row, mean_row
from demur.networks import localized_network, resnet9, strided_cnn, wide_resnet
from demur.threat import ThreatModel
from demur.training import (
    Accuracy,
    CropAndFlip,
    EarlyStopping,
    fit,
    one_cycle_sgd,
    stepwise_sgd,
)

BUILDERS: dict[str, Callable[..., nn.Module]] = {
    "localized": localized_network,
    "strided": strided_cnn,
    "resnet9": resnet9,
    "wide": wide_resnet,
}
HELD_OUT_STEPS = 10

NATURAL, STANDARD, BACKGROUND = MODELS = ("natural", "standard", "background")
DIFFERENCES = ((STANDARD, NATURAL), (BACKGROUND, NATURAL), (BACKGROUND, STANDARD))
INPUTS = ("natural images", "standard attack", "background attack")
RANDOM = "random pixels, as many as background"
EVERYWHERE, AROUND, OBJECT, _ = REGIONS = ("everywhere", "background", "object only", RANDOM)


@dataclass(frozen=True)
class Stage:
    """Train a network in one stage of several; the base model is that of the stage before.

    A stage has a part of the images, and an attack within a part of eps: with the full eps from the
    start, training may stay at chance. The paper does not say that it increases eps. Without an
    attack, the network is trained on clean images.

    With `held_out`, so many training images are left out, and the stage keeps the weights of the
    epoch after which most of them are correct under an attack of HELD_OUT_STEPS steps: training
    against one step may lose its robustness at once (Wong et al. 2020, "catastrophic overfitting").
    """

    network: str
    steps: int
    batch_size: int
    learning_rate: float
    number: int = 0
    attack: PGD | None = None
    threat: ThreatModel | None = None
    held_out: int | None = None

    def train(self, given: TrainingInputs) -> Classifier:
        """Train; see `demur.evaluation.scoring.Recipe`."""
        data, held = given.data, None
        if self.held_out is not None:
            share = self.held_out / len(data)
            data, held = data.split(share, seeds.derive(given.seed, "held out"))
        index, epochs = self.images(len(data), given.seed)
        data = data.subset(index)
        classes = data.num_classes
        network = self.untrained(data, given.seed) if given.base is None else given.base.module
        options = given.options(epochs, self.batch_size)
        options |= self._descent(epochs * (len(index) // self.batch_size))
        options["seed"] = seeds.derive(given.seed, "stage", self.number)
        classifier = Classifier(network, classes)
        if held is not None:
            measure = self._measure(classifier, held, given.seed)
            options["stopping"] = EarlyStopping(measure, patience=epochs)
        if self.attack is None or self.threat is None:
            fit(network, data.images, data.labels, **options)
        else:
            defense = AdversarialTraining(network, classes, self.attack, self.threat)
            defense.fit(data.images, data.labels, **options)
        if held is not None:
            given.notes["held out: correct"] = measure(network)
        return classifier

    def untrained(self, data: ImageSet, seed: int) -> nn.Module:
        """Build the network. Raise DemurError if the images do not fit it."""
        channels, size = data.image_shape[:2]
        seed = seeds.derive(seed, "network")
        return BUILDERS[self.network](data.num_classes, channels=channels, size=size, seed=seed)

    def images(self, count: int, seed: int) -> tuple[Tensor, int]:
        """Choose the images (n,) of the stage out of `count`, and the passes over them."""
        wanted = self.steps * self.batch_size
        passes = max(1, math.ceil(wanted / count))
        some = min(count, max(self.batch_size, round(wanted / passes)))
        order = torch.randperm(count, generator=seeds.generator(seed, "stages"))
        return order[(self.number * some + torch.arange(some)) % count], passes

    def _descent(self, steps: int) -> dict[str, Any]:
        """Give the options of `fit` that belong to the network, for a stage of so many steps."""
        rate = self.learning_rate
        if self.network == "wide":  # as Madry et al. 2018 train it
            return {"optimizer": partial(stepwise_sgd, steps=steps, rate=rate)}
        if self.network == "resnet9":  # as `image_networks.SmallResNet` is trained
            one_cycle = partial(one_cycle_sgd, steps=steps, rate=rate)
            return {"optimizer": one_cycle, "transform": CropAndFlip()}
        adam = {"optimizer": partial(torch.optim.Adam, lr=rate)}
        return {**adam, "scheduler": cyclic} if self.network == "strided" else adam

    def _measure(
        self, classifier: Classifier, held: ImageSet, seed: int
    ) -> Accuracy | RobustAccuracy:
        """Give what chooses the epoch: correct answers on held-out images, attacked if the training
        is.
        """
        if self.threat is None:
            return Accuracy(held.images, held.labels)
        attack = PGD(HELD_OUT_STEPS, random_start=True)
        inside = MaskedAttack(attack, self.threat, self.threat.mask, mask_after_attack=False)
        return RobustAccuracy(classifier, held.images, held.labels, inside, seed)


def cyclic(optimizer: Optimizer, total: int) -> LambdaLR:
    """Let the learning rate rise linearly from 0 in a fifth of the steps, and fall to 0 in the
    others: a short training needs it (Wong et al. 2020).
    """
    top = 0.2 * total
    return LambdaLR(optimizer, lambda step: min((step + 1) / top, (total - step) / (total - top)))


def paper_attack(steps: int, share: float, eps: float, *, largest: bool = True) -> PGD:
    """Give the paper's attack: PGD from a random start to the largest cross-entropy, in steps of a
    share of eps.

    An image of the largest loss need not be an error where a smaller loss was (R5): to count
    errors, the attack ends at the first one.
    """
    return PGD(steps, share * eps, "cross_entropy", random_start=True, keep_maximizing=largest)


def threats(eps: float, inside: Tensor, images: ImageSet, seed: int) -> dict[str, ThreatModel]:
    """Give the threat of each region: any error, within eps, where `inside` masks the object."""
    around = masks.outside(inside)
    allowed = (None, around, inside, masks.same_area(around, images.to_float(), seed))
    return {
        region: ThreatModel("linf", eps, AnyError(), mask)
        for region, mask in zip(REGIONS, allowed, strict=True)
    }


def losses(test: ImageSet, attacked: ImageSet, *found: Any) -> list[Row]:
    """Measure the cross-entropy of each model on each kind of input, and the differences in %.

    `found` has, for each of MODELS, the classifier and its images of both attacks.
    """
    each: dict[tuple[str, str], Tensor] = {}
    for model, classifier, *sent in zip(MODELS, found[::3], found[1::3], found[2::3], strict=True):
        inputs = ((test, test.to_float()), *((attacked, images) for images in sent))
        for column, (data, images) in zip(INPUTS, inputs, strict=True):
            scores = classifier.scores(images).double()
            loss = nn.functional.cross_entropy(scores, data.labels, reduction="none")
            each[model, column] = loss
    rows = [mean_row(f"{model}: {column}", loss) for (model, column), loss in each.items()]
    for model, other in DIFFERENCES:
        for column in INPUTS:
            pair = each[model, column], each[other, column]
            rows.append(change_row(f"{model} against {other}: {column}", *pair))
    return rows
