"""Combinations of defences."""

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from demur.bounds.rules import StricterRule
from demur.classifier import Classifier, check_classifier
from demur.defenses.base import Defense
from demur.defenses.margins import next_above
from demur.errors import DemurError


class EitherRejects(Defense):
    """A classifier that answers as the first of two, and rejects where either of them rejects.

    The class scores are those of `first`. The reject score is above the best class score by the
    larger of the two reject margins. It is differentiable, so attacks see both classifiers. It
    learns nothing: fit the two classifiers first.

    Parameters
    ----------
    first, second : Classifier
        Two classifiers with a reject column and the same number of classes.

    Examples
    --------
    >>> import torch
    >>> from demur import black_box
    >>> from demur.defenses import EitherRejects
    >>> first = black_box(lambda images: images[:, [0, 1, 2]], 2)
    >>> second = black_box(lambda images: images[:, [0, 1, 3]], 2)
    >>> images = torch.tensor([[0.1, 0.8, 0.2, 0.3], [0.1, 0.8, 0.2, 0.9], [0.1, 0.8, 0.9, 0.2]])
    >>> EitherRejects(first, second).predict(images)
    tensor([ 1, -1, -1])
    """

    places: ClassVar[Mapping[str, str]] = {"first": "module.first", "second": "module.second"}

    def __init__(self, first: Classifier, second: Classifier) -> None:
        for classifier in (first, second):
            check_classifier(classifier)
            if classifier._columns.value is False:
                raise DemurError(
                    "EitherRejects needs two classifiers with a reject column; "
                    f"{type(classifier).__name__} never rejects."
                )
        if first.num_classes != second.num_classes:
            raise DemurError(
                "EitherRejects needs two classifiers of the same classes, not of "
                f"{first.num_classes} and {second.num_classes}."
            )
        super().__init__(_Either(first, second), first.num_classes, rejects=True, fitted=True)

    @property
    def network(self) -> Classifier:
        """The classifier that answers, `first`."""
        return self.first

    @property
    def first(self) -> Classifier:
        """The classifier that answers."""
        return self._either.first

    @property
    def second(self) -> Classifier:
        """The classifier that only adds rejections."""
        return self._either.second

    @property
    def _either(self) -> "_Either":
        assert isinstance(self.module, _Either)
        return self.module

    def fit(self, images: Tensor, labels: Tensor, *args: Any, **options: Any) -> Self:
        """Raise DemurError: fit the two classifiers instead."""
        raise DemurError("EitherRejects learns nothing: fit its two classifiers first.")

    def _check_fitted(self) -> None:
        for part in (self.first, self.second):
            if isinstance(part, Defense):
                part._check_fitted()

    def _probabilities(self, scores: Tensor) -> Tensor:
        return self.first._probabilities(scores)

    @classmethod
    def rebuild(
        cls,
        networks: Mapping[str, Any],
        num_classes: int,
        hyperparameters: Mapping[str, Any],
        learned: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
    ) -> Self:
        """Make it from a bundle; see `Defense.rebuild`."""
        return cls(networks["first"], networks["second"])


class _Either(nn.Module):
    def __init__(self, first: Classifier, second: Classifier) -> None:
        super().__init__()
        self.first = first
        self.second = second

    def reject_rule(self) -> StricterRule:
        """Give the rule of rejection, for certificates: the first, of which more is rejected."""
        return StricterRule(self.first)

    def forward(self, images: Tensor) -> Tensor:
        scores = self.first(images)
        other = self.second(images)
        for classifier in (self.first, self.second):
            if not classifier.rejects:
                raise DemurError("EitherRejects needs two classifiers with a reject column.")
        ahead = other[:, -1] - other[:, :-1].amax(1)
        best = scores[:, :-1].amax(1)
        joint = best + ahead
        # Where a large score swallows a small reject margin, the next number takes its place.
        least = next_above(best.detach().to(joint))
        lost = (ahead > 0) & (joint <= best)
        joint = torch.where(lost, joint + (least - joint.detach()), joint)
        reject = torch.maximum(scores[:, -1], joint)
        return torch.cat([scores[:, :-1], reject[:, None]], 1)
