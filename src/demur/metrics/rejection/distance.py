"""Figures that depend on the distance of an image to its nearest rejection."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from demur.classifier import Outcome
from demur.errors import DemurError


def error_with_rejection(
    broken: Tensor, rejected_at: Tensor, eps: float, alphas: Sequence[float]
) -> list[float]:
    """Compute the robust error with rejection R_eps(f, alpha) (Chen et al. 2023, eq. 1).

    It counts an accepted error within eps, and a rejection within alpha eps. 1 - R_eps(f, 0) is
    the "robustness with reject".

    Parameters
    ----------
    broken : Tensor
        (N,) bool, True where an accepted error was found within eps.
    rejected_at : Tensor
        Size (N,) of the smallest change that was found to be rejected: 0 where the clean image is
        rejected, infinite where none was found.
    eps : float
        Size of the attack, above 0.
    alphas : sequence of float
        Fractions of eps, in [0, 1].

    Returns
    -------
    list of float
        The error for each alpha.

    Raises
    ------
    DemurError
        For eps or alpha out of range.

    Examples
    --------
    >>> broken = torch.tensor([True, False])
    >>> error_with_rejection(broken, torch.tensor([0.0, 0.1]), eps=0.2, alphas=[0.0, 1.0])
    [0.5, 1.0]
    """
    if not eps > 0 or any(not 0 <= alpha <= 1 for alpha in alphas):
        raise DemurError("R_eps(f, alpha) needs a positive eps, and every alpha in [0, 1].")
    return [float((broken | (rejected_at <= alpha * eps)).double().mean()) for alpha in alphas]


def total_robust_loss(
    broken: Tensor, rejected_at: Tensor, loss: Callable[[Tensor], Tensor]
) -> float:
    """Compute the total robust loss (Chen et al. 2023, eq. 3).

    An image with an accepted error costs 1, another image the cost of its nearest rejection.

    Parameters
    ----------
    broken, rejected_at : Tensor
        As in `error_with_rejection`.
    loss : callable
        Maps distances (N,) to costs in [0, 1] that do not increase: `step_loss`, `ramp_loss`.

    Returns
    -------
    float
        The mean cost.

    Examples
    --------
    >>> broken = torch.tensor([True, False])
    >>> total_robust_loss(broken, torch.tensor([0.0, 0.1]), ramp_loss(eps=0.2, power=1))
    0.7499999962747097
    """
    return float(torch.where(broken, 1.0, loss(rejected_at).double()).mean())


def step_loss(eps: float, alpha: float) -> Callable[[Tensor], Tensor]:
    """Make a loss of 1 for a rejection within alpha eps, and 0 beyond."""
    return lambda radius: (radius <= alpha * eps).double()


def ramp_loss(eps: float, power: float) -> Callable[[Tensor], Tensor]:
    """Make a loss of (1 - radius / eps) ** power for a rejection within eps, and 0 beyond."""
    return lambda radius: (1 - radius.double() / eps).clamp(min=0) ** power


def implied_robust_accuracy(clean_outcomes: Tensor, broken: Tensor) -> float:
    """Compute the robust accuracy that a detector implies (Tramer 2022, theorem 4).

    A detector that is robust within eps can be turned into a (slow) classifier without rejection
    that has this accuracy within eps / 2. If it is far above the best known accuracy there, the
    attack is likely too weak.

    Parameters
    ----------
    clean_outcomes : Tensor
        Outcomes (N,) of the clean images.
    broken : Tensor
        (N,) bool, True where an accepted error was found within eps.

    Returns
    -------
    float
        Share of images that are correct when clean, and never wrong and accepted within eps.

    Examples
    --------
    >>> implied_robust_accuracy(torch.tensor([0, 0, 1]), torch.tensor([False, True, False]))
    0.3333333333333333
    """
    return float(((clean_outcomes == Outcome.CORRECT) & ~broken).double().mean())
