"""The graph of a network, recorded while it computes scores of a batch.

Each operation on a value that depends on the images is recorded, or refused. A traced tensor has no
memory of its own: an operation that the recorder does not see fails, and cannot be missed.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import RLock
from typing import Any

import torch
from torch import Tensor, nn

from demur.bounds.affine import Constant, Operation, Positive, Scale
from demur.bounds.curved import Own
from demur.bounds.held import Held
from demur.bounds.rules import Decision, RejectRule
from demur.bounds.unsupported import UnsupportedLayerError
from demur.classifier import Classifier

_LOCK = RLock()
WHOLE = "the model itself"

QUERIES = {
    *("get shape", "get ndim", "get dtype", "get device", "get layout", "get is_cuda"),
    *("get is_sparse", "get is_quantized", "get requires_grad", "get is_meta", "get is_leaf"),
    *("get is_mkldnn", "get is_nested", "get is_cpu", "get is_mps", "get is_xpu"),
    *("size", "dim", "ndimension", "numel", "nelement", "__len__", "is_floating_point"),
    *("is_complex", "is_signed", "element_size"),
}
"""Questions about the shape and the kind of a tensor, not about its values."""


@dataclass(frozen=True)
class Node:
    """One operation of a graph.

    Attributes
    ----------
    operation : Operation
    inputs : tuple of int
        Numbers of the nodes that it reads.
    shape : tuple of int
        Shape of one image there, without the batch.
    layer : str
        The module that computes it.
    """

    operation: Operation
    inputs: tuple[int, ...]
    shape: tuple[int, ...]
    layer: str


@dataclass
class Graph:
    """The operations of a network, in order. The first node is the input.

    Attributes
    ----------
    nodes : list of Node
    output : int
        The node of the scores.
    """

    nodes: list[Node] = field(default_factory=list)
    output: int = 0


class Traced(Tensor):
    """Stands for a value that depends on the images, while a graph is recorded."""

    tracer: "Tracer"
    node: int
    value: Tensor
    alias: list[int]

    @staticmethod
    def __new__(cls, tracer: "Tracer", node: int, value: Tensor, alias: list[int]) -> "Traced":
        """Make a tensor of the same shape without memory."""
        make: Any = torch.Tensor._make_wrapper_subclass
        found: Traced = make(cls, value.shape, dtype=value.dtype, device=value.device)
        return found

    def __init__(self, tracer: "Tracer", node: int, value: Tensor, alias: list[int]) -> None:
        self.tracer = tracer
        self.node = node
        self.value = value
        self.alias = alias  # how many traced tensors share their memory
        alias[0] += 1

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Record an operation."""
        given = dict(kwargs or {})
        name = _name(func)
        if name in QUERIES:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **given)
        tracer = next(one.tracer for one in traced_in((args, given)))
        return tracer.operation(tracer, name, args, given)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Refuse what was not recorded."""
        raise UnsupportedLayerError(WHOLE, f"the operation {func}")


def traced_in(value: Any) -> Iterator[Traced]:
    """Find the traced tensors in arguments."""
    if isinstance(value, Traced):
        yield value
    elif isinstance(value, list | tuple):
        for one in value:
            yield from traced_in(one)
    elif isinstance(value, dict):
        yield from traced_in(list(value.values()))


def _name(func: Any) -> str:
    name = getattr(func, "__name__", str(func))
    owner = getattr(func, "__self__", None)
    if name == "__get__" and owner is not None:
        return f"get {getattr(owner, '__name__', '')}"
    return str(name)


class Tracer:
    """Records the graph of one forward pass.

    Parameters
    ----------
    module : nn.Module
        Its parameters, buffers and parts are known by their names.
    operation : callable
        Records one call of torch, or raises UnsupportedLayerError. It takes the tracer, the name of
        the function, its arguments and its keyword arguments.
    """

    def __init__(self, module: nn.Module, operation: Callable[..., Any]) -> None:
        self.operation = operation
        self.graph = Graph()
        self.training = module.training
        self.path: list[str] = []
        self.names = {id(one): name for name, one in module.named_parameters()}
        self.names |= {id(one): name for name, one in module.named_buffers()}
        self.paths = {id(one): name for name, one in module.named_modules()}

    @property
    def layer(self) -> str:
        """The module that computes now."""
        return next((one for one in reversed(self.path) if one), WHOLE)

    def unsupported(self, what: str) -> UnsupportedLayerError:
        """Make the error that names the layer."""
        return UnsupportedLayerError(self.layer, what)

    def held(self, tensor: Tensor) -> Held:
        """Give a weight by its name, or another tensor as a constant."""
        name = self.names.get(id(tensor))
        return Held(name, None if name is not None else tensor)

    def constant(self, value: Tensor | float, like: Tensor) -> Held:
        """Give a number, or a tensor that is the same for each image, as (1, ...)."""
        if isinstance(value, Tensor):
            tensor = value.to(like.device)
        else:
            tensor = torch.tensor(float(value), dtype=torch.float64, device=like.device)
        if tensor.ndim == like.ndim and len(tensor) > 1 and bool((tensor == tensor[:1]).all()):
            tensor = tensor[:1]
        if tensor.ndim > like.ndim or (tensor.ndim == like.ndim and len(tensor) != 1):
            raise self.unsupported("a constant that differs between images")
        missing = like.ndim - tensor.ndim
        return Held(None, tensor.view(*[1] * missing, *tensor.shape))

    def add(
        self, operation: Operation, inputs: tuple[int, ...], value: Tensor, alias: Any = None
    ) -> Traced:
        """Append a node."""
        place = len(self.graph.nodes)
        self.graph.nodes.append(Node(operation, inputs, tuple(value.shape[1:]), self.layer))
        return Traced(self, place, value, [0] if alias is None else alias)

    def as_node(self, value: Any, like: Tensor) -> int:
        """Give the node of a traced tensor, or make one of a constant."""
        if isinstance(value, Traced):
            return value.node
        held = self.constant(value, like)
        assert held.value is not None
        expanded = held.value.expand(1, *like.shape[1:])
        return self.add(Constant(Held(None, expanded)), (), expanded).node

    def call(self, module: nn.Module, original: Any, args: Any, kwargs: Any) -> Any:
        """Call a part of the network. A part may bring its own bounds."""
        own = self.paths.get(id(module), type(module).__name__)
        self.path.append(own)
        try:
            images = args[0] if len(args) == 1 and not kwargs else None
            if isinstance(images, Traced):
                rule = getattr(module, "reject_rule", None)
                if callable(rule):
                    return self._decision(module, original, rule(), images)
                if getattr(module, "positive_linear", False):
                    function: Callable[[Tensor], Tensor] = module.forward
                    return self.add(Positive(function), (images.node,), function(images.value))
                if callable(getattr(module, "interval", None)):
                    return self._own(module, images)
                if isinstance(module, Classifier):
                    return self._classifier(module, images)
            return original(module, *args, **kwargs)
        except UnsupportedLayerError:
            raise
        except RuntimeError as error:  # torch cannot compute with a traced tensor
            raise self.unsupported(f"the module {type(module).__name__}") from error
        finally:
            self.path.pop()

    def _own(self, module: nn.Module, images: Traced) -> Traced:
        path = self.paths.get(id(module))
        if path is None:
            raise self.unsupported(f"a module {type(module).__name__} outside of the network")
        combines = bool(getattr(module, "combines", False))
        return self.add(Own(path, combines), (images.node,), module.forward(images.value))

    def _classifier(self, classifier: Classifier, images: Traced) -> Any:
        check = getattr(classifier, "_check_fitted", None)
        if callable(check):
            check()
        scores: Any = classifier.module(images)
        if classifier._threshold and isinstance(scores, Traced):
            columns = scores.shape[1]
            if columns > classifier.num_classes:
                shift = torch.zeros(1, columns, dtype=scores.dtype, device=scores.device)
                shift[0, -1] = classifier._threshold
                operation = Scale(None, self.constant(shift, scores))
                return self.add(operation, (scores.node,), scores.value + shift)
        return scores

    def _decision(
        self, module: nn.Module, original: Any, rule: RejectRule, images: Traced
    ) -> Traced:
        scores = rule.network(images)
        if not isinstance(scores, Traced) or scores.ndim != 2:
            raise self.unsupported("a rejection of something else than scores")
        value = scores.value
        columns = torch.cat([value, value[:, :1]], 1)  # one column more; the values do not matter
        return self.add(Decision(rule, images.node), (scores.node,), columns)


@contextmanager
def intercepted() -> Iterator[None]:
    """Inside, calls of modules with traced tensors go through their tracer."""
    with _LOCK:
        original: Any = nn.Module.__call__

        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            found = next(traced_in((args, kwargs)), None)
            if found is None:
                return original(module, *args, **kwargs)
            return found.tracer.call(module, original, args, kwargs)

        owner: Any = nn.Module
        owner.__call__ = call
        try:
            yield
        finally:
            owner.__call__ = original
