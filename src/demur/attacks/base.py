"""The base classes of attacks.

An attack is a frozen dataclass that holds *how* to attack. A call says *what* to attack:
classifier, images, labels and threat. `Attack` is what users see. `SearchAttack` is what most
attacks derive from: they write `search`, a function of one `AttackState`, and the engine does the
rest.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from inspect import isabstract
from typing import Any, ClassVar

from torch import Tensor

from demur.attacks.book import Regularizer
from demur.attacks.checks import needs_eps
from demur.attacks.engine import Call, GradientPrecision, limits_of, run_attack
from demur.attacks.result import AttackResult, limited_to
from demur.attacks.state import AttackState
from demur.classifier import Classifier
from demur.errors import DemurError, unknown
from demur.goals import Loss
from demur.masks import check_mask
from demur.norms import ball_of
from demur.threat import ThreatModel, as_threat


@dataclass(frozen=True, repr=False)
class Attack(ABC):
    """How to attack a classifier. Attacks compare by value, print readably and convert to plain
    dicts.

    Examples
    --------
    >>> from demur import attacks
    >>> attack = attacks.PGD(steps=40, restarts=2)
    >>> attack
    PGD(steps=40, restarts=2)
    >>> attacks.Attack.from_dict(attack.to_dict()) == attack
    True
    """

    _kinds: ClassVar[dict[str, type["Attack"]]] = {}
    minimum_norm: ClassVar[bool] = False
    """Whether the attack seeks the smallest change. Then it needs no eps."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if not cls.__name__.startswith("_"):
            Attack._kinds[cls.__name__] = cls

    @abstractmethod
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
    ) -> AttackResult:
        """Attack the images.

        Parameters
        ----------
        classifier : Classifier
            The attacked classifier, with its rejection.
        images : Tensor of shape (N, C, H, W), float32 or float64 in [0, 1]
            Clean images; vectors of shape (N, F) work too, except for attacks that need pixels.
        labels : Tensor of shape (N,), integer
            True classes.
        threat : ThreatModel or str
            What the attacker wants and is allowed, for example `ThreatModel("linf", 8 / 255)` or
            "linf:8/255".
        seed : int, default 0
            Random draws depend on it, on the pixels of the image and on the restart; not on
            batches, order or other images.
        batch_size : int, optional
            Images that are attacked at once. It changes no result beyond float32 rounding. By
            default 128 or 256, depending on the attack.
        precision : {"auto", "float32", "bfloat16"}, default "auto"
            Precision of the passes for gradients; "auto" is bfloat16 where the hardware has it.
            Decisions are always made in float32.
        regularizer : Regularizer, optional
            A term that is added to the loss, such as `feature_density(...)`. Only for attacks with
            an eps.

        Returns
        -------
        AttackResult

        Raises
        ------
        DemurError
            If the input does not fit: range, dtype, NaN, shape, label, mask, eps, norm or goal.
        """

    def sweep(
        self,
        classifier: Classifier,
        images: Tensor,
        labels: Tensor,
        threat: ThreatModel | str,
        *,
        eps: Sequence[float],
        **options: Any,
    ) -> list[AttackResult]:
        """Attack at several eps.

        Parameters
        ----------
        classifier, images, labels, threat, options
            As for a call. The eps of the threat is not used.
        eps : sequence of float
            The sizes. An attack that seeks the smallest change runs once for all of them.

        Returns
        -------
        list of AttackResult
            One for each eps. Every eps is attacked for itself: the results need not be monotone.

        Examples
        --------
        >>> import torch
        >>> from demur import Classifier, attacks
        >>> module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3))
        >>> images, labels = torch.full((2, 1, 8, 8), 0.5), torch.tensor([0, 1])
        >>> results = attacks.PGD(steps=5).sweep(
        ...     Classifier(module, 3), images, labels, "linf", eps=[0.0, 0.5]
        ... )
        >>> len(results)
        2
        """
        threat = as_threat(threat)
        if not self.minimum_norm:
            at_each = [replace(threat, eps=value) for value in eps]
            return [self(classifier, images, labels, one, **options) for one in at_each]
        smallest = self(classifier, images, labels, replace(threat, eps=None), **options)
        return [within(smallest, images, replace(threat, eps=value)) for value in eps]

    def to_dict(self) -> dict[str, Any]:
        """Describe the attack as a plain dict: its class name under "kind", and its fields."""
        values = {one.name: getattr(self, one.name) for one in fields(self)}
        plain = {
            name: value.to_dict() if isinstance(value, Attack) else value
            for name, value in values.items()
        }
        return {"kind": type(self).__name__, **plain}

    @staticmethod
    def from_dict(description: Mapping[str, Any]) -> "Attack":
        """Make the attack that `to_dict` described.

        Raises
        ------
        DemurError
            If the class or a field is unknown, or a value is out of range.
        """
        if not isinstance(description, Mapping):
            raise DemurError(f'an attack is described as {{"kind": "PGD"}}, not {description!r}.')
        values = dict(description)
        name = str(values.pop("kind", None))
        kinds = {key: kind for key, kind in Attack._kinds.items() if not isabstract(kind)}
        if name not in kinds:
            raise unknown("attack", name, kinds)
        kind = kinds[name]
        known = {one.name for one in fields(kind)}
        for key, value in values.items():
            if key not in known:
                raise unknown(f"field of {name}", key, known)
            if isinstance(value, Mapping):
                values[key] = Attack.from_dict(value)
        try:
            return kind(**values)
        except TypeError as error:
            raise DemurError(f"{name} cannot be made from {values}: {error}.") from error

    def __repr__(self) -> str:
        """Give the class with the fields that differ from their defaults."""
        shown = [
            f"{one.name}={getattr(self, one.name)!r}"
            for one in fields(self)
            if one.default is MISSING or getattr(self, one.name) != one.default
        ]
        return f"{type(self).__name__}({', '.join(shown)})"


@dataclass(frozen=True, repr=False)
class SearchAttack(Attack):
    """An attack that the engine runs: batches, restarts, random draws, costs and checks are the
    engine's.

    A subclass is a frozen dataclass with the method `search(state)`. It asks the state for
    gradients and scores at candidates from `state.ball`, and passes tensors that have one row for
    each image through `state.drop_solved`. The state keeps the best candidates.

    Examples
    --------
    >>> from dataclasses import dataclass
    >>> import torch
    >>> from demur import Classifier, attacks
    >>> @dataclass(frozen=True, repr=False)
    ... class HalfStep(attacks.SearchAttack):
    ...     def search(self, state):
    ...         step = state.ball.steepest_step(state.value_and_gradient(state.images).gradient)
    ...         state.evaluate(state.ball.project(state.images + 0.05 * step))
    >>> module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3))
    >>> images, labels = torch.full((2, 1, 8, 8), 0.5), torch.tensor([0, 1])
    >>> HalfStep()(Classifier(module, 3), images, labels, "linf:0.1").candidates.shape
    torch.Size([2, 1, 8, 8])
    """

    norms: ClassVar[tuple[str, ...]] = ("linf", "l2", "l1", "l0")
    """The norms that the attack knows."""
    needs_eps: ClassVar[bool] = True
    default_batch_size: ClassVar[int] = 128
    takes_starting_points: ClassVar[bool] = False
    """Whether the search begins at `state.starting_points`."""
    low_precision: ClassVar[bool] = True
    """Whether gradients may be computed in bfloat16."""
    hint: ClassVar[str] = ""
    """What to use where the norm is not among `norms`."""
    loss = "margin"
    confidence = 0.0
    restarts = 1
    keep_maximizing = False

    def loss_in(self, norm: str) -> Loss:
        """Give the loss that the attack maximises in a norm."""
        return self.loss  # type: ignore[return-value]

    @abstractmethod
    def search(self, state: AttackState) -> None:
        """Search for successes on one batch of images.

        Parameters
        ----------
        state : AttackState
            The images, what is allowed around them, and the methods that evaluate candidates.
        """

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
        starting_points: Tensor | None = None,
        toward: Tensor | None = None,
        regularizer: Regularizer | None = None,
    ) -> AttackResult:
        """Attack the images; see `Attack.__call__` for the other parameters.

        Parameters
        ----------
        starting_points : Tensor of shape (N, C, H, W) or (R, N, C, H, W), optional
            Where the first run starts, or the first R runs; for PGD, APGD and FMN. Each point is
            moved to the nearest allowed image. Clean images and images of other classes are the
            double initialisation of Biggio et al. 2013.
        toward : Tensor of shape (N,), int64, optional
            The wanted column that the loss raises; see `Goal.loss`.
        """
        threat = self._checked(as_threat(threat))
        call = Call(
            seed=seed,
            batch_size=self.default_batch_size if batch_size is None else batch_size,
            precision=precision if self.low_precision else "float32",
            starting_points=starting_points,
            toward=toward,
            regularizer=regularizer,
        )
        result = run_attack(self, classifier, images, labels, threat, call)
        if self.needs_eps or threat.eps is None:
            return result
        return within(result, images, threat)

    def maximize(
        self,
        classifier: Classifier,
        images: Tensor,
        labels: Tensor,
        threat: ThreatModel | str,
        *,
        seed: int = 0,
        batch_size: int | None = None,
        precision: GradientPrecision = "auto",
    ) -> Tensor:
        """Give the images with the largest loss that the attack finds, for adversarial training.

        The attack does not stop where the decision turns, and nothing is checked afterwards: that
        saves passes. The parameters are those of a call.

        Returns
        -------
        Tensor of shape (N, C, H, W)
            The candidates, on the device of the images.
        """
        threat = self._checked(as_threat(threat))
        if not self.needs_eps:
            raise DemurError(
                f"{type(self).__name__} seeks the smallest change; "
                "training needs an attack with an eps."
            )
        call = Call(
            seed=seed,
            batch_size=self.default_batch_size if batch_size is None else batch_size,
            precision=precision if self.low_precision else "float32",
            only_maximize=True,
        )
        return run_attack(self, classifier, images, labels, threat, call).candidates

    def _checked(self, threat: ThreatModel) -> ThreatModel:
        if threat.norm not in self.norms:
            known = " and ".join(self.norms)
            raise DemurError(
                f"{type(self).__name__} works in {known}, not {threat.norm!r}.{self.hint}"
            )
        if self.needs_eps and threat.eps is None:
            raise needs_eps(type(self).__name__)
        return threat


@dataclass(frozen=True, repr=False)
class MinimumNormAttack(SearchAttack):
    """An attack that seeks the smallest change. With an eps, it succeeds where its distance is at
    most eps.
    """

    minimum_norm: ClassVar[bool] = True
    needs_eps: ClassVar[bool] = False


def within(result: AttackResult, images: Tensor, threat: ThreatModel) -> AttackResult:
    """Take back the successes of an unlimited attack that are larger than the eps of the threat."""
    kind = ball_of(threat.norm)
    mask = check_mask(threat.mask, images)
    ball = kind(images, limits_of(threat, images, kind, mask).to(images.device), mask)
    return limited_to(result, ball, images)
