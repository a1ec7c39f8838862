"""Rejection of answers with a low confidence, for a network that has no reject score."""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar, Literal, Self, get_args

import torch
from torch import Tensor, nn

from demur.bounds.rules import ConfidenceRule
from demur.classifier import Classifier, check_counts, check_labels
from demur.data import to_float
from demur.defenses.base import Defense
from demur.defenses.margins import next_above
from demur.errors import DemurError, unknown
from demur.metrics.rejection import quantile_threshold
from demur.progress import job

Score = Literal["max-prob", "margin", "energy"]
"""How the confidence of an answer is measured."""

BATCH_SIZE = 512


class ConfidenceThreshold(Defense):
    """A classifier that answers as its network, and rejects where its confidence is low.

    The network is not trained further, and the scores of the classes do not change. An image is
    rejected if its confidence is below the threshold; an image at the threshold is accepted. The
    reject score is the best class score plus half of (threshold - confidence).

    Parameters
    ----------
    network : nn.Module
        A trained network or classifier without a reject column. It maps images (N, C, H, W) in
        [0, 1] to logits (N, num_classes), not to probabilities.
    num_classes : int
        Number of classes K.
    score : {"max-prob", "margin", "energy"}, default "max-prob"
        The confidence:

        - "max-prob": the largest probability of the softmax (Hendrycks and Gimpel 2017).
        - "margin": the best logit minus the second best. LeCun et al. 1990, "Handwritten digit
          recognition with a back-propagation network", reject by the difference of the two most
          active outputs. Deviation: logits are not squashed, so the difference does not saturate.
        - "energy": logsumexp of the logits, which is the negative energy at temperature 1 (Liu et
          al. 2020, eq. 4). It depends on the offset of the logits.
    threshold : float, optional
        The smallest confidence that is accepted, in the unit of `score`: a probability above 0 and
        below 1 for "max-prob", logits for the others. Without it, `fit` sets the threshold.

    Attributes
    ----------
    false_rejection_rate_ : float or None
        The share of the images of `fit` that is rejected; None if the threshold was given.

    Raises
    ------
    DemurError
        If the score is unknown, the threshold is out of range, or the network rejects.

    Notes
    -----
    A probability of the softmax saturates: in float32 it is exactly 1 from a margin of 17 logits
    on, and its gradient is 0. The reject score of "max-prob" is therefore in log-odds, log(p) -
    log(1 - p), which increase with p and do not saturate. Confidences are computed in float64.

    With the whole difference instead of half of it, the reject score of "margin" would be the
    second best logit plus a constant. The loss of an attack on a rejected image compares the best
    wrong class with the reject score; both would rise together, and the gradient would be 0. The
    decisions are the same with any factor above 0.

    Examples
    --------
    >>> import torch
    >>> from demur import Classifier
    >>> from demur.defenses import ConfidenceThreshold
    >>> images = torch.tensor([[[[0.1, 0.9]]], [[[0.4, 0.5]]]])
    >>> defense = ConfidenceThreshold(torch.nn.Flatten(), 2, score="margin", threshold=0.5)
    >>> defense.predict(images)
    tensor([ 1, -1])
    >>> calibrated = ConfidenceThreshold(torch.nn.Flatten(), 2)
    >>> calibrated.fit(images, torch.tensor([1, 1]), false_rejection_rate=0.5).predict(images)
    tensor([ 1, -1])
    >>> round(calibrated.threshold, 3)  # 1 / (1 + exp(-0.8))
    0.69
    """

    places: ClassVar[Mapping[str, str]] = {"network": "module.network"}
    _remedy: ClassVar[str] = " on held-out images, or give a threshold"
    false_rejection_rate_: float | None = None

    def __init__(
        self,
        network: nn.Module,
        num_classes: int,
        *,
        score: Score = "max-prob",
        threshold: float | None = None,
    ) -> None:
        if score not in get_args(Score):
            raise unknown("score", score, get_args(Score))
        if isinstance(network, Classifier) and network._columns.value:
            raise DemurError(
                f"{type(network).__name__} rejects already: ConfidenceThreshold takes a network "
                "without a reject column."
            )
        limit = 0.0 if threshold is None else _limit(score, threshold)
        module = _Thresholded(network, num_classes, score, limit)
        super().__init__(module, num_classes, rejects=True, fitted=threshold is not None)
        self.score = score
        self._given_threshold = None if threshold is None else float(threshold)

    @property
    def threshold(self) -> float:
        """The smallest confidence that is accepted, in the unit of `score`."""
        self._check_fitted()
        limit = self._thresholded.limit
        return _probability(limit) if self.score == "max-prob" else limit

    def set_threshold(self, value: float) -> None:
        """Change the threshold, in the unit of `score`. Larger values reject more images.

        Raises
        ------
        DemurError
            If the value is not finite, or no probability above 0 and below 1 for "max-prob".
        """
        self._check_fitted()
        self._thresholded.limit = _limit(self.score, value)

    def _acceptance(self, scores: Tensor) -> Tensor:
        return self._thresholded.confidence(scores[:, : self.num_classes])

    def _accept_from(self, value: float) -> None:
        self._thresholded.limit = value

    @property
    def _thresholded(self) -> "_Thresholded":
        assert isinstance(self.module, _Thresholded)
        return self.module

    def fit(
        self,
        images: Tensor | Iterable[tuple[Tensor, Tensor]],
        labels: Tensor | None = None,
        false_rejection_rate: float = 0.02,
        batch_size: int = BATCH_SIZE,
    ) -> Self:
        """Set the threshold on held-out images: the largest one that rejects at most a share.

        The share is of all these images, as for the other defences that reject. Of each image only
        the confidence is kept, so that the images need not fit into memory.

        Parameters
        ----------
        images : Tensor of shape (n, C, H, W), uint8 or float in [0, 1], or iterable of batches
            Images that the network was not trained on (R17). Batches are pairs of images and
            labels, as a `DataLoader` gives them.
        labels : Tensor of shape (n,), integers in 0..num_classes-1
            They are only checked. None with an iterable of batches.
        false_rejection_rate : float in [0, 1), default 0.02
        batch_size : int, default 512
            Images in one forward pass.

        Returns
        -------
        self

        Raises
        ------
        DemurError
            If images, labels or the rate do not fit. The defence is then unchanged.
        """
        check_rate(false_rejection_rate)
        check_counts(batch_size=batch_size)
        found = []
        seen = 0
        with self._fitting(), job("threshold", 1) as progress:
            for batch in _batches(images, labels, self.num_classes):
                for part in torch.split(batch, int(batch_size)):
                    scores = self.scores(to_float(part))[:, : self.num_classes]
                    found.append(self._thresholded.confidence(scores))
                    seen += len(part)
                    progress.advance(0, f"{seen:,} images")
            if not found:
                raise DemurError("there are no images to set the threshold on.")
            confidence = torch.cat([part.cpu() for part in found])
            limit = quantile_threshold(confidence, false_rejection_rate)
            progress.advance(1)
        self._thresholded.limit = limit
        self.false_rejection_rate_ = float((confidence < limit).double().mean())
        return self

    def hyperparameters(self) -> dict[str, Any]:
        """Give the parameters of the constructor besides `network` and `num_classes`, as JSON."""
        return {"score": self.score, "threshold": self._given_threshold}

    def learned(self) -> dict[str, Any]:
        """Give the threshold, in log-odds for "max-prob", and the false rejection rate, as JSON."""
        return {
            "limit": self._thresholded.limit,
            "false_rejection_rate": self.false_rejection_rate_,
        }

    @classmethod
    def rebuild(
        cls,
        networks: Mapping[str, Any],
        num_classes: int,
        hyperparameters: Mapping[str, Any],
        learned: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
    ) -> Self:
        """Make a fitted defence from a bundle; see `Defense.rebuild`."""
        limit = learned.get("limit")
        if not isinstance(limit, int | float) or not math.isfinite(limit):
            raise DemurError(f"the limit of a bundle must be a finite number, not {limit!r}.")
        defense = super().rebuild(networks, num_classes, hyperparameters, learned, tensors)
        defense._thresholded.limit = float(limit)
        defense.false_rejection_rate_ = learned.get("false_rejection_rate")
        defense.fitted_ = True
        return defense


class _Thresholded(nn.Module):
    """Maps images to the network's scores (N, K) and a reject score.

    `limit` is the threshold in the scale of `confidence`. It is a number and not a buffer, so that
    a change of the module's precision does not move it.
    """

    def __init__(self, network: nn.Module, num_classes: int, score: str, limit: float) -> None:
        super().__init__()
        self.network = network
        self.num_classes = num_classes
        self.score = score
        self.limit = limit

    def forward(self, images: Tensor) -> Tensor:
        given = self.network(images)
        if not isinstance(given, Tensor):
            raise DemurError(
                f"the network returned {type(given).__name__} instead of a tensor of scores: wrap "
                "it in a module that returns the scores alone."
            )
        scores: Tensor = given
        if scores.ndim != 2 or scores.shape[1] != self.num_classes:
            raise DemurError(
                f"the network gave scores of shape {tuple(scores.shape)} for {len(images)} images; "
                f"ConfidenceThreshold of {self.num_classes} classes needs "
                f"({len(images)}, {self.num_classes}), without a reject column."
            )
        reject = _above(scores.amax(1), (self.limit - self.confidence(scores)) / 2)
        return torch.cat([scores, reject[:, None]], 1)

    def reject_rule(self) -> ConfidenceRule:
        """Give the rule of rejection, for certificates."""
        kind: Any = self.score
        return ConfidenceRule(self.network, kind, self.limit)

    def confidence(self, scores: Tensor) -> Tensor:
        """Compute the confidence (N,), float64, of class scores (N, K), in a scale that does not
        saturate.
        """
        scores = scores.double()
        if self.score == "energy":
            return scores.logsumexp(1)
        best, place = scores.max(1, keepdim=True)
        others = scores.scatter(1, place, -torch.inf)
        rival = others.amax(1) if self.score == "margin" else others.logsumexp(1)
        return best.squeeze(1) - rival  # log(p) - log(1 - p) for "max-prob"


def _above(best: Tensor, ahead: Tensor) -> Tensor:
    """Add `ahead` (N,), float64, to the best scores (N,). The result has at least float32.

    Where a large score swallows a small number above 0, the next score takes its place.
    """
    precision = torch.promote_types(best.dtype, torch.float32)
    joint = (best.double() + ahead).to(precision)
    score = best.detach().to(precision)
    lost = (ahead > 0) & (joint <= score)
    return torch.where(lost, joint + (next_above(score) - joint.detach()), joint)


def _limit(score: str, threshold: float) -> float:
    """Give a threshold in the scale in which confidences are compared, or raise DemurError."""
    value = float(threshold)
    if score == "max-prob":
        if not 0 < value < 1:
            raise DemurError(
                "a threshold of max-prob is a probability above 0 and below 1, "
                f"not {value}; margin and energy have no such limits."
            )
        return math.log(value) - math.log1p(-value)
    if not math.isfinite(value):
        raise DemurError(f"a threshold must be a finite number, not {value}.")
    return value


def _probability(log_odds: float) -> float:
    """Give the probability that has these log-odds."""
    small = math.exp(-abs(log_odds))
    return (1 if log_odds > 0 else small) / (1 + small)


def _batches(
    images: Tensor | Iterable[tuple[Tensor, Tensor]], labels: Tensor | None, num_classes: int
) -> Iterator[Tensor]:
    """Give the images of each batch, with their labels checked."""
    if isinstance(images, Tensor):
        if labels is None:
            raise DemurError("give the labels of the images, or an iterable of batches.")
        pairs: Iterable[tuple[Tensor, Tensor]] = [(images, labels)] if len(images) else []
    elif labels is not None:
        raise DemurError("labels belong to the batches: pairs of images and labels.")
    else:
        pairs = images
    for batch in pairs:
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            raise DemurError("a batch must be a pair of images and labels.")
        check_labels(batch[1], len(batch[0]), num_classes)
        yield batch[0]


def check_rate(rate: float) -> None:
    """Raise DemurError unless a false rejection rate is in [0, 1)."""
    if not 0 <= rate < 1:
        raise DemurError(f"false_rejection_rate must be in [0, 1), not {rate}.")
