"""How the models of this study are made, and an attack through a stand-in for the median."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from demur.attacks.base import Attack
from demur.attacks.result import AttackResult
from demur.attacks.wrappers import BPDA
from demur.classifier import Classifier
from demur.data import ImageSet
from demur.defenses import (
    ConfidenceThreshold,
    DeepNeuralRejection,
    EitherRejects,
    GaussianBlur,
    MedianBlur,
    NeuralRejection,
)
from demur.defenses.filters import MedianFilter
from demur.evaluation.scoring import TrainingInputs
from demur.metrics.rejection.limits import just_below
from demur.studies.recipes import SmallNetwork


@dataclass(frozen=True)
class Rejection:
    """Make the base model reject, at a given share of the validation images (a recipe).

    Without machines and without a reject score of the base model, it gets a confidence threshold.
    With several rejections, an image is rejected where one of them rejects it. The first machines
    answer.

    Parameters
    ----------
    machines : tuple of tuple of str
        Layers of the network for each neural rejection; one layer alone is that of Melis et al.,
        several are deep neural rejection.
    per_class : int
        Images of each class that the machines learn from.
    C : float
    rate : float
        Largest share of the validation images that is rejected.
    """

    machines: tuple[tuple[str, ...], ...]
    per_class: int
    C: float
    rate: float

    def train(self, given: TrainingInputs) -> Classifier:
        """Fit; see `demur.evaluation.scoring.Recipe`."""
        validation = given.validation
        assert given.base is not None
        assert validation is not None
        base = given.base.to(torch.device(given.device))
        images = validation.to_float()
        base.scores(images[:1])  # whether it rejects is known from here on
        parts: list[Classifier] = [self._fitted(layers, base, given) for layers in self.machines]
        if base.rejects:
            parts.append(base)
        if not parts:
            parts.append(ConfidenceThreshold(base, base.num_classes, threshold=0.5))
        given.notes["rejected of validation"] = reject_together(parts, images, self.rate)
        model = parts[0]
        for other in parts[1:]:
            model = EitherRejects(model, other)
        return model

    def _fitted(
        self, layers: Sequence[str], base: Classifier, given: TrainingInputs
    ) -> DeepNeuralRejection:
        """Fit machines on layers of the network of the base model."""
        data = given.data
        inner = "module.network" if isinstance(base, GaussianBlur | MedianBlur) else "module"
        names = [f"{inner}.{layer}" for layer in layers]
        classes = data.num_classes
        if len(names) == 1:
            machines: DeepNeuralRejection = NeuralRejection(
                base, classes, names[0], C=self.C, seed=given.seed
            )
        else:
            machines = DeepNeuralRejection(
                base, classes, names, C=self.C, combiner_C=self.C, seed=given.seed
            )
        some = data.balanced(self.per_class, given.seed)
        machines.to(torch.device(given.device)).fit(some.images, some.labels)
        return machines


def reject_together(models: Sequence[Classifier], images: Tensor, rate: float) -> float:
    """Set the thresholds of several models, so that together they reject at most a share of images.

    Each model rejects equally many of the images (n, C, H, W). That number is the largest one with
    which the images that one of the models rejects are at most rate * n.

    Returns
    -------
    float
        The share of the images that one of the models rejects.
    """
    acceptance = [one._acceptance_of(images, one.scores(images)).cpu() for one in models]
    ordered = [one.sort().values for one in acceptance]
    allowed = int(rate * len(images) + 1e-9)
    for count in range(allowed, -1, -1):
        limits = [just_below(one, float(one[count])) for one in ordered]
        refused = [given < limit for given, limit in zip(acceptance, limits, strict=True)]
        together = int(torch.stack(refused).any(0).sum())
        if together <= allowed:
            break
    for model, limit in zip(models, limits, strict=True):
        model._accept_from(limit)
    return together / len(images)


@dataclass(frozen=True)
class TwoFilters(SmallNetwork):
    """Train the network behind a median and then a Gaussian (a recipe); see `SmallNetwork`."""

    def untrained(self, images: ImageSet, seed: int) -> Classifier:
        """Give the classifier with new weights."""
        inner = super().untrained(images, seed)
        assert self.sigma is not None
        assert self.window is not None
        return MedianBlur(inner, images.num_classes, self.window)


@dataclass(frozen=True, repr=False)
class ThroughBox(Attack):
    """An attack with a box blur in place of each median in the backward pass (BPDA): the gradient
    of a median reaches one pixel of its window only (R24).

    Parameters
    ----------
    attack : Attack
    """

    attack: Attack

    def __call__(
        self, classifier: Classifier, images: Tensor, labels: Tensor, threat: Any, **options: Any
    ) -> AttackResult:
        """Attack; see `Attack.__call__`."""
        seen = copy.deepcopy(classifier)
        for path, module in list(seen.named_modules()):
            if isinstance(module, MedianFilter):
                size = module.size
                box = nn.AvgPool2d(size, stride=1, padding=size // 2, count_include_pad=False)
                parent, _, name = path.rpartition(".")
                setattr(seen.get_submodule(parent), name, BPDA(module, box))
        return self.attack(seen.eval(), images, labels, threat, **options)
