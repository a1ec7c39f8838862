"""Affine operations: their intervals, and how coefficients go back through them.

A coefficient tensor has the shape (*rows, *node): `rows` is (R,) or (N, M), `node` is the shape of
one image at that place of the network.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.grad import conv2d_input

from demur.bounds.held import Held, Interval
from demur.bounds.unsupported import UnsupportedLayerError


@dataclass(frozen=True)
class Operation:
    """What one node of a graph computes. `tensors` are the weights that it uses."""

    affine: ClassVar[bool] = False
    tail: ClassVar[bool] = False
    """Whether a score difference merges with it; see `Propagation.lower_by_intervals`."""

    @property
    def tensors(self) -> tuple[Held, ...]:
        """The weights and constants that `ready` takes."""
        return ()

    def ready(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Give what `interval`, `transpose` and `offset` take: computed once for all of them."""
        return list(tensors)

    def interval(self, tensors: Sequence[Tensor], given: Sequence[Interval]) -> Interval:
        """Bound the output, from bounds of the inputs (N, ...)."""
        raise UnsupportedLayerError(type(self).__name__, "its interval")

    def transpose(
        self, tensors: Sequence[Tensor], rows: Tensor, shapes: Sequence[tuple[int, ...]]
    ) -> list[Tensor]:
        """Give the coefficients of the inputs from those of the output: of affine operations."""
        raise UnsupportedLayerError(type(self).__name__, "its linear function")

    def offset(self, tensors: Sequence[Tensor], rows: Tensor, node: int) -> Tensor | float:
        """Give the constant that the coefficients of the output leave, of the shape of the rows."""
        return 0.0


@dataclass(frozen=True)
class Input(Operation):
    """The images."""


@dataclass(frozen=True)
class Constant(Operation):
    """A value that is the same for every image, of shape (1, ...)."""

    value: Held
    affine: ClassVar[bool] = True
    tail: ClassVar[bool] = True

    @property
    def tensors(self) -> tuple[Held, ...]:
        """The value."""
        return (self.value,)

    def interval(self, tensors: Sequence[Tensor], given: Sequence[Interval]) -> Interval:
        """Give the value twice."""
        return Interval(tensors[0], tensors[0])

    def transpose(
        self, tensors: Sequence[Tensor], rows: Tensor, shapes: Sequence[tuple[int, ...]]
    ) -> list[Tensor]:
        """There is no input."""
        return []

    def offset(self, tensors: Sequence[Tensor], rows: Tensor, node: int) -> Tensor | float:
        """Multiply the value by its coefficients."""
        return summed(rows * tensors[0][0], node)


@dataclass(frozen=True)
class Linear(Operation):
    """`weight @ x + bias` on the last dimension."""

    weight: Held
    bias: Held | None
    affine: ClassVar[bool] = True
    tail: ClassVar[bool] = True

    @property
    def tensors(self) -> tuple[Held, ...]:
        """Weight and bias."""
        return (self.weight,) if self.bias is None else (self.weight, self.bias)

    def interval(self, tensors: Sequence[Tensor], given: Sequence[Interval]) -> Interval:
        """Centre and radius: the radius is multiplied by the absolute weights."""
        half = tensors[0] / 2
        bias = tensors[1] if len(tensors) > 1 else None
        centre = nn.functional.linear(given[0].lower + given[0].upper, half, bias)
        radius = nn.functional.linear(given[0].upper - given[0].lower, half.abs())
        return Interval(centre - radius, centre + radius)

    def transpose(
        self, tensors: Sequence[Tensor], rows: Tensor, shapes: Sequence[tuple[int, ...]]
    ) -> list[Tensor]:
        """Multiply by the weight."""
        return [rows @ tensors[0]]

    def offset(self, tensors: Sequence[Tensor], rows: Tensor, node: int) -> Tensor | float:
        """Multiply the bias by its coefficients."""
        return summed(rows * tensors[1], node) if len(tensors) > 1 else 0.0


@dataclass(frozen=True)
class Convolution(Operation):
    """A two-dimensional convolution."""

    weight: Held
    bias: Held | None
    options: tuple[Any, ...]
    """stride, padding, dilation, groups"""
    affine: ClassVar[bool] = True

    @property
    def tensors(self) -> tuple[Held, ...]:
        """Weight and bias."""
        return (self.weight,) if self.bias is None else (self.weight, self.bias)

    def interval(self, tensors: Sequence[Tensor], given: Sequence[Interval]) -> Interval:
        """Centre and radius: the radius is convolved with the absolute weights."""
        half = tensors[0] / 2
        bias = tensors[1] if len(tensors) > 1 else None
        both, width = given[0].lower + given[0].upper, given[0].upper - given[0].lower
        centre = nn.functional.conv2d(both, half, bias, *self.options)
        radius = nn.functional.conv2d(width, half.abs(), None, *self.options)
        return Interval(centre - radius, centre + radius)

    def transpose(
        self, tensors: Sequence[Tensor], rows: Tensor, shapes: Sequence[tuple[int, ...]]
    ) -> list[Tensor]:
        """Convolve with the transposed kernel."""
        stride, padding, dilation, groups = self.options
        size = torch.Size((len(rows), *shapes[0]))
        given: Any = conv2d_input
        return [given(size, tensors[0], rows, stride, padding, dilation, groups)]

    def offset(self, tensors: Sequence[Tensor], rows: Tensor, node: int) -> Tensor | float:
        """Multiply the bias by its coefficients."""
        return summed(rows * tensors[1][:, None, None], node) if len(tensors) > 1 else 0.0


@dataclass(frozen=True)
class Scale(Operation):
    """`factor * x + shift`: both broadcast against (1, ...)."""

    factor: Held | None
    shift: Held | None
    affine: ClassVar[bool] = True
    tail: ClassVar[bool] = True

    @property
    def tensors(self) -> tuple[Held, ...]:
        """The factor and the shift that there are."""
        return tuple(one for one in (self.factor, self.shift) if one is not None)

    def _parts(self, tensors: Sequence[Tensor]) -> tuple[Tensor | None, Tensor | None]:
        parts = list(tensors)
        factor = parts.pop(0) if self.factor is not None else None
        return factor, parts.pop(0) if self.shift is not None else None

    def interval(self, tensors: Sequence[Tensor], given: Sequence[Interval]) -> Interval:
        """A negative factor exchanges the bounds."""
        factor, shift = self._parts(tensors)
        low, high = given[0]
        if factor is not None:
            one, other = low * factor, high * factor
            low, high = torch.minimum(one, other), torch.maximum(one, other)
        if shift is not None:
            low, high = low + shift, high + shift
        return Interval(low, high)

    def transpose(
        self, tensors: Sequence[Tensor], rows: Tensor, shapes: Sequence[tuple[int, ...]]
    ) -> list[Tensor]:
        """Multiply by the factor."""
        factor, _ = self._parts(tensors)
        return [rows if factor is None else rows * factor[0]]

    def offset(self, tensors: Sequence[Tensor], rows: Tensor, node: int) -> Tensor | float:
        """Multiply the shift by its coefficients."""
        _, shift = self._parts(tensors)
        return 0.0 if shift is None else summed(rows * shift[0], node)


@dataclass(frozen=True)
class Normalisation(Scale):
    """Batch normalisation in evaluation mode, as one factor and one shift for each channel.

    `factor` and `shift` hold the running variance and the running mean.
    """

    weight: Held | None = None
    bias: Held | None = None
    eps: float = 1e-5
    ndim: int = 4

    @property
    def tensors(self) -> tuple[Held, ...]:
        """Variance, mean, and the learned weight and bias that there are."""
        parts = (self.factor, self.shift, self.weight, self.bias)
        return tuple(one for one in parts if one is not None)

    def line(self, tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Give the factor and the shift of each channel, (channels,)."""
        parts = list(tensors)
        factor = (parts[0] + self.eps).rsqrt()
        mean = parts[1]
        rest = parts[2:]
        if self.weight is not None:
            factor = factor * rest.pop(0)
        shift = -mean * factor
        if self.bias is not None:
            shift = shift + rest.pop(0)
        return factor, shift

    def ready(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Give factor and shift, as `Scale` takes them."""
        shape = (1, -1, *[1] * (self.ndim - 2))
        return [one.view(shape) for one in self.line(tensors)]


@dataclass(frozen=True)
class Positive(Operation):
    """A linear function without negative coefficients: reshaping, padding, pooling by means."""

    function: Callable[[Tensor], Tensor]
    affine: ClassVar[bool] = True

    def interval(self, tensors: Sequence[Tensor], given: Sequence[Interval]) -> Interval:
        """Apply it to both bounds."""
        return Interval(self.function(given[0].lower), self.function(given[0].upper))

    def transpose(
        self, tensors: Sequence[Tensor], rows: Tensor, shapes: Sequence[tuple[int, ...]]
    ) -> list[Tensor]:
        """Differentiate it: the function is linear."""
        with torch.enable_grad():
            zero = torch.zeros(
                len(rows), *shapes[0], dtype=rows.dtype, device=rows.device, requires_grad=True
            )
            value = self.function(zero)
            keep = rows.requires_grad
            (found,) = torch.autograd.grad(value, zero, rows, create_graph=keep)
        return [found]


@dataclass(frozen=True)
class Sum(Operation):
    """The sum or the difference of two nodes of equal shape."""

    sign: int = 1
    affine: ClassVar[bool] = True
    tail: ClassVar[bool] = True

    def interval(self, tensors: Sequence[Tensor], given: Sequence[Interval]) -> Interval:
        """Add the bounds."""
        one, other = given
        if self.sign < 0:
            return Interval(one.lower - other.upper, one.upper - other.lower)
        return Interval(one.lower + other.lower, one.upper + other.upper)

    def transpose(
        self, tensors: Sequence[Tensor], rows: Tensor, shapes: Sequence[tuple[int, ...]]
    ) -> list[Tensor]:
        """Both inputs have the coefficients of the sum."""
        return [rows, rows * self.sign]


@dataclass(frozen=True)
class Joined(Operation):
    """Nodes one after the other, along a dimension of one image."""

    dim: int
    """From the end: below 0."""
    affine: ClassVar[bool] = True
    tail: ClassVar[bool] = True

    def interval(self, tensors: Sequence[Tensor], given: Sequence[Interval]) -> Interval:
        """Join the bounds."""
        count = max(given, key=lambda one: len(one.lower)).lower.shape[0]
        lower = [one.lower.expand(count, *one.lower.shape[1:]) for one in given]
        upper = [one.upper.expand(count, *one.upper.shape[1:]) for one in given]
        return Interval(torch.cat(lower, self.dim), torch.cat(upper, self.dim))

    def transpose(
        self, tensors: Sequence[Tensor], rows: Tensor, shapes: Sequence[tuple[int, ...]]
    ) -> list[Tensor]:
        """Cut the coefficients."""
        return list(torch.split(rows, [shape[self.dim] for shape in shapes], self.dim))


def summed(values: Tensor, node: int) -> Tensor:
    """Sum values (*rows, *node) over the last `node` dimensions."""
    return values.flatten(values.ndim - node).sum(-1) if node else values
