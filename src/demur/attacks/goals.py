"""What an attacker wants: which answers count as success, and the loss that leads there, in one object.

A goal names the *wanted* columns of the scores for each image. The attack has succeeded where the decision is a wanted
column; the loss to maximise sets the best wanted column against the best of the others. The reject column is one of
the others (or of the wanted), never a special case, so every attack that takes a goal is aware of rejection.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol, Self, get_args

import torch
from torch import Tensor

from demur.errors import DemurError, unknown

Measure = Literal["margin", "cross_entropy", "hinge"]
NEVER = 1e9
"""A confidence that no attack reaches: it then goes on to the largest loss, and does not stop where the answer first turns."""


class Bonus(Protocol):
    """What an attacker likes about images beside the answer: added to the goal's loss, and no part of success."""

    def __call__(self, images: Tensor) -> Tensor:
        """How much of it these images (n, C, H, W) have: (n,)."""

    def select(self, index: Tensor) -> "Bonus":
        """Give the bonus of the images of that index, where it differs between images."""


@dataclass(frozen=True, eq=False)
class Goal(ABC):
    """What every goal has. `by` is how the loss compares wanted columns w with the others o:

    `margin`: max_w s - max_o s. For Evade this is eq. 2.5.1 of the rejection paper, with its sign turned.
    `cross_entropy`: logsumexp_w s - logsumexp_o s, the log-odds of the wanted columns under the softmax. For AnyError its
    gradient points where that of the usual cross-entropy does (they differ by a positive factor for each image), without
    vanishing in float32 where the softmax saturates.
    `hinge`: -sum over classes c of max(0, 1 - y_c s_c), with y 1 for the best wanted column and -1 for the others: sec. 2.5.2 of
    the rejection paper, for one-versus-rest scores. It does not look at the reject column.

    The first two are unchanged if a constant is added to all scores of an image (R6); the hinge is not, by its nature.

    `confidence` is by how much the best wanted column must win for a success (kappa of Carlini & Wagner 2017). `aim` (N,), if
    given, is the one wanted column that the loss goes for (`toward`); any wanted column is still a success. `bonus`, if given, is added
    to the loss in attacks that have an eps: `Density`, `Likeness`. It costs a pass more for each pass.
    """

    by: Measure = "margin"
    confidence: float = 0.0
    aim: Tensor | None = None
    bonus: Bonus | None = None

    def __post_init__(self) -> None:
        if self.by not in get_args(Measure):
            raise unknown("loss", self.by, get_args(Measure))
        if not 0 <= self.confidence < torch.inf:
            raise DemurError(f"confidence must be finite and not negative, not {self.confidence}.")

    @abstractmethod
    def wanted(self, scores: Tensor, labels: Tensor, num_classes: int) -> Tensor:
        """Tell which columns count as success: (N, columns) bool."""

    def success(self, scores: Tensor, labels: Tensor, num_classes: int) -> Tensor:
        """Tell where the decision is a wanted column, by `confidence`: (N,) bool.

        Never where a score is NaN or infinite: no decision is made there.
        """
        wanted = self.wanted(scores, labels, num_classes)
        decided = wanted.gather(1, scores.argmax(1, keepdim=True)).squeeze(1) & torch.isfinite(scores).all(1)
        return decided & (_margin(scores, wanted, wanted) >= self.confidence) if self.confidence else decided

    def margin(self, scores: Tensor, labels: Tensor, num_classes: int) -> Tensor:
        """By how much the best wanted column wins: (N,), negative where it loses."""
        wanted = self.wanted(scores, labels, num_classes)
        return _margin(scores, wanted, wanted)

    def loss(self, scores: Tensor, labels: Tensor, num_classes: int) -> Tensor:
        """Compute the loss that the attacker maximises: (N,), for `margin` positive where the attack succeeds."""
        wanted = self.wanted(scores, labels, num_classes)
        sought = wanted if self.aim is None else _no_columns(scores).scatter(1, self.aim.to(scores.device)[:, None], True)
        if self.by == "margin":
            return _margin(scores, sought, wanted)
        if self.by == "cross_entropy":
            return scores.masked_fill(~sought, -torch.inf).logsumexp(1) - scores.masked_fill(wanted, -torch.inf).logsumexp(1)
        best = scores.masked_fill(~sought, -torch.inf).argmax(1, keepdim=True)
        sides = torch.full_like(scores, -1.0).scatter(1, best, 1.0)
        return -(1 - sides * scores).clamp(min=0)[:, :num_classes].sum(1)

    def toward(self, columns: Tensor) -> Self:
        """Give the goal whose loss goes for that wanted column (N,) of each image."""
        return replace(self, aim=columns)

    def check(self, labels: Tensor, num_classes: int, columns: int) -> None:  # noqa: B027 - most goals fit any classifier
        """Raise DemurError if the goal does not fit the labels (N,) or the classifier's score columns."""

    def select(self, index: Tensor) -> Self:
        """Give the goal for the images of that index, where it differs between images."""
        aim = None if self.aim is None else self.aim.to(index.device)[index]
        bonus = None if self.bonus is None else self.bonus.select(index)
        return self if aim is None and bonus is None else replace(self, aim=aim, bonus=bonus)


@dataclass(frozen=True, eq=False)
class Evade(Goal):
    """Be accepted as a class that is not the image's: wrong *and accepted*. The default; a rejected image is no success."""

    def wanted(self, scores: Tensor, labels: Tensor, num_classes: int) -> Tensor:
        """All classes but the image's own."""
        wanted = _no_columns(scores)
        wanted[:, :num_classes] = True
        return wanted.scatter(1, labels[:, None], False)


@dataclass(frozen=True, eq=False)
class AnyError(Goal):
    """Not be answered correctly: a rejection is a success too. An attacker who does not know of the reject column."""

    def wanted(self, scores: Tensor, labels: Tensor, num_classes: int) -> Tensor:
        """All columns but the image's own class."""
        return (~_no_columns(scores)).scatter(1, labels[:, None], False)


@dataclass(frozen=True, eq=False)
class ForceReject(Goal):
    """Be declined: denial of service. Needs a classifier with a reject column."""

    def wanted(self, scores: Tensor, labels: Tensor, num_classes: int) -> Tensor:
        """Only the reject column."""
        wanted = _no_columns(scores)
        wanted[:, num_classes:] = True
        return wanted

    def check(self, labels: Tensor, num_classes: int, columns: int) -> None:
        """Raise DemurError where there is no reject column."""
        if columns == num_classes:
            raise DemurError("ForceReject needs a classifier with a reject column; this one always answers.")


@dataclass(frozen=True, eq=False)
class _Target(Goal):
    classes: Tensor = field(default_factory=lambda: torch.tensor(0))

    def wanted(self, scores: Tensor, labels: Tensor, num_classes: int) -> Tensor:
        classes = self.classes.to(scores.device).expand(len(scores))
        return _no_columns(scores).scatter(1, classes[:, None], True)

    def check(self, labels: Tensor, num_classes: int, columns: int) -> None:
        classes = self.classes
        if classes.is_floating_point() or classes.ndim > 1 or (classes.ndim == 1 and len(classes) != len(labels)):
            raise DemurError(
                f"Target takes one class, or one for each of the {len(labels)} images, as integers; got shape {tuple(classes.shape)}."
            )
        if bool((classes < 0).any()) or bool((classes >= num_classes).any()):
            raise DemurError(f"Target takes classes in 0..{num_classes - 1}; to aim at rejection use ForceReject.")
        if bool((classes.to(labels.device) == labels).any()):
            raise DemurError("Target holds the true class of an image; an attack aims at another one.")

    def select(self, index: Tensor) -> Self:
        here = super().select(index)
        return here if here.classes.ndim == 0 else replace(here, classes=here.classes.to(index.device)[index])


def Target(classes: int | Tensor, by: Measure = "margin", confidence: float = 0.0) -> Goal:  # noqa: N802 - reads as the goal that it makes
    """Be accepted as a chosen class: one for all images, or (N,) one for each."""
    return _Target(by=by, confidence=confidence, classes=torch.as_tensor(classes))


def _margin(scores: Tensor, sought: Tensor, wanted: Tensor) -> Tensor:
    return scores.masked_fill(~sought, -torch.inf).amax(1) - scores.masked_fill(wanted, -torch.inf).amax(1)


def _no_columns(scores: Tensor) -> Tensor:
    return torch.zeros_like(scores, dtype=torch.bool)
