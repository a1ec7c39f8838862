"""Weights by name, and pairs of bounds."""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


class Interval(NamedTuple):
    """Bounds of a node, each of shape (N, ...).

    Examples
    --------
    >>> import torch
    >>> Interval(torch.tensor([0.0]), torch.tensor([1.0])).centre
    tensor([0.5000])
    """

    lower: Tensor
    upper: Tensor

    @property
    def centre(self) -> Tensor:
        """The middle of the bounds."""
        return (self.lower + self.upper) / 2

    def intersect(self, other: "Interval") -> "Interval":
        """Give what both intervals contain. Rounding never makes it empty."""
        lower = self.lower.maximum(other.lower)
        upper = self.upper.minimum(other.upper)
        return Interval(lower.minimum(upper), upper.maximum(lower))

    def of(self, owner: Tensor | int) -> "Interval":
        """Give the bounds of the image of each row, or of one image for all rows."""
        return Interval(of(self.lower, owner), of(self.upper, owner))


def of(values: Tensor, owner: Tensor | int) -> Tensor:
    """Give the values of the image of each row: (R, ...), or (1, ...) for one image."""
    if len(values) == 1:  # the same for every image
        return values
    return values[owner : owner + 1] if isinstance(owner, int) else values[owner]


@dataclass(frozen=True, eq=False)
class Held:
    """A tensor that an operation uses: a parameter or buffer by its name, or a value.

    A name stays right when a module is copied, moved or loaded.
    """

    name: str | None
    value: Tensor | None = None
