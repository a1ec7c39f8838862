"""The judge of attack results: what a result claims is measured again in numpy."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from demur.attacks import AttackResult

Array = NDArray[np.float64]

TOLERANCE = 1e-6
"""How far a change may exceed eps, relative to eps (R1)."""


@dataclass(frozen=True)
class Claim:
    """What an attack was asked for, and what it answered.

    Parameters
    ----------
    images, labels : Tensor
        Copies from before the attack.
    norm : {"linf", "l2", "l1", "l0"}
    eps : array of shape (N,)
        Infinite where there was no limit.
    mask : array of the shape of the images
    wanted : callable
        (column, row) -> whether the goal wants this column for this image.
    result : AttackResult
    scores : callable
        The scores (N, columns) of images by the user's module alone; None if they are random.
    rounding : float
        By how much scores may differ between batches, relative to the largest.
    """

    images: Tensor
    labels: Tensor
    norm: str
    eps: Array
    mask: Array
    wanted: Callable[[int, int], bool]
    result: AttackResult
    scores: Callable[[Tensor], Array] | None
    rounding: float


def judge(claim: Claim) -> None:
    """Raise AssertionError, with the reason, unless everything that the result says holds."""
    result = claim.result
    success = result.success.numpy()
    assert success.shape == (len(claim.images),) and success.dtype == np.bool_, "success: shape"
    for name, changed in (("images", result.images), ("candidates", result.candidates)):
        assert changed.shape == claim.images.shape, f"{name}: shape"
        assert changed.dtype == claim.images.dtype, f"{name}: dtype"
        _check_allowed(claim, name, changed)
    distance = result.distance.numpy()
    size = _size(claim, result.images)
    for row, hit in enumerate(success):
        if hit:
            assert _same_bits(result.images[row], result.candidates[row]), f"{row}: two images"
            near = abs(distance[row] - size[row]) <= 1e-9 + TOLERANCE * size[row]
            assert near, f"{row}: distance {distance[row]}, measured {size[row]}"
        else:
            assert _same_bits(result.images[row], claim.images[row]), f"{row}: failure changed"
            assert np.isposinf(distance[row]), f"{row}: the distance of a failure"
    for counted in (result.forwards, result.backwards, result.zero_gradients):
        assert not counted.is_floating_point() and int(counted.min()) >= 0, "counts"
    if claim.scores is not None:
        _check_decisions(claim, success, claim.scores(result.images))


def _check_allowed(claim: Claim, name: str, changed: Tensor) -> None:
    values = _values(changed)
    assert np.isfinite(values).all(), f"{name}: not finite"
    assert values.min() >= 0 and values.max() <= 1, f"{name}: outside of [0, 1]"
    kept = claim.mask == 0
    assert (_bits(changed)[kept] == _bits(claim.images)[kept]).all(), f"{name}: mask"
    size = _size(claim, changed)
    over = size > claim.eps * (1 + TOLERANCE)
    assert not over.any(), f"{name}: {claim.norm} is {size[over]}, eps {claim.eps[over]}"


def _size(claim: Claim, changed: Tensor) -> Array:
    """Measure the changes (N,): of Linf, divided by the mask."""
    change = np.abs(_values(changed) - _values(claim.images))
    if claim.norm == "linf":
        scale = np.where(claim.mask > 0, claim.mask, 1.0)
        with np.errstate(over="ignore"):
            return np.asarray((change / scale).reshape(len(change), -1).max(1))
    flat = change.reshape(len(change), -1)
    if claim.norm == "l2":
        # By the largest: squares of tiny changes are 0.
        largest = np.maximum(flat.max(1), 1e-300)
        return np.asarray(np.sqrt(((flat / largest[:, None]) ** 2).sum(1)) * largest)
    if claim.norm == "l1":
        return np.asarray(flat.sum(1))
    pixels: NDArray[np.bool_] = np.asarray(change > 0)
    if pixels.ndim > 2:
        pixels = np.asarray(pixels.any(1))
    return np.asarray(pixels.reshape(len(pixels), -1).sum(1).astype(np.float64))


def _check_decisions(claim: Claim, success: NDArray[np.bool_], scores: Array) -> None:
    for row in np.flatnonzero(success):
        given = scores[row]
        assert np.isfinite(given).all(), f"{row}: success on scores {given}"
        flags = np.array([claim.wanted(column, int(row)) for column in range(len(given))])
        margin = given[flags].max() - given[~flags].max()
        slack = claim.rounding * max(1.0, np.abs(given).max())
        assert margin >= -slack, f"{row}: success with the margin {margin}, slack {slack}"


def _values(images: Tensor) -> Array:
    return images.double().numpy()


def _bits(images: Tensor) -> NDArray[np.int64]:
    whole = torch.int64 if images.dtype == torch.float64 else torch.int32
    return images.contiguous().view(whole).numpy()


def _same_bits(one: Tensor, other: Tensor) -> bool:
    return bool((_bits(one) == _bits(other)).all())
