"""Norms: the size of a change, the steepest step, and the set of images that an attacker may
choose.

A `Ball` holds what is allowed around a batch of clean images: a change within eps in its norm,
inside the mask, and pixels in [0, 1]. `Ball.project` is the only place where images are projected.
Its result is allowed *after* rounding (R1): |x' - x| <= eps up to 1e-6 relative, and the clean
pixel bit for bit where the mask is 0. No method waits for the device, so that a step of an attack
synchronises at most once.
"""

from torch import Tensor

from demur.errors import unknown
from demur.norms.base import TOLERANCE, Ball, by_pixel, per_image, spread
from demur.norms.dense import L2, Linf
from demur.norms.sparse import L0, L1

__all__ = [
    "BALLS",
    "L0",
    "L1",
    "L2",
    "TOLERANCE",
    "Ball",
    "Linf",
    "ball_of",
    "by_pixel",
    "per_image",
    "sizes",
    "spread",
]

BALLS: dict[str, type[Ball]] = {"linf": Linf, "l2": L2, "l1": L1, "l0": L0}


def ball_of(norm: str) -> type[Ball]:
    """Give the kind of ball of a norm: "linf", "l2", "l1" or "l0".

    Raises
    ------
    DemurError
        If the norm is unknown.
    """
    if not isinstance(norm, str) or norm not in BALLS:
        raise unknown("norm", str(norm), BALLS)
    return BALLS[norm]


def sizes(clean: Tensor, images: Tensor) -> dict[str, Tensor]:
    """Measure how far images are from the clean ones in every norm.

    Parameters
    ----------
    clean, images : Tensor of shape (N, C, H, W)
        L0 counts pixels, not channels.

    Returns
    -------
    dict of str to Tensor of shape (N,), float64
        Keys "linf", "l2", "l1" and "l0".

    Examples
    --------
    >>> import torch
    >>> from demur.norms import sizes
    >>> clean = torch.zeros(1, 3, 2, 2)
    >>> changed = clean.clone()
    >>> changed[0, :, 0, 0] = 0.5
    >>> {norm: round(float(size), 3) for norm, size in sizes(clean, changed).items()}
    {'linf': 0.5, 'l2': 0.866, 'l1': 1.5, 'l0': 1.0}
    """
    change = images.double() - clean.double()
    return {name: kind.measure(change) for name, kind in BALLS.items()}
