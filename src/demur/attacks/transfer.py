"""Transfer: attack another classifier, and try the result on this one."""

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from demur.attacks.base import Attack, SearchAttack
from demur.attacks.book import Regularizer
from demur.attacks.engine import GradientPrecision
from demur.attacks.result import AttackResult
from demur.attacks.state import AttackState
from demur.classifier import Classifier, check_classifier
from demur.errors import DemurError
from demur.threat import ThreatModel, as_threat


@dataclass(frozen=True, repr=False)
class _Try(SearchAttack):
    """Evaluate the starting points."""

    needs_eps: ClassVar[bool] = False
    takes_starting_points: ClassVar[bool] = True

    def search(self, state: AttackState) -> None:
        """Evaluate them."""
        state.evaluate(state.starting_points)


@dataclass(frozen=True, repr=False)
class Transfer(Attack):
    """Attack a surrogate, and evaluate its candidates on the classifier.

    A black box scores the first image, each candidate, the clean image where the candidate fails,
    and at the end each success again (R3), an image that was attacked alone twice.

    Parameters
    ----------
    attack : Attack
        The attack of the surrogate. One that asks for confidence, such as
        `CarliniWagnerL2(confidence=10)`, or goes on to the largest loss, such as
        `PGD(keep_maximizing=True)`, transfers better.

    Examples
    --------
    >>> import torch
    >>> from demur import Classifier, attacks
    >>> module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3))
    >>> clf, other = Classifier(module, 3), Classifier(module, 3)
    >>> images, labels = torch.full((2, 1, 8, 8), 0.5), torch.tensor([0, 1])
    >>> attack = attacks.Transfer(attacks.PGD(steps=10))
    >>> attack(clf, images, labels, "linf:0.5", surrogate=other).success.tolist()
    [True, True]
    """

    attack: Attack

    def __post_init__(self) -> None:
        if not isinstance(self.attack, Attack):
            raise DemurError(
                f"Transfer takes an attack such as PGD(steps=40), not {self.attack!r}."
            )

    def __call__(
        self,
        classifier: Classifier,
        images: Tensor,
        labels: Tensor,
        threat: ThreatModel | str,
        *,
        seed: int = 0,
        batch_size: int | None = None,
        precision: GradientPrecision = "auto",
        regularizer: Regularizer | None = None,
        surrogate: Classifier | None = None,
    ) -> AttackResult:
        """Attack the surrogate with the same threat; see `Attack.__call__` for the other
        parameters.

        Parameters
        ----------
        surrogate : Classifier
            A classifier of the same classes with gradients, for example trained on the answers of a
            black box. Required.

        Returns
        -------
        AttackResult
            Of the classifier: `forwards` are its answers without those of the checks, 1 or 2 for
            each image. Passes of the surrogate are not counted.

        Raises
        ------
        DemurError
            If there is no surrogate, it has other classes, or the input does not fit.
        """
        threat = as_threat(threat)
        check_classifier(classifier)
        if surrogate is None:
            raise DemurError("Transfer needs the classifier that it attacks: pass surrogate=...")
        check_classifier(surrogate)
        if surrogate.num_classes != classifier.num_classes:
            raise DemurError(
                f"the surrogate has {surrogate.num_classes} classes, "
                f"the classifier {classifier.num_classes}."
            )
        sent = self.attack(
            surrogate,
            images,
            labels,
            threat,
            seed=seed,
            batch_size=batch_size,
            precision=precision,
            regularizer=regularizer,
        )
        return tried(classifier, images, labels, threat, sent, seed=seed, batch_size=batch_size)


def tried(
    classifier: Classifier,
    images: Tensor,
    labels: Tensor,
    threat: ThreatModel,
    sent: AttackResult,
    *,
    seed: int = 0,
    batch_size: int | None = None,
) -> AttackResult:
    """Evaluate the candidates of an attack on another classifier; see `Transfer`.

    Returns
    -------
    AttackResult
        Of this classifier. It has no backward passes.
    """
    # The candidates are within the threat already: nothing is to be cut off.
    free = replace(threat, eps=None)
    return _Try()(
        classifier,
        images,
        labels,
        free,
        seed=seed,
        batch_size=batch_size,
        starting_points=sent.candidates,
    )
