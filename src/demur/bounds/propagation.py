"""Bounds of a network over a region: intervals forwards, linear functions backwards.

IBP (Gowal et al. 2018) bounds each node by an interval; a score difference merges with the last
affine layers. CROWN (Zhang et al. 2018) takes a linear function of the scores back to the images,
through lines that bound each nonlinear node. CROWN-IBP (Zhang et al. 2020) does this with the
intervals of IBP for the inner nodes, CROWN with intervals from CROWN itself.
"""

from collections.abc import Mapping
from copy import copy
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from demur.bounds.affine import Constant, Input
from demur.bounds.curved import MaxPool, Own, Rectifier, Relaxation, Slope
from demur.bounds.held import Held, Interval
from demur.bounds.region import Region
from demur.bounds.rules import Decision
from demur.bounds.tracing import Graph, Node
from demur.bounds.unsupported import UnsupportedLayerError

ROUNDING = 2.0**-19
"""Slack of a bound, relative to the sum of the sizes of its terms: about 16 roundings of float32.

It covers the rounding of the bounds, and that of the network's own scores.
"""
ENTRIES = 1 << 22
"""Coefficients of a node that go back at a time: memory is bounded, whatever the rows."""


class Bounded(NamedTuple):
    """Lower bounds, and the slack that is already subtracted from them."""

    lower: Tensor
    slack: Tensor


class Propagation:
    """Bounds of the nodes of a graph over a region.

    Parameters
    ----------
    graph : Graph
    module : nn.Module
        The module that was traced: its weights are looked up by name.
    allowed : Region
        Its precision is the precision of all bounds.
    """

    def __init__(self, graph: Graph, module: nn.Module, allowed: Region) -> None:
        self.graph = graph
        self.allowed = allowed
        self.like = allowed.images
        self.tensors: Mapping[str, Tensor] = {
            **dict(module.named_parameters()),
            **dict(module.named_buffers()),
        }
        self.modules = dict(module.named_modules())
        self.intervals: list[Interval] = []
        self._ready: dict[int, list[Tensor]] = {}

    def select(self, index: Tensor) -> Self:
        """Give the bounds of the images at `index`, which may name an image several times."""
        found = copy(self)
        found.allowed = self.allowed.select(index)
        found.like = found.allowed.images
        found.intervals = [one.of(index) for one in self.intervals]
        return found

    def weights(self, place: int) -> list[Tensor]:
        """Give what the operation of a node takes, in the precision of the region."""
        if place not in self._ready:
            operation = self.graph.nodes[place].operation
            self._ready[place] = operation.ready([self._found(one) for one in operation.tensors])
        return self._ready[place]

    def _found(self, held: Held) -> Tensor:
        tensor = held.value if held.name is None else self.tensors[held.name]
        assert tensor is not None
        return tensor.to(self.like.device, self.like.dtype)

    def given(self, node: Node) -> list[Interval]:
        """Give the intervals of the inputs of a node."""
        return [self.intervals[one] for one in node.inputs]

    def forwards(self, tighten: bool = False) -> list[Interval]:
        """Bound every node by an interval.

        Parameters
        ----------
        tighten : bool, default False
            Whether the inputs of nonlinear nodes get the bounds of CROWN: else IBP.
        """
        self.intervals = []
        self._ready = {}
        curved = self._before_curves()
        straight = self._straight()
        for place, node in enumerate(self.graph.nodes):
            self.intervals.append(self.interval(node, place))
            if place not in curved or not node.operation.affine:
                continue
            ball = self.allowed.eps is not None and straight[place]
            if ball or (tighten and not straight[place]):
                self.intervals[place] = self._tightened(place)
        return self.intervals

    def interval(self, node: Node, place: int) -> Interval:
        """Bound a node by the intervals of its inputs."""
        operation = node.operation
        if isinstance(operation, Input):
            return self.allowed.box
        if isinstance(operation, Own):
            (found,) = self.given(node)
            module: Any = self.modules[operation.path]
            low, high = module.interval(*found)
            return Interval(low.to(self.like), high.to(self.like))
        if isinstance(operation, Decision):
            return self.given(node)[0]  # of the network's scores
        return operation.interval(self.weights(place), self.given(node))

    def _before_curves(self) -> set[int]:
        """Give the nodes that nonlinear nodes read."""
        nodes = self.graph.nodes
        curved = (one for one in nodes if not (one.operation.affine or _is_edge(one)))
        return {place for one in curved for place in one.inputs} - {0}

    def _straight(self) -> list[bool]:
        """Say of each node whether it is affine in the images."""
        found: list[bool] = []
        for node in self.graph.nodes:
            start = isinstance(node.operation, Input)
            affine = node.operation.affine and all(found[one] for one in node.inputs)
            found.append(start or affine)
        return found

    def _tightened(self, place: int) -> Interval:
        """Bound the undecided values of a node by linear functions of the images."""
        before = self.intervals[place]
        count = self.like.shape[0]
        shape = self.graph.nodes[place].shape
        low = before.lower.expand(count, *shape).reshape(count, -1).clone()
        high = before.upper.expand(count, *shape).reshape(count, -1).clone()
        undecided = self._undecided(place, low, high)
        step = max(1, self.at_once // 2)
        for image in range(count):
            for columns in torch.split(undecided[image].nonzero().flatten(), step):
                rows = torch.zeros(len(columns), low.shape[1], dtype=low.dtype, device=low.device)
                rows = rows.scatter_(1, columns[:, None], 1.0).view(len(columns), *shape)
                found = self.backwards(place, torch.cat([rows, -rows]), image).lower
                below, above = found.chunk(2)
                low[image, columns] = torch.maximum(low[image, columns], below)
                high[image, columns] = torch.minimum(high[image, columns], -above)
        tight = Interval(low.view(count, *shape), high.view(count, *shape))
        return tight.intersect(Interval(before.lower.expand_as(tight.lower), before.upper))

    def _undecided(self, place: int, low: Tensor, high: Tensor) -> Tensor:
        """Flag the values whose bounds matter: all, if another node than rectifiers reads them."""
        readers = [one.operation for one in self.graph.nodes if place in one.inputs]
        if all(isinstance(one, Rectifier) for one in readers):
            return (low < 0) & (high > 0)
        return torch.ones_like(low, dtype=torch.bool)

    @property
    def at_once(self) -> int:
        """Rows that go back at a time."""
        largest = max(torch.Size(node.shape).numel() for node in self.graph.nodes)
        return max(1, ENTRIES // max(1, largest))

    def backwards(
        self,
        place: int,
        rows: Tensor,
        owner: Tensor | int,
        slope: Slope | Relaxation = "adaptive",
    ) -> Bounded:
        """Bound rows @ node from below by a linear function of the images.

        The rows go back in parts of at most `ENTRIES` coefficients, but for one row at least.

        Parameters
        ----------
        place : int
            The node.
        rows : Tensor of shape (R, *node)
        owner : Tensor of shape (R,), int64, or int
            The image of each row, or of all rows.
        slope : {"adaptive", "flat", "steep"} or Relaxation
            The lower lines of rectifiers. A relaxation has those of all rows, which then go back
            together.
        """
        together = torch.compiler.is_exporting() or isinstance(slope, Relaxation)
        if together or len(rows) <= self.at_once:
            return self._backwards(place, rows, owner, slope)
        parts = []
        for start in range(0, len(rows), self.at_once):
            some = slice(start, start + self.at_once)
            own = owner if isinstance(owner, int) else owner[some]
            parts.append(self._backwards(place, rows[some], own, slope))
        return Bounded(*(torch.cat(one) for one in zip(*parts, strict=True)))

    def _backwards(
        self, place: int, rows: Tensor, owner: Tensor | int, slope: Slope | Relaxation
    ) -> Bounded:
        waiting = {place: rows}
        constant = torch.zeros(len(rows), dtype=rows.dtype, device=rows.device)
        size = torch.zeros_like(constant)
        for number in range(place, -1, -1):
            if number not in waiting:
                continue
            sent, more, large = self._back(number, waiting.pop(number), owner, slope)
            constant = constant + more
            size = size + (more.abs() if large is None else large)
            for one, coefficients in sent:
                waiting[one] = waiting[one] + coefficients if one in waiting else coefficients
        slack = ROUNDING * size
        return Bounded(constant - slack, slack)

    def _back(
        self, number: int, rows: Tensor, owner: Tensor | int, slope: Slope | Relaxation
    ) -> tuple[list[tuple[int, Tensor]], Tensor, Tensor | None]:
        """Take coefficients of a node to its inputs."""
        node = self.graph.nodes[number]
        operation = node.operation
        if isinstance(operation, Input):
            bound, size = self.allowed.minimum(rows, owner)
            return [], bound, size
        if operation.affine:
            weights = self.weights(number)
            shapes = [self.graph.nodes[one].shape for one in node.inputs]
            sent = operation.transpose(weights, rows, shapes)
            more = operation.offset(weights, rows, len(node.shape))
            return list(zip(node.inputs, sent, strict=True)), _filled(more, rows), None
        if isinstance(operation, Rectifier | MaxPool):
            (source,) = node.inputs
            given = self.intervals[source].of(owner)
            if not isinstance(slope, Relaxation):
                lines = operation.lines(rows, given, slope)
                return [(source, lines.rows)], lines.constant, None
            if isinstance(operation, Rectifier):
                slope.seen[number] = rows.detach()
            lines = operation.lines(rows, given, slope.slopes.get(number, "adaptive"))
            signed = lines.rows - slope.multipliers.get(number, 0.0)
            return [(source, signed)], lines.constant, None
        bound, size = self._stopped(number, rows.unsqueeze(1), owner)
        return [], bound.squeeze(1), size.squeeze(1)

    def lower_by_intervals(self, place: int, rows: Tensor) -> Bounded:
        """Bound rows @ node from below by intervals, merged with the last affine layers.

        Parameters
        ----------
        place : int
        rows : Tensor of shape (N, M, outputs)

        Returns
        -------
        Bounded
            Of shape (N, M).
        """
        waiting = {place: rows}
        constant = torch.zeros_like(rows[..., 0])
        size = torch.zeros_like(constant)
        for number in range(place, -1, -1):
            if number not in waiting:
                continue
            coefficients = waiting.pop(number)
            node = self.graph.nodes[number]
            shapes = [self.graph.nodes[one].shape for one in node.inputs]
            flat = all(len(shape) == 1 for shape in shapes)
            if not (node.operation.tail and flat):
                bound, large = self._stopped(number, coefficients, None)
                constant = constant + bound
                size = size + large
                continue
            weights = self.weights(number)
            more = node.operation.offset(weights, coefficients, len(node.shape))
            constant = constant + more
            size = size + (more.abs() if isinstance(more, Tensor) else abs(more))
            for one, sent in zip(
                node.inputs, node.operation.transpose(weights, coefficients, shapes), strict=True
            ):
                waiting[one] = waiting[one] + sent if one in waiting else sent
        slack = ROUNDING * size
        return Bounded(constant - slack, slack)

    def _stopped(
        self, number: int, rows: Tensor, owner: Tensor | int | None
    ) -> tuple[Tensor, Tensor]:
        """Bound coefficients (N, M, *node) by the interval of a node, as (N, M)."""
        operation = self.graph.nodes[number].operation
        interval = self.intervals[number]
        if isinstance(operation, Decision):
            raise UnsupportedLayerError(
                self.graph.nodes[number].layer, "a rejection inside the network"
            )
        if owner is not None:
            interval = interval.of(owner)
        wide = Interval(interval.lower.unsqueeze(1), interval.upper.unsqueeze(1))
        node = len(self.graph.nodes[number].shape)
        flat = rows.flatten(rows.ndim - node)
        low = wide.lower.flatten(wide.lower.ndim - node)
        high = wide.upper.flatten(wide.upper.ndim - node)
        positive = flat.clamp(min=0)
        negative = flat.clamp(max=0)
        bound = (positive * low + negative * high).sum(-1)
        size = (flat.abs() * torch.maximum(low.abs(), high.abs())).sum(-1)
        if isinstance(operation, Own) and operation.combines and owner is None:
            (source,) = self.graph.nodes[number].inputs
            given = self.intervals[source]
            module: Any = self.modules[operation.path]
            bound = torch.maximum(bound, module.interval(*given, rows)[0].to(bound))
        return bound, size


def _is_edge(node: Node) -> bool:
    return isinstance(node.operation, Input | Constant | Decision)


def _filled(more: Tensor | float, rows: Tensor) -> Tensor:
    if isinstance(more, Tensor):
        return more
    return torch.full((len(rows),), more, dtype=rows.dtype, device=rows.device)
