"""The steps of `demur harden` that train the network further."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from demur import masks
from demur.attacks import PGD
from demur.classifier import Classifier
from demur.commands.harden_steps import Given, Step
from demur.commands.harden_training import (
    StillStatistics,
    descent,
    head_alone,
    to_learn_and_stop,
    widened,
)
from demur.data import ImageSet, synthetic_backgrounds
from demur.defenses import (
    AdversarialTraining,
    BackgroundClass,
    GaussianBlur,
    LocalizedAdversarialTraining,
    MedianBlur,
)
from demur.defenses.attacked_batches import RobustAccuracy
from demur.errors import DemurError, unknown
from demur.training import Accuracy, EarlyStopping


@dataclass(frozen=True)
class _Training(Step):
    """What all fine-tunings share."""

    trains: ClassVar[bool] = True
    epochs: int = 5
    batch_size: int = 64
    learning_rate: float = 0.01
    frozen: bool = False
    patience: int = 2

    def options(self, given: Given, count: int) -> dict[str, Any]:
        """Give the arguments of `training.fit`."""
        return {
            "epochs": self.epochs,
            "batch_size": max(1, min(self.batch_size, count)),
            "optimizer": descent(self.learning_rate),
            "seed": given.seed,
            "device": given.device,
            "checkpoint": given.checkpoint,
        }

    def still(self) -> dict[str, Any]:
        """Keep the statistics of batch norms where only the head learns."""
        return {"transform": StillStatistics()} if self.frozen else {}


@dataclass(frozen=True)
class Background(_Training):
    """`BackgroundClass`: one more output, learned from images of none of the classes."""

    name: ClassVar[str] = "background-class"
    rejects: ClassVar[bool] = True
    share: float = 0.5
    """Synthetic background images, for each image to learn from."""

    def check(self, images: ImageSet, base: Classifier) -> None:
        """The base must not reject."""
        if base.rejects:
            raise DemurError(
                "background-class adds the reject column, and the model has one already."
            )

    def make(self, given: Given) -> Classifier:
        """Add an output, and fine-tune."""
        learn, stop = to_learn_and_stop(given.images, given.seed)
        background = self._background(given)
        held = max(1, round(0.15 * len(background)))
        widened(given.base, given.image)
        defense = BackgroundClass(given.base, given.num_classes, prefit=True)
        others = torch.full((held,), given.num_classes)
        measure = Accuracy(
            torch.cat([stop.images, background[:held]]), torch.cat([stop.labels, others])
        )
        options = self.options(given, len(learn)) | self.still()
        with head_alone(defense, given.image, self.frozen):
            return defense.fit(
                learn.images,
                learn.labels,
                background[held:],
                stopping=EarlyStopping(measure, self.patience),
                **options,
            )

    def _background(self, given: Given) -> Tensor:
        if given.background is not None:
            found = given.background
        else:
            each = max(1, round(self.share * len(given.images) / 5))
            made = synthetic_backgrounds(given.images, each, given.seed)
            found = made.images[len(given.images) :]
        if len(found) < 2:
            raise DemurError("background-class needs at least 2 background images.")
        order = torch.randperm(len(found), generator=torch.Generator().manual_seed(given.seed))
        return found[order]


@dataclass(frozen=True)
class Adversarial(_Training):
    """`AdversarialTraining` on mixed batches, with early stopping on robust accuracy."""

    name: ClassVar[str] = "adversarial-training"
    threat: str = "linf:8/255"
    steps: int = 7
    share: float = 0.5
    """The share of each batch that is attacked."""

    def make(self, given: Given) -> Classifier:
        """Fine-tune on attacked batches."""
        return self._fitted(AdversarialTraining(**self._arguments(given)), given)

    def _arguments(self, given: Given) -> dict[str, Any]:
        if self.frozen:
            raise DemurError(f"{self.name} changes the whole network: frozen does not apply.")
        return {
            "network": given.base,
            "num_classes": given.num_classes,
            "attack": PGD(steps=self.steps, random_start=True),
            "threat": self.threat,
            "adversarial_fraction": self.share,
            "prefit": True,
        }

    def _fitted(self, defense: AdversarialTraining, given: Given) -> Classifier:
        learn, stop = to_learn_and_stop(given.images, given.seed)
        few = stop.sample(256, given.seed)
        measure = RobustAccuracy(defense, few.images, few.labels, defense._attacker(), given.seed)
        return defense.fit(
            learn.images,
            learn.labels,
            stopping=EarlyStopping(measure, self.patience),
            **self.options(given, len(learn)),
        )


@dataclass(frozen=True)
class Localized(Adversarial):
    """`LocalizedAdversarialTraining`: only the pixels around the object are attacked."""

    name: ClassVar[str] = "localized-adversarial-training"
    region: str = "centre"
    """What is no background: "centre", the middle half of each side, or "foreground", bright
    pixels."""

    def make(self, given: Given) -> Classifier:
        """Fine-tune on images whose background is attacked."""
        _, height, width = given.images.image_shape
        mask: Any = around_foreground
        if self.region == "centre":
            mask = masks.outside(masks.centre_box((height, width), height // 2, width // 2))
        elif self.region != "foreground":
            raise unknown("region", self.region, ("centre", "foreground"))
        defense = LocalizedAdversarialTraining(**self._arguments(given), mask=mask)
        return self._fitted(defense, given)


def around_foreground(images: Tensor, labels: Tensor) -> Tensor:
    """Give the mask of the pixels that are not bright."""
    return masks.outside(masks.foreground(images, dilation=1))


@dataclass(frozen=True)
class _Filter(_Training):
    """What both blurs share: fine-tuning on filtered images; with 0 epochs there is none."""

    def _fitted(self, defense: GaussianBlur | MedianBlur, given: Given) -> Classifier:
        defense.to(given.device)
        if not self.epochs:
            return defense
        learn, stop = to_learn_and_stop(given.images, given.seed)
        measure = Accuracy(stop.images, stop.labels)
        options = self.options(given, len(learn)) | self.still()
        with head_alone(defense, given.image, self.frozen):
            return defense.fit(
                learn.images,
                learn.labels,
                stopping=EarlyStopping(measure, self.patience),
                **options,
            )


@dataclass(frozen=True)
class Gaussian(_Filter):
    """`GaussianBlur`."""

    name: ClassVar[str] = "gaussian-blur"
    sigma: float = 1.0

    def make(self, given: Given) -> Classifier:
        """Put the filter in front, and fine-tune."""
        return self._fitted(GaussianBlur(given.base, given.num_classes, self.sigma), given)


@dataclass(frozen=True)
class Median(_Filter):
    """`MedianBlur`."""

    name: ClassVar[str] = "median-blur"
    size: int = 3

    def make(self, given: Given) -> Classifier:
        """Put the filter in front, and fine-tune."""
        return self._fitted(MedianBlur(given.base, given.num_classes, self.size), given)
