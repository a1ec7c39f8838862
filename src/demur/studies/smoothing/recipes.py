"""How the networks of the smoothing study are trained, and its attacks through other gradients."""

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from demur import seeds
from demur.attacks import BPDA
from demur.attacks.base import Attack
from demur.attacks.result import AttackResult
from demur.classifier import Classifier
from demur.data import ImageSet
from demur.defenses import GaussianBlur, MedianBlur
from demur.evaluation.scoring import TrainingInputs
from demur.networks import background_class_network
from demur.training import fit


@dataclass(frozen=True)
class Filtered:
    """Train a network on filtered images only (sec. 3); without sigma and window, on all images."""

    epochs: int
    batch_size: int
    sigma: float | None = None
    window: int | None = None

    def untrained(self, images: ImageSet, seed: int) -> Classifier:
        """Give the classifier with new weights. Raise DemurError if the images do not fit it."""
        channels, size = images.images.shape[1:3]
        classes = images.num_classes
        own = seeds.derive(seed, "network")
        network = background_class_network(classes, channels=channels, size=size, seed=own)
        if self.sigma is not None:
            return GaussianBlur(network, classes, self.sigma)
        if self.window is not None:
            return MedianBlur(network, classes, self.window)
        return Classifier(network, classes)

    def train(self, given: TrainingInputs) -> Classifier:
        """Train; see `demur.evaluation.scoring.Recipe`."""
        whole = self.untrained(given.data, given.seed)
        options: dict[str, Any] = {"epochs": self.epochs, "batch_size": self.batch_size}
        options |= {"seed": given.seed, "device": given.device, "checkpoint": given.checkpoint}
        fit(whole.module, given.data.images, given.data.labels, **options)
        return whole


@dataclass(frozen=True)
class WithoutFilter:
    """The network behind the filter of the base model, which the defence-unaware attacker knows."""

    def train(self, given: TrainingInputs) -> Classifier:
        """Take the filter away; see `demur.evaluation.scoring.Recipe`."""
        assert isinstance(given.base, GaussianBlur | MedianBlur)
        return Classifier(given.base.network, given.base.num_classes)


@dataclass(frozen=True, repr=False)
class StandIn(Attack):
    """An attack with a stand-in for the filter in the backward pass (BPDA).

    The stand-in is the identity, or a box blur of the size of the median.
    """

    attack: Attack
    gradient: Literal["identity", "box"]

    def __call__(
        self, classifier: Classifier, images: Tensor, labels: Tensor, threat: Any, **options: Any
    ) -> AttackResult:
        """Attack; see `Attack.__call__`."""
        assert isinstance(classifier, GaussianBlur | MedianBlur)
        size = int(getattr(classifier, "size", 3))
        box = nn.AvgPool2d(size, stride=1, padding=size // 2, count_include_pad=False)
        through = BPDA(classifier.filter, box if self.gradient == "box" else None)
        seen = Classifier(nn.Sequential(through, classifier.network), classifier.num_classes)
        return self.attack(seen.eval(), images, labels, threat, **options)
