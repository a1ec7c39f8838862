"""What an attack knows of its images, and the rows of its own state."""

from dataclasses import dataclass, fields, replace
from typing import NamedTuple, Protocol, Self, TypeVarTuple

import torch
from torch import Tensor

from demur.goals import Loss

DECISIVE = 1e-5
"""Share of half the spread of the scores by which a success must win."""
ROUNDING = 4 * 1.2e-7
"""Four units in the last place of float32."""


class Regularizer(Protocol):
    """A term that an attack adds to its loss. It does not change what counts as success."""

    def __call__(self, images: Tensor) -> Tensor:
        """Compute the term of images (n, C, H, W): (n,)."""

    def select(self, index: Tensor) -> "Regularizer":
        """Give the term of the images at `index`, where it differs between images."""


class Evaluation(NamedTuple):
    """What the classifier says of candidates.

    Attributes
    ----------
    loss : Tensor of shape (n,)
    success : Tensor of shape (n,), bool
    gradient : Tensor of shape (n, C, H, W); empty where it was not asked for
    scores : Tensor of shape (n, columns)
    """

    loss: Tensor
    success: Tensor
    gradient: Tensor
    scores: Tensor

    def select(self, index: Tensor) -> "Evaluation":
        """Give the rows at `index`."""
        return Evaluation(*(tensor[index] for tensor in self))


@dataclass
class Rows:
    """Base class of an attack's own state: a dataclass of tensors with one row for each image."""

    def select(self, index: Tensor) -> Self:
        """Give the rows at `index`; fields that are no tensors stay."""
        values = {one.name: getattr(self, one.name) for one in fields(self)}
        chosen = {
            name: value[index] if isinstance(value, Tensor) else value.select(index)
            for name, value in values.items()
            if isinstance(value, Tensor | Rows)
        }
        return replace(self, **chosen)


def rows_at(rows: object, index: Tensor) -> Tensor | Rows:
    """Give the rows at `index` of a tensor or of `Rows`."""
    if isinstance(rows, Rows):
        return rows.select(index)
    if not isinstance(rows, Tensor):
        raise TypeError(f"an attack's rows are tensors or Rows, not {type(rows).__name__}")
    return rows[index]


Ts = TypeVarTuple("Ts")
"""Tensors and `Rows` that shrink together."""


@dataclass
class Book:
    """What is known of the images of a batch, on the device."""

    candidates: Tensor
    loss: Tensor
    distance: Tensor
    success: Tensor
    done: Tensor
    forwards: Tensor
    backwards: Tensor
    zero_gradients: Tensor
    version = 0
    """Changes whenever an image may have been solved."""

    @classmethod
    def of(cls, images: Tensor) -> "Book":
        """Begin with the clean images and no success."""
        count = len(images)
        device = images.device
        infinite = torch.full((count,), torch.inf, dtype=torch.float64, device=device)
        nothing = torch.zeros(count, dtype=torch.bool, device=device)
        zeros = torch.zeros(count, dtype=torch.int64, device=device)
        return cls(
            images.clone(),
            -infinite,
            infinite,
            nothing,
            nothing.clone(),
            zeros,
            zeros.clone(),
            zeros.clone(),
        )

    def read(self, rows: Tensor, device: torch.device) -> "Book":
        """Copy the images at `rows` to the device."""
        return Book(*(getattr(self, one.name)[rows].to(device) for one in fields(self)))

    def write(self, rows: Tensor, part: "Book") -> None:
        """Copy a part back to where it was read."""
        for one in fields(self):
            mine = getattr(self, one.name)
            mine[rows] = getattr(part, one.name).to(mine.device)


@dataclass(frozen=True)
class Pursuit:
    """How candidates are judged: the attack's settings that the state needs."""

    loss: Loss
    confidence: float
    smallest: bool
    keep_maximizing: bool


def first_flagged(flags: Tensor, count: int) -> Tensor:
    """Give the indices of the `count` flagged rows without waiting for the device."""
    return flags.to(torch.uint8).argsort(descending=True, stable=True)[:count]


def precise(scores: Tensor) -> Tensor:
    """Give scores in float32 at least: half precision decides nothing."""
    return scores if scores.dtype == torch.float64 else scores.float()


def clear_margin(scores: Tensor) -> Tensor:
    """Give the margin (n,) that a success needs where the smallest change is sought: at the very
    boundary, another batch size rounds to the other side.

    It is a share of the spread of the scores (n, columns), so that a constant added to all scores
    changes nothing (R6), and what float32 cannot hold of the largest.
    """
    spread = (scores.amax(1) - scores.amin(1)) / 2
    return DECISIVE * spread + ROUNDING * scores.abs().amax(1)
