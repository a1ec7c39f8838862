"""Goals: which answers an attacker wants.

A goal names the *wanted* columns of the scores for each image. An attack succeeds on an image where
the decision is a wanted column. Every loss sets the best wanted column against the best of the
other columns. The reject column is an ordinary column: it is wanted or it is not. Therefore every
attack that takes a goal is aware of rejection.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor

from demur.errors import DemurError, unknown

Loss = Literal["margin", "scaled_margin", "cross_entropy", "hinge"]
"""How a loss compares the wanted columns with the others; see `Goal.loss`."""


def check_loss(loss: str) -> None:
    """Raise DemurError unless `loss` is one of the losses."""
    if loss not in get_args(Loss):
        raise unknown("loss", loss, get_args(Loss))


@dataclass(frozen=True)
class Goal(ABC):
    """What an attacker wants: the base class of `Evade`, `AnyError`, `ForceReject` and `Target`.

    A goal has no hyperparameters of the attack. Two goals of the same class with the same classes
    are equal.
    """

    @abstractmethod
    def wanted(self, scores: Tensor, labels: Tensor, num_classes: int) -> Tensor:
        """Flag the columns that count as success.

        Parameters
        ----------
        scores : Tensor of shape (N, num_classes) or (N, num_classes + 1)
            Scores of N images. The last column of the larger shape is the reject score.
        labels : Tensor of shape (N,), int64
            True classes.
        num_classes : int
            Number of classes.

        Returns
        -------
        Tensor of shape (N, columns), bool
        """

    def success(
        self, scores: Tensor, labels: Tensor, num_classes: int, confidence: float = 0.0
    ) -> Tensor:
        """Flag the images whose decision is a wanted column.

        Parameters
        ----------
        scores, labels, num_classes
            As in `wanted`.
        confidence : float, in score units, default 0
            The best wanted column must win by at least this margin (kappa of Carlini & Wagner
            2017).

        Returns
        -------
        Tensor of shape (N,), bool
            False where a score is NaN or infinite, because no decision is made there.
        """
        wanted = self.wanted(scores, labels, num_classes)
        decision = scores.argmax(1, keepdim=True)
        decided = wanted.gather(1, decision).squeeze(1) & torch.isfinite(scores).all(1)
        if not confidence:
            return decided
        return decided & (_margin(scores, wanted, wanted) >= confidence)

    def margin(self, scores: Tensor, labels: Tensor, num_classes: int) -> Tensor:
        """Compute how far the best wanted column is above the best other column.

        Returns
        -------
        Tensor of shape (N,)
            Negative where the attack fails.
        """
        wanted = self.wanted(scores, labels, num_classes)
        return _margin(scores, wanted, wanted)

    def loss(
        self,
        scores: Tensor,
        labels: Tensor,
        num_classes: int,
        loss: Loss = "margin",
        toward: Tensor | None = None,
    ) -> Tensor:
        """Compute the loss that an attack maximises.

        Parameters
        ----------
        scores, labels, num_classes
            As in `wanted`.
        loss : {"margin", "scaled_margin", "cross_entropy", "hinge"}, default "margin"
            With w the wanted columns and o the others:

            - "margin": max_w s - max_o s. For `Evade` this is eq. 2.5.1 of the rejection paper,
              with its sign turned.
            - "scaled_margin": the margin divided by the largest score less the mean of all columns.
              It takes the place of the DLR loss (Croce & Hein 2020), which needs four columns, and
              whose gradient differs from the margin's in the same way. With two columns it is the
              margin.
            - "cross_entropy": logsumexp_w s - logsumexp_o s, the log-odds of the wanted columns
              under the softmax. For `AnyError` its gradient has the direction of the gradient of
              the usual cross-entropy. It does not vanish in float32 where the softmax saturates.
            - "hinge": -sum over classes c of max(0, 1 - y_c s_c), with y = 1 for the best wanted
              column and -1 for the others. Sec. 2.5.2 of the rejection paper, for one-versus-rest
              scores. It ignores the reject column.

            All but the hinge do not change if a constant is added to all scores of an image (R6).
        toward : Tensor of shape (N,), int64, optional
            The one wanted column that the loss raises. Every wanted column still counts as success.

        Returns
        -------
        Tensor of shape (N,)
            For both margins, positive where the attack succeeds.
        """
        wanted = self.wanted(scores, labels, num_classes)
        sought = wanted
        if toward is not None:
            sought = _no_columns(scores).scatter(1, toward.to(scores.device)[:, None], True)
        if loss == "margin":
            return _margin(scores, sought, wanted)
        if loss == "scaled_margin":
            return _margin(scores, sought, wanted) / _scale(scores)
        if loss == "cross_entropy":
            raised = scores.masked_fill(~sought, -torch.inf).logsumexp(1)
            return raised - scores.masked_fill(wanted, -torch.inf).logsumexp(1)
        best = scores.masked_fill(~sought, -torch.inf).argmax(1, keepdim=True)
        sides = torch.full_like(scores, -1.0).scatter(1, best, 1.0)
        return -(1 - sides * scores).clamp(min=0)[:, :num_classes].sum(1)

    def check(self, labels: Tensor, num_classes: int, columns: int) -> None:  # noqa: B027
        """Raise DemurError if the goal does not fit the labels (N,) or the score columns."""

    def select(self, index: Tensor) -> Self:
        """Give the goal of the images at `index` (n,), where it differs between images."""
        return self

    def to_dict(self) -> dict[str, Any]:
        """Describe the goal as a plain dict, for keys and reports."""
        return {"goal": type(self).__name__}


@dataclass(frozen=True)
class Evade(Goal):
    """The image is accepted as a wrong class. A rejected image is no success. This is the default
    goal.

    Examples
    --------
    >>> import torch
    >>> from demur.goals import Evade
    >>> scores = torch.tensor([[1.0, 3.0, 2.0], [1.0, 2.0, 3.0]])  # 2 classes, reject
    >>> Evade().success(scores, torch.tensor([0, 0]), num_classes=2).tolist()
    [True, False]
    """

    def wanted(self, scores: Tensor, labels: Tensor, num_classes: int) -> Tensor:
        """Flag all classes except the true one."""
        wanted = _no_columns(scores)
        wanted[:, :num_classes] = True
        return wanted.scatter(1, labels[:, None], False)


@dataclass(frozen=True)
class AnyError(Goal):
    """The image is not answered correctly. A rejection is a success too.

    An attacker that does not know about the reject column has this goal.
    """

    def wanted(self, scores: Tensor, labels: Tensor, num_classes: int) -> Tensor:
        """Flag all columns except the true class."""
        return (~_no_columns(scores)).scatter(1, labels[:, None], False)


@dataclass(frozen=True)
class ForceReject(Goal):
    """The image is rejected: denial of service. The classifier needs a reject column."""

    def wanted(self, scores: Tensor, labels: Tensor, num_classes: int) -> Tensor:
        """Flag the reject column only."""
        wanted = _no_columns(scores)
        wanted[:, num_classes:] = True
        return wanted

    def check(self, labels: Tensor, num_classes: int, columns: int) -> None:
        """Raise DemurError if the classifier has no reject column."""
        if columns == num_classes:
            raise DemurError(
                "ForceReject needs a classifier with a reject column; this one never rejects."
            )


@dataclass(frozen=True, eq=False)
class Target(Goal):
    """The image is accepted as a chosen class.

    Parameters
    ----------
    classes : int or Tensor of shape (N,), integer
        The wanted class: one for all images, or one for each image. Never the reject column (R22).

    Examples
    --------
    >>> import torch
    >>> from demur.goals import Target
    >>> Target(2) == Target(torch.tensor(2))
    True
    """

    classes: int | Tensor

    def __post_init__(self) -> None:
        try:
            classes = torch.as_tensor(self.classes)
        except (TypeError, ValueError, RuntimeError) as error:
            raise DemurError(f"Target takes integer classes, not {self.classes!r}.") from error
        if classes.is_floating_point() or classes.is_complex() or classes.dtype == torch.bool:
            raise DemurError(f"Target takes integer classes, not {classes.dtype}.")
        value = int(classes) if classes.ndim == 0 else classes.long()
        object.__setattr__(self, "classes", value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Target) and self._values() == other._values()

    def __hash__(self) -> int:
        return hash((Target, str(self._values())))

    def __repr__(self) -> str:
        return f"Target({self._values()})"

    def _values(self) -> int | list[int]:
        values: list[int] = self.classes.tolist() if isinstance(self.classes, Tensor) else []
        return self.classes if isinstance(self.classes, int) else values

    def wanted(self, scores: Tensor, labels: Tensor, num_classes: int) -> Tensor:
        """Flag the chosen class."""
        wanted = _no_columns(scores)
        if isinstance(self.classes, int):
            wanted[:, self.classes] = True
            return wanted
        return wanted.scatter(1, self.classes.to(scores.device)[:, None], True)

    def check(self, labels: Tensor, num_classes: int, columns: int) -> None:
        """Raise DemurError if a class is out of range, is the true class, or the number of classes
        is not N.
        """
        classes = torch.as_tensor(self.classes)
        if classes.ndim > 1 or (classes.ndim == 1 and len(classes) != len(labels)):
            raise DemurError(
                f"Target takes one class, or one for each of the {len(labels)} images; "
                f"got shape {tuple(classes.shape)}."
            )
        if bool((classes < 0).any()) or bool((classes >= num_classes).any()):
            raise DemurError(
                f"Target takes classes in 0..{num_classes - 1}; for rejections use ForceReject."
            )
        if bool((classes.to(labels.device) == labels).any()):
            raise DemurError("Target contains the true class of an image; choose another class.")

    def select(self, index: Tensor) -> Self:
        """Give the goal of the images at `index`."""
        if isinstance(self.classes, int):
            return self
        return replace(self, classes=self.classes.to(index.device)[index])

    def to_dict(self) -> dict[str, Any]:
        """Describe the goal with its classes."""
        return {"goal": "Target", "classes": self._values()}


def as_goal(goal: object) -> Goal:
    """Give the goal. Raise DemurError for any other object."""
    if not isinstance(goal, Goal):
        raise DemurError(
            f"a goal is Evade(), Target(classes), AnyError() or ForceReject(), not {goal!r}."
        )
    return goal


def _margin(scores: Tensor, sought: Tensor, wanted: Tensor) -> Tensor:
    best = scores.masked_fill(~sought, -torch.inf).amax(1)
    return best - scores.masked_fill(wanted, -torch.inf).amax(1)


def _scale(scores: Tensor) -> Tensor:
    """Give the largest score less the mean (n,), or 1 where that says nothing: of two columns it is
    half the margin itself.
    """
    scale = scores.amax(1) - scores.mean(1)
    usable = scale.isfinite() & (scale > 0)
    return torch.where(usable & (scores.shape[1] > 2), scale, 1.0)


def _no_columns(scores: Tensor) -> Tensor:
    return torch.zeros_like(scores, dtype=torch.bool)
