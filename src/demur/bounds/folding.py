"""Batch norms that follow an affine layer, folded into its weights.

The folded layer is the same function. Its intervals differ by rounding alone, and cost less: there
is nothing to compute between the two layers.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from demur.bounds.affine import Convolution, Linear, Normalisation, Operation
from demur.bounds.held import Held, Interval
from demur.bounds.rules import Decision
from demur.bounds.tracing import Graph, Node


@dataclass(frozen=True)
class Folded(Operation):
    """A dense layer or a convolution, and the batch norm behind it."""

    layer: Linear | Convolution
    norm: Normalisation
    affine: ClassVar[bool] = True

    @property
    def tail(self) -> bool:  # type: ignore[override]
        """As for the layer."""
        return self.layer.tail

    @property
    def tensors(self) -> tuple[Held, ...]:
        """Those of the layer, then those of the batch norm."""
        return (*self.layer.tensors, *self.norm.tensors)

    def ready(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Give the folded weight and bias."""
        own = len(self.layer.tensors)
        weight = tensors[0]
        factor, shift = self.norm.line(tensors[own:])
        bias = tensors[1] * factor + shift if own > 1 else shift
        return [weight * factor.view(-1, *[1] * (weight.ndim - 1)), bias]

    def interval(self, tensors: Sequence[Tensor], given: Sequence[Interval]) -> Interval:
        """As for the layer."""
        return self.layer.interval(tensors, given)

    def transpose(
        self, tensors: Sequence[Tensor], rows: Tensor, shapes: Sequence[tuple[int, ...]]
    ) -> list[Tensor]:
        """As for the layer."""
        return self.layer.transpose(tensors, rows, shapes)

    def offset(self, tensors: Sequence[Tensor], rows: Tensor, node: int) -> Tensor | float:
        """As for the layer."""
        return self.layer.offset(tensors, rows, node)


def folded(graph: Graph) -> Graph:
    """Give the graph in which each batch norm is part of the layer that it alone reads.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from demur.bounds import trace
    >>> module = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).eval()
    >>> graph, _ = trace(module, torch.rand(4, 3))
    >>> [type(node.operation).__name__ for node in graph.nodes]
    ['Input', 'Folded']
    """
    readers = Counter(one for node in graph.nodes for one in node.inputs)
    readers[graph.output] += 1
    readers.update(
        node.operation.given for node in graph.nodes if isinstance(node.operation, Decision)
    )
    nodes: list[Node] = []
    places: dict[int, int] = {}
    for number, node in enumerate(graph.nodes):
        inputs = tuple(places[one] for one in node.inputs)
        operation = node.operation
        if isinstance(operation, Decision):
            operation = replace(operation, given=places[operation.given])
        if isinstance(operation, Normalisation) and readers[node.inputs[0]] == 1:
            before = nodes[inputs[0]]
            if _same_channels(before):
                both = Folded(before.operation, operation)  # type: ignore[arg-type]
                nodes[inputs[0]] = replace(before, operation=both)
                places[number] = inputs[0]
                continue
        places[number] = len(nodes)
        nodes.append(replace(node, operation=operation, inputs=inputs))
    return Graph(nodes, places[graph.output])


def _same_channels(node: Node) -> bool:
    """Say whether the channels of a batch norm behind a node are the rows of the node's weight.

    A dense layer of more than one dimension has its outputs in the last one, a batch norm its
    channels in the first one.
    """
    if isinstance(node.operation, Linear):
        return len(node.shape) == 1
    return isinstance(node.operation, Convolution)
