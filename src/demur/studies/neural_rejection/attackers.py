"""The attack of the rejection paper."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from demur import seeds
from demur.attacks import PGD, feature_density, feature_matching, wider_kernels
from demur.attacks.base import Attack
from demur.attacks.book import Regularizer
from demur.attacks.result import AttackResult
from demur.attacks.strongest import WIDER
from demur.classifier import Classifier, Outcome, outcomes
from demur.data import ImageSet
from demur.defenses import DeepNeuralRejection
from demur.networks import FeatureExtractor
from demur.threat import ThreatModel

KNOWN = 200  # images that a density is estimated from


@dataclass(frozen=True, repr=False)
class DoubleStart(Attack):
    """PGD from each image, and from an image of another class (sec. 3.5; Biggio et al. 2013).

    A term on inner features goes toward those of known images, or of an accepted one of another
    class, times `weight`; gradients are then those of wider kernels. Without machines the features
    are of `layer`.
    """

    attack: PGD
    known: ImageSet
    term: Literal["", "density", "matching"] = ""
    layer: str = "15"
    weight: float = 1.0

    def __call__(
        self,
        classifier: Classifier,
        images: Tensor,
        labels: Tensor,
        threat: ThreatModel | str,
        **options: Any,
    ) -> AttackResult:
        """Attack; see `Attack.__call__`."""
        others = other_classes(images, labels, self.known, options.get("seed", 0))
        options["starting_points"] = torch.stack([images, others])
        if self.term:
            options["regularizer"] = self._regularizer(classifier, images, labels)
        with wider_kernels(classifier, WIDER[0] if self.term else 1.0):
            return self.attack(classifier, images, labels, threat, **options)

    def _regularizer(self, classifier: Classifier, images: Tensor, labels: Tensor) -> Regularizer:
        known = self.known
        inner: Any = classifier.module
        machines = isinstance(classifier, DeepNeuralRejection)
        features = inner.extractor if machines else FeatureExtractor(inner, [self.layer])
        if self.term == "density":
            return feature_density(features, known.to_float()[:KNOWN], weight=self.weight)
        right = outcomes(classifier, known.to_float(), known.labels) == Outcome.CORRECT
        pool = known.subset(right.nonzero().flatten()) if bool(right.any()) else known
        apart = torch.cdist(images.flatten(1), pool.to_float().flatten(1))
        apart = apart.masked_fill(labels[:, None] == pool.labels[None, :], torch.inf)
        return feature_matching(features, pool.to_float(apart.argmin(1)), weight=10 * self.weight)

    def __repr__(self) -> str:
        """Leave the images out."""
        weight = f" x {self.weight:g}" if self.weight != 1 else ""
        return f"DoubleStart({self.attack}{self.term and f', {self.term}'}{weight})"


def other_classes(images: Tensor, labels: Tensor, known: ImageSet, seed: int) -> Tensor:
    """Draw a known image of another class for each image (N, C, H, W), by image and seed."""
    draws = seeds.uniform(seeds.image_keys(images), (len(known),), seed, "others")
    same = known.labels[None, :] == labels[:, None]
    return known.to_float(draws.masked_fill(same, -1.0).argmax(1))
