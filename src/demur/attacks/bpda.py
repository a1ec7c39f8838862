"""Gradients through operations that have none: rounding, signs, detached tensors."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from demur.attacks.base import Attack
from demur.attacks.book import Regularizer
from demur.attacks.engine import GradientPrecision
from demur.attacks.result import AttackResult
from demur.attacks.wrappers import BPDA
from demur.classifier import Classifier
from demur.errors import DemurError
from demur.threat import ThreatModel

STEPS: Final = ("round", "floor", "ceil", "trunc", "fix", "sign", "sgn")
"""Functions of torch that are constant between steps: their gradient is zero."""

_REPLACED: Final[frozenset[Callable[..., Any]]] = frozenset(
    [getattr(torch, name) for name in STEPS]
    + [getattr(Tensor, name) for name in STEPS]
    + [Tensor.detach]
)
_IN_PLACE: Final[frozenset[Callable[..., Any]]] = frozenset(
    getattr(Tensor, f"{name}_") for name in STEPS
)


class _Straight(TorchFunctionMode):
    """Inside, the replaced functions compute the same values, and have the identity's gradient."""

    def __torch_function__(
        self,
        function: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        options = dict(kwargs or {})
        differentiable = args and isinstance(args[0], Tensor) and args[0].requires_grad
        if not differentiable or function not in _REPLACED | _IN_PLACE:
            return function(*args, **options)
        first, *rest = args
        given = first.clone() if function in _IN_PLACE else first
        through = BPDA(lambda images: function(images.clone(), *rest, **options))(given)
        return first.copy_(through) if function in _IN_PLACE else through


class _StraightModule(nn.Module):
    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, images: Tensor) -> Tensor:
        with _Straight():
            scores: Tensor = self.classifier(images)
        return scores


@dataclass(frozen=True, repr=False)
class WithBPDA(Attack):
    """An attack whose gradients go straight through steps.

    Rounding, signs and the like have a zero gradient, and a detached tensor has none: a defence
    that contains them looks robust to attacks with gradients. The attack computes them exactly, and
    takes the identity as their derivative: backward pass differentiable approximation (Athalye et
    al. 2018, sec. 4.1). It reaches the functions of torch that are called in Python: `round`,
    `floor`, `ceil`, `trunc`, `sign`, `detach`, also in place. It does not reach scripted modules,
    comparisons and blocks of `torch.no_grad()`.

    Parameters
    ----------
    attack : Attack

    Examples
    --------
    >>> import torch
    >>> from demur import Classifier, attacks
    >>> class Rounded(torch.nn.Module):
    ...     def forward(self, images):
    ...         return (10 * images.flatten(1)).round()[:, :3]
    >>> images, labels = torch.tensor([[[[0.5, 0.2, 0.1]]]]), torch.tensor([0])
    >>> attack = attacks.WithBPDA(attacks.PGD(steps=10))
    >>> attack(Classifier(Rounded(), 3), images, labels, "linf:0.3").success.tolist()
    [True]
    """

    attack: Attack

    def __post_init__(self) -> None:
        if not isinstance(self.attack, Attack):
            raise DemurError(
                f"WithBPDA takes an attack such as PGD(steps=40), not {self.attack!r}."
            )

    @property
    def minimum_norm(self) -> bool:  # type: ignore[override]
        """As the attack."""
        return self.attack.minimum_norm

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
        """Attack straight through steps; see `Attack.__call__`."""
        return self.attack(
            Classifier(_StraightModule(classifier), classifier.num_classes),
            images,
            labels,
            threat,
            seed=seed,
            batch_size=batch_size,
            precision=precision,
            regularizer=regularizer,
        )
