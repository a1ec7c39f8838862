"""The network behind a filter, and attacks through other gradients."""

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from demur.attacks import BPDA
from demur.attacks.base import Attack
from demur.attacks.result import AttackResult
from demur.classifier import Classifier
from demur.defenses import GaussianBlur, MedianBlur
from demur.evaluation.scoring import TrainingInputs


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
