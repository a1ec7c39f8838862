"""Operations that are not affine: their intervals, and their lines for CROWN.

Zhang et al. 2018, "Efficient neural network robustness certification with general activation
functions" (CROWN).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from demur.bounds.affine import Operation, summed
from demur.bounds.held import Interval

Slope = Literal["adaptive", "flat", "steep"]
"""The lower line of an undecided rectifier: of the smaller area, or always one of the two."""

LEAST = 1e-30


@dataclass(frozen=True, eq=False)
class Relaxation:
    """The lower lines of rectifiers, row by row, and what is known of the signs of their inputs.

    Attributes
    ----------
    slopes : mapping of int to Tensor of shape (R, *node), in [0, 1]
        For each rectifier. 0 is its flat lower line, and 1 its steep one; each value is sound.
    multipliers : mapping of int to Tensor of shape (R, *node)
        Where the input z of a rectifier is known to have a sign, a number of this sign: it times z
        is not negative, and is subtracted (Wang et al. 2021). 0 elsewhere.
    seen : dict of int to Tensor of shape (R, *node)
        The coefficients of each rectifier, from the last pass.
    """

    slopes: Mapping[int, Tensor]
    multipliers: Mapping[int, Tensor] = field(default_factory=dict)
    seen: dict[int, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Lines:
    """What an operation with lines leaves of coefficients: those of its input, and a constant."""

    rows: Tensor
    constant: Tensor


@dataclass(frozen=True)
class Rectifier(Operation):
    """max(slope * x, x), with a slope from 0 to 1."""

    slope: float = 0.0

    def interval(self, tensors: Sequence[Tensor], given: Sequence[Interval]) -> Interval:
        """Apply it to both bounds: it increases."""
        return Interval(self._at(given[0].lower), self._at(given[0].upper))

    def _at(self, values: Tensor) -> Tensor:
        if not self.slope:
            return values.relu()
        return nn.functional.leaky_relu(values, self.slope)

    def lines(self, rows: Tensor, given: Interval, kind: Slope | Tensor) -> Lines:
        """Bound rows @ output from below by a linear function of the input.

        Parameters
        ----------
        rows : Tensor of shape (R, *node)
        given : Interval
            Of the input, for each row, or (1, *node) for all of them.
        kind : {"adaptive", "flat", "steep"}, or Tensor of shape (R, *node)
            The lower line; numbers from 0, flat, to 1, steep.
        """
        low, high = given
        chord = (high - self.slope * low) / (high - low).clamp(min=LEAST)
        start = high * (1 - chord)
        if isinstance(kind, Tensor):
            lower = self.slope + (1 - self.slope) * kind
        elif kind == "adaptive":
            lower = torch.where(high > -low, 1.0, self.slope)
        else:
            lower = torch.full_like(high, self.slope if kind == "flat" else 1.0)
        decided = torch.where(low >= 0, 1.0, self.slope)
        open_ = (low < 0) & (high > 0)
        chord = torch.where(open_, chord, decided)
        lower = torch.where(open_, lower, decided)
        start = torch.where(open_, start, 0.0)
        positive = rows.clamp(min=0)
        negative = rows.clamp(max=0)
        constant = summed(negative * start, rows.ndim - 1)
        return Lines(positive * lower + negative * chord, constant)


@dataclass(frozen=True)
class MaxPool(Operation):
    """The largest value of each window."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    ceil: bool = False

    def interval(self, tensors: Sequence[Tensor], given: Sequence[Interval]) -> Interval:
        """Pool both bounds: the largest value increases with each value."""
        low, high = given[0]
        return Interval(self._at(low), self._at(high))

    def _at(self, values: Tensor) -> Tensor:
        return nn.functional.max_pool2d(
            values, self.kernel, self.stride, self.padding, ceil_mode=self.ceil
        )

    def lines(self, rows: Tensor, given: Interval, kind: Slope | Tensor) -> Lines:
        """Take the value with the largest lower bound for positive coefficients.

        For negative ones, it is that value where no other value of the window can be larger, and
        else the largest upper bound.
        """
        low, high = given
        options: dict[str, Any] = {"stride": self.stride, "padding": self.padding}
        options["ceil_mode"] = self.ceil
        best, index = nn.functional.max_pool2d(low, self.kernel, return_indices=True, **options)
        top = self._at(high)
        flat = high.flatten(2)
        places = index.flatten(2)
        others = flat.scatter(2, places, -torch.inf)
        alone = self._alone(others.view_as(high), best)
        negative = rows.clamp(max=0)
        sent = rows.clamp(min=0) + torch.where(alone, negative, 0.0)
        places = places.expand(len(rows), *places.shape[1:])
        empty = torch.zeros(*places.shape[:2], flat.shape[2], dtype=rows.dtype, device=rows.device)
        back = empty.scatter_add(2, places, sent.flatten(2))
        constant = summed(torch.where(alone, 0.0, negative * top), rows.ndim - 1)
        return Lines(back.view(len(rows), *low.shape[1:]), constant)

    def _alone(self, others: Tensor, best: Tensor) -> Tensor:
        """Flag the windows whose best value is above all others. They must not overlap: the best
        value of one window would be missing among the others of its neighbour.
        """
        if self.kernel[0] > self.stride[0] or self.kernel[1] > self.stride[1]:
            return torch.zeros_like(best, dtype=torch.bool)
        return self._at(others) <= best


@dataclass(frozen=True)
class Increasing(Operation):
    """An elementwise function that increases: a sigmoid, a clamp. CROWN takes its interval."""

    function: Callable[[Tensor], Tensor]

    def interval(self, tensors: Sequence[Tensor], given: Sequence[Interval]) -> Interval:
        """Apply it to both bounds."""
        return Interval(self.function(given[0].lower), self.function(given[0].upper))


@dataclass(frozen=True)
class Softmax(Operation):
    """The softmax over the last dimension. CROWN takes its interval."""

    def interval(self, tensors: Sequence[Tensor], given: Sequence[Interval]) -> Interval:
        """p_k <= e^{u_k} / (e^{u_k} + sum_j e^{l_j}), and the reverse for the lower bound."""
        low, high = given[0]
        return Interval(_share(low, high), _share(high, low))


def _share(own: Tensor, others: Tensor) -> Tensor:
    """e^{own_k} / (e^{own_k} + sum over j != k of e^{others_j})."""
    count = own.shape[-1]
    table = others.unsqueeze(-2).expand(*own.shape[:-1], count, count)
    same = torch.eye(count, dtype=torch.bool, device=own.device)
    rest = table.masked_fill(same, -torch.inf).logsumexp(-1)
    return (own - rest).sigmoid()


@dataclass(frozen=True)
class Own(Operation):
    """A module with a method `interval(lower, upper)`. CROWN takes its interval.

    The module is found by its path. Where `combines`, its method takes a third argument: the
    coefficients (N, M, outputs) of combinations of its outputs.
    """

    path: str
    combines: bool = False


def concretised(rows: Tensor, given: Interval) -> tuple[Tensor, Tensor]:
    """Bound rows @ values from below for values in a box.

    Parameters
    ----------
    rows : Tensor of shape (R, *node)
    given : Interval
        For each row, (R, *node).

    Returns
    -------
    bound, magnitude : Tensor of shape (R,)
        The magnitude is the sum of the sizes of all terms; rounding is relative to it.
    """
    low, high = given
    terms = rows.clamp(min=0) * low + rows.clamp(max=0) * high
    sizes = rows.abs() * torch.maximum(low.abs(), high.abs())
    return summed(terms, rows.ndim - 1), summed(sizes, rows.ndim - 1)
