"""A limit between scores that are accepted and scores that are rejected."""

import math

from torch import Tensor


def just_below(ordered: Tensor, first: float) -> float:
    """Give a limit between the first accepted score and the largest rejected one.

    Scores that are computed anew differ in their last bits, so the limit is not a score itself.

    Parameters
    ----------
    ordered : Tensor of shape (n,)
        Increasing scores.
    first : float
        The first accepted one. Infinite: none is accepted.

    Returns
    -------
    float

    Examples
    --------
    >>> import torch
    >>> just_below(torch.tensor([1.0, 2.0, 4.0]), 4.0)
    3.0
    """
    if math.isinf(first):
        top = float(ordered[-1])
        return top + max(1e-3, 1e-3 * abs(top))
    below = ordered[ordered < first]
    if not len(below):
        return first - max(1e-6, 1e-6 * abs(first))
    return (first + float(below[-1])) / 2
