"""Bounds of sums of RBF kernels over a box, for certificates."""

import torch
from torch import Tensor

ENTRIES = 1 << 24
"""Numbers of a piece of the table of squared differences."""
ROUNDING = 2.0**-20
"""Machines compute squared distances in float32, as |z|^2 + |s|^2 - 2 zs: about 8 roundings of
(|z| + |s|)^2. The bounds leave room for that, and for the rounding of the sum."""


def kernel_bounds(
    lower: Tensor, upper: Tensor, support: Tensor, gamma: float
) -> tuple[Tensor, Tensor]:
    """Bound exp(-gamma ||z - s||^2) for z in a box, for each support vector.

    The nearest and the farthest point of the box are exact, but for the room for rounding. The
    bounds are at least as tight as those of the ball around the box, exp(-gamma (d + rho)^2) and
    exp(-gamma max(0, d - rho)^2).

    Parameters
    ----------
    lower, upper : Tensor of shape (N, D)
    support : Tensor of shape (S, D)
    gamma : float

    Returns
    -------
    low, high : Tensor of shape (N, S)

    Examples
    --------
    >>> box = torch.tensor([[0.0]]), torch.tensor([[1.0]])
    >>> [round(float(one), 4) for one in kernel_bounds(*box, torch.tensor([[1.0]]), 1.0)]
    [0.3679, 1.0]
    """
    largest = torch.maximum(lower.abs(), upper.abs()).norm(dim=1, keepdim=True)
    room = ROUNDING * (largest + support.norm(dim=1)).square()
    rows = max(1, ENTRIES // max(1, lower.shape[1] * len(support)))
    low = []
    high = []
    for below, above in zip(torch.split(lower, rows), torch.split(upper, rows), strict=True):
        down = support - below[:, None]  # at least 0 where the vector is above the lower bound
        up = above[:, None] - support
        far = torch.maximum(down.abs(), up.abs()).square().sum(2)
        near = torch.maximum(-down, -up).clamp(min=0).square().sum(2)
        low.append(far)
        high.append(near)
    farthest = torch.cat(low) + room
    nearest = (torch.cat(high) - room).clamp(min=0)
    return torch.exp(-gamma * farthest), torch.exp(-gamma * nearest)


def combination_bounds(
    lower: Tensor,
    upper: Tensor,
    support: Tensor,
    gamma: float,
    weights: Tensor,
) -> tuple[Tensor, Tensor]:
    """Bound sums of kernels over a box, from below and above.

    Two bounds are intersected. (1) Each sum f is a function of the Hilbert space of the kernel:
    |f(z) - f(c)| <= ||f|| sqrt(2 - 2 exp(-gamma rho^2)) for the centre c of the box and its
    farthest corner at rho, with ||f||^2 = w'Kw. (2) The bounds of each kernel, summed by the sign
    of its weight.

    Parameters
    ----------
    lower, upper : Tensor of shape (N, D)
    support : Tensor of shape (S, D)
    gamma : float
    weights : Tensor of shape (M, S) or (N, M, S)

    Returns
    -------
    low, high : Tensor of shape (N, M)
    """
    below, above = kernel_bounds(lower, upper, support, gamma)
    positive = weights.clamp(min=0)
    negative = weights.clamp(max=0)

    def sums(below: Tensor, above: Tensor) -> tuple[Tensor, Tensor]:
        low = _each(positive, below) + _each(negative, above)
        high = _each(positive, above) + _each(negative, below)
        return low, high

    low, high = sums(below, above)
    centre = (lower + upper) / 2
    rho = torch.maximum(upper - centre, centre - lower).norm(dim=1)
    inner = torch.exp(-gamma * torch.cdist(support, support).square())
    length = (weights @ inner * weights).sum(-1).clamp(min=0).sqrt()
    reach = (2 - 2 * torch.exp(-gamma * rho.square())).clamp(min=0).sqrt()[:, None] * length
    least, most = sums(*kernel_bounds(centre, centre, support, gamma))
    room = 2 * ROUNDING * _each(weights.abs(), above)
    return torch.maximum(low, least - reach) - room, torch.minimum(high, most + reach) + room


def _each(weights: Tensor, kernel: Tensor) -> Tensor:
    """Multiply (M, S) or (N, M, S) by kernels (N, S): (N, M)."""
    return (weights @ kernel[:, :, None]).squeeze(2)
