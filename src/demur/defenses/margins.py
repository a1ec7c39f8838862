"""Reject scores a little above the best class score."""

import torch
from torch import Tensor

RELATIVE = 2.0**-23
"""From a number of float32 to the next one, at most."""
SMALLEST = 2.0**-149


def next_above(score: Tensor) -> Tensor:
    """Give the next number above each score.

    In an exported graph, which has no such operation, it is one of the next two numbers.

    Examples
    --------
    >>> float(next_above(torch.tensor(1.0)) - 1)
    1.1920928955078125e-07
    """
    if torch.compiler.is_exporting():
        return score + (score.abs() * RELATIVE).clamp(min=SMALLEST)
    return torch.nextafter(score, torch.full_like(score, torch.inf))
