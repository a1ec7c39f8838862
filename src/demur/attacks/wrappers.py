"""Ways to give attacks better gradients: averaged randomness, stand-in gradients, and wider
kernels.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from demur.attacks.base import Attack
from demur.attacks.book import Regularizer
from demur.attacks.checks import check_fractions
from demur.attacks.engine import GradientPrecision
from demur.attacks.frozen import wider_kernels
from demur.attacks.result import AttackResult
from demur.classifier import Classifier, check_classifier
from demur.errors import DemurError
from demur.threat import ThreatModel


class _Expectation(nn.Module):
    def __init__(self, classifier: Classifier, draws: int) -> None:
        super().__init__()
        self.classifier = classifier
        self.draws = draws

    def forward(self, images: Tensor) -> Tensor:
        total: Tensor = self.classifier(images)
        for _ in range(self.draws - 1):
            total = total + self.classifier(images)
        return total / self.draws


def expectation_over_transformation(classifier: Classifier, draws: int = 10) -> Classifier:
    """Wrap a randomised classifier: its scores become their mean over several draws.

    Expectation over transformation (Athalye et al. 2018, sec. 4.3). Attack the wrapped classifier,
    so that a gradient is a gradient of the mean. Then score the original on the candidates several
    times. An attack counts one pass where `draws` passes are made.

    Parameters
    ----------
    classifier : Classifier
        A classifier that draws at random in every forward pass.
    draws : int, default 10
        Forward passes that are averaged.

    Returns
    -------
    Classifier

    Raises
    ------
    DemurError
        If `draws` is below 1.

    Examples
    --------
    >>> import torch
    >>> from demur import Classifier
    >>> from demur.attacks import expectation_over_transformation
    >>> noisy = Classifier(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3)), 3)
    >>> expectation_over_transformation(noisy, draws=4).num_classes
    3
    """
    if draws < 1:
        raise DemurError(f"an expectation needs at least one draw, not {draws}.")
    check_classifier(classifier)
    return Classifier(_Expectation(classifier, draws), classifier.num_classes)


class _Through(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        images: Tensor,
        exact: Callable[[Tensor], Tensor],
        stand_in: Callable[[Tensor], Tensor],
    ) -> Tensor:
        ctx.save_for_backward(images)
        ctx.stand_in = stand_in
        # The backward pass has no autocast: half precision images would meet float32 weights.
        kind = images.device.type
        ctx.autocast = (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
        return exact(images)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor, None, None]:
        (images,) = ctx.saved_tensors
        with torch.enable_grad(), torch.autocast(*ctx.autocast):
            images = images.detach().requires_grad_()
            result = ctx.stand_in(images)
            (gradient,) = torch.autograd.grad(result, images, outputs[0].to(result.dtype))
        return gradient, None, None


class BPDA(nn.Module):
    """Compute a module in the forward pass, and differentiate a stand-in in the backward pass.

    Backward pass differentiable approximation (Athalye et al. 2018, sec. 4.1), for a part of a
    network without useful gradients: rounding, a JPEG codec, a median. Build the attacked
    classifier with it in place of the module; the defended classifier keeps the module.

    Parameters
    ----------
    module : callable
        What the forward pass computes: Tensor to Tensor.
    stand_in : callable, optional
        What the backward pass differentiates. Default: the identity.

    Examples
    --------
    >>> import torch
    >>> from demur.attacks import BPDA
    >>> images = torch.tensor([[0.3, 0.8]], requires_grad=True)
    >>> rounded = BPDA(torch.round)(images)
    >>> rounded.sum().backward()
    >>> rounded.tolist(), images.grad.tolist()
    ([[0.0, 1.0]], [[1.0, 1.0]])
    """

    def __init__(
        self,
        module: Callable[[Tensor], Tensor],
        stand_in: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.exact = module
        self.stand_in = stand_in

    def forward(self, images: Tensor) -> Tensor:
        """Compute the module, exactly."""
        given: Tensor = _Through.apply(images, self._exactly, self.stand_in or nn.Identity())
        return given

    def _exactly(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            return self.exact(images)


@dataclass(frozen=True, repr=False)
class WithWiderKernels(Attack):
    """An attack whose gradients through kernels are those of wider kernels; see `wider_kernels`.

    Parameters
    ----------
    attack : Attack
    factor : float in (0, 1)

    Examples
    --------
    >>> from demur import attacks
    >>> attacks.WithWiderKernels(attacks.PGD(steps=10), factor=0.1)
    WithWiderKernels(attack=PGD(steps=10), factor=0.1)
    """

    attack: Attack
    factor: float

    def __post_init__(self) -> None:
        if not isinstance(self.attack, Attack):
            raise DemurError(
                f"WithWiderKernels takes an attack such as PGD(steps=40), not {self.attack!r}."
            )
        check_fractions(factor=self.factor)

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
        """Attack with wider kernels; see `Attack.__call__`."""
        with wider_kernels(classifier, self.factor):
            return self.attack(
                classifier,
                images,
                labels,
                threat,
                seed=seed,
                batch_size=batch_size,
                precision=precision,
                regularizer=regularizer,
            )
