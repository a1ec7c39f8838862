"""Which operations have bounds, how a call of torch becomes a node, and the graph of a network."""

import operator
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from demur.bounds import layers
from demur.bounds.affine import Constant, Input, Joined, Positive, Scale, Sum
from demur.bounds.curved import Increasing, Softmax
from demur.bounds.folding import folded
from demur.bounds.tracing import WHOLE, Graph, Traced, Tracer, intercepted
from demur.bounds.unsupported import UnsupportedLayerError

Given = dict[str, Any]


def trace(module: nn.Module, images: Tensor) -> tuple[Graph, Tensor]:
    """Record the graph of a module, and compute its scores.

    Parameters
    ----------
    module : nn.Module
        In evaluation mode; in training mode, batch norms take the statistics of these images.
    images : Tensor of shape (N, ...)

    Returns
    -------
    graph : Graph
    scores : Tensor of shape (N, columns)
        What the module computes, with its gradient.

    Raises
    ------
    UnsupportedLayerError
        For an operation without bounds.

    Examples
    --------
    >>> module = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    >>> graph, scores = trace(module, torch.rand(3, 1, 2, 2))
    >>> [type(node.operation).__name__ for node in graph.nodes], scores.shape
    (['Input', 'Positive', 'Linear'], torch.Size([3, 2]))
    """
    tracer = Tracer(module, record)
    with intercepted():
        given = tracer.add(Input(), (), images)
        answer = module(given)
    if not isinstance(answer, Traced):
        raise UnsupportedLayerError(WHOLE, f"an answer of type {type(answer).__name__}")
    tracer.graph.output = answer.node
    return folded(tracer.graph), answer.value


def record(tracer: Tracer, name: str, args: Any, kwargs: Given) -> Any:
    """Record one call of torch on traced tensors.

    Raises
    ------
    UnsupportedLayerError
        If it has no bounds, or its arguments are of another kind.
    """
    plain = name.strip("_") if name.startswith("__") else name
    in_place = name.startswith("__i") and name not in ("__invert__", "__index__", "__int__")
    in_place |= plain.endswith("_") or bool(kwargs.get("inplace"))
    plain = plain.removesuffix("_")
    plain = plain[1:] if name.startswith("__i") and in_place else plain
    handler = _HANDLERS.get(plain)
    if handler is None:
        raise tracer.unsupported(f"the operation {plain}")
    try:
        with torch._C.DisableTorchFunctionSubclass():
            found = handler(tracer, plain, args, kwargs)
    except (TypeError, IndexError, AttributeError, KeyError, AssertionError) as error:
        raise tracer.unsupported(f"the operation {plain} with these arguments") from error
    if not in_place or not isinstance(args[0], Traced):
        return found
    changed = args[0]
    if changed.alias[0] > 1:
        raise tracer.unsupported(f"the operation {plain} in place, on memory that is shared,")
    if found.value.shape != changed.value.shape:
        raise tracer.unsupported(f"the operation {plain} in place, to another shape,")
    changed.node = found.node
    changed.value = found.value
    return changed


def _same(tracer: Tracer, name: str, args: Any, kwargs: Given) -> Any:
    """Copies, and conversions between precisions: they change no value."""
    first = args[0]
    if not isinstance(first, Traced):  # a constant that takes the precision of a traced tensor
        like = next(one for one in (*args[1:], *kwargs.values()) if isinstance(one, Traced))
        return first.to(like.value)
    kinds = [one for one in (*args[1:], *kwargs.values()) if isinstance(one, torch.dtype)]
    if any(not kind.is_floating_point or kind.itemsize < 4 for kind in kinds):
        raise tracer.unsupported(f"a conversion to {kinds[0]}")
    return type(first)(tracer, first.node, first.value, first.alias)


def _reshaped(tracer: Tracer, name: str, args: Any, kwargs: Given) -> Any:
    """Other shapes of the same numbers, image by image."""
    first = args[0]
    value = getattr(first.value, name)(*args[1:], **kwargs)
    if value.ndim < 1 or len(value) != len(first.value) or value.shape[1:].numel() == 0:
        raise tracer.unsupported(f"a {name} across images")
    if value[0].numel() != first.value[0].numel():
        raise tracer.unsupported(f"a {name} across images")
    function = partial(_shaped, shape=tuple(value.shape[1:]))
    return tracer.add(Positive(function), (first.node,), value, first.alias)


def _shaped(values: Tensor, shape: tuple[int, ...]) -> Tensor:
    if shape and values.ndim > 1 and len(shape) == 1:
        return values.flatten(1)  # keeps a free number of images in exported graphs
    return values.reshape(values.shape[0], *shape)


def _positive(tracer: Tracer, name: str, args: Any, kwargs: Given) -> Any:
    """Linear functions without negative coefficients that treat each image alone."""
    first = args[0]
    function = _POSITIVE[name]
    call = partial(_called, function=function, args=tuple(args[1:]), kwargs=dict(kwargs))
    value = call(first.value)
    if value.ndim < 1 or len(value) != len(first.value):
        raise tracer.unsupported(f"the operation {name} across images")
    _check_alone(tracer, name, first.value, value, args[1:], kwargs)
    return tracer.add(Positive(call), (first.node,), value, first.alias)


def _called(
    values: Tensor, function: Callable[..., Tensor], args: tuple[Any, ...], kwargs: Given
) -> Tensor:
    return function(values, *args, **kwargs)


def _check_alone(
    tracer: Tracer, name: str, before: Tensor, after: Tensor, args: Any, kwargs: Given
) -> None:
    """Refuse a function that mixes images, or moves the batch to another dimension."""
    dims = [*args, *kwargs.values()]
    if name in ("mean", "sum"):
        flat = [d for one in dims[:1] for d in (one if isinstance(one, tuple | list) else [one])]
        if not flat or not all(isinstance(d, int) for d in flat):
            raise tracer.unsupported(f"the operation {name} over all images")
        if any(d % before.ndim == 0 for d in flat):
            raise tracer.unsupported(f"the operation {name} over images")
    if name == "pad":
        fill = args[2] if len(args) > 2 else kwargs.get("value")
        if fill not in (None, 0):
            raise tracer.unsupported("a padding with other numbers than 0")
    if name == "transpose" and any(d % before.ndim == 0 for d in args):
        raise tracer.unsupported("a transpose of images")
    if name == "permute":
        order = args[0] if isinstance(args[0], tuple | list) else args
        if order[0] % before.ndim:
            raise tracer.unsupported("a permute of images")


def _indexed(tracer: Tracer, name: str, args: Any, kwargs: Given) -> Any:
    """A part of each image: the first index takes all images."""
    first, index = args
    parts = index if isinstance(index, tuple) else (index,)
    plain = all(one is Ellipsis or isinstance(one, slice | int) for one in parts)
    if not plain or parts[0] != slice(None):
        raise tracer.unsupported("an index that chooses images")
    function = partial(_called, function=_item, args=(parts,), kwargs={})
    return tracer.add(Positive(function), (first.node,), function(first.value), first.alias)


def _item(values: Tensor, parts: Any) -> Tensor:
    return values[parts]


def _scaled(tracer: Tracer, name: str, args: Any, kwargs: Given) -> Any:
    """Sums, differences, products and quotients; one side may be a constant."""
    if kwargs.get("alpha", 1) != 1 or kwargs.get("rounding_mode") is not None or len(args) != 2:
        raise tracer.unsupported(f"the operation {name} with options")
    one, other = args
    if name.startswith("r") and name != "remainder":
        one, other, name = other, one, name[1:]
    if isinstance(one, Traced) and isinstance(other, Traced):
        if name not in ("add", "sub") or one.value.shape != other.value.shape:
            raise tracer.unsupported(f"the operation {name} of two values of the images")
        sign = 1 if name == "add" else -1
        value = one.value + sign * other.value
        return tracer.add(Sum(sign), (one.node, other.node), value)
    traced, constant = (one, other) if isinstance(one, Traced) else (other, one)
    return _with_constant(tracer, name, traced, constant, traced is one)


def _with_constant(tracer: Tracer, name: str, traced: Traced, constant: Any, first: bool) -> Any:
    value = traced.value
    held = tracer.constant(constant, value)
    number = held.value
    assert number is not None
    factor = None
    shift = None
    if name == "add":
        shift = number
    elif name in ("sub", "subtract"):
        shift = -number if first else number
        factor = None if first else torch.full_like(number[:1].flatten()[:1], -1.0)
    elif name in ("mul", "multiply"):
        factor = number
    elif first:
        factor = 1 / number.double()
    else:
        raise tracer.unsupported("a division by a value of the images")
    # Computed as the network does, so that its scores are equal to the last bit.
    pair = (value, constant) if first else (constant, value)
    found = torch.as_tensor(_ARITHMETIC[name[:3]](*pair))
    if found.shape != value.shape:
        raise tracer.unsupported(f"the operation {name} with a constant of another shape")
    parts = [None if one is None else tracer.constant(one, value) for one in (factor, shift)]
    return tracer.add(Scale(*parts), (traced.node,), found)


def _negated(tracer: Tracer, name: str, args: Any, kwargs: Given) -> Any:
    return _with_constant(tracer, "mul", args[0], -1.0, True)


def _increasing(tracer: Tracer, name: str, args: Any, kwargs: Given) -> Any:
    options = [*args[1:], *kwargs.values()]
    if any(not isinstance(one, int | float | bool | None) for one in options):
        raise tracer.unsupported(f"the operation {name} with tensors")
    call = partial(_called, function=_INCREASING[name], args=tuple(args[1:]), kwargs=dict(kwargs))
    return tracer.add(Increasing(call), (args[0].node,), call(args[0].value))


def _softmax(tracer: Tracer, name: str, args: Any, kwargs: Given) -> Any:
    dim = args[1] if len(args) > 1 else kwargs.get("dim")
    value = args[0].value
    if value.ndim != 2 or dim not in (1, -1):
        raise tracer.unsupported("a softmax over something else than scores")
    return tracer.add(Softmax(), (args[0].node,), value.softmax(1))


def _joined(tracer: Tracer, name: str, args: Any, kwargs: Given) -> Any:
    parts = list(args[0])
    named: Any = kwargs.get("dim", kwargs.get("axis", 0))
    dim = int(args[1] if len(args) > 1 else named)
    like = next(one.value for one in parts if isinstance(one, Traced))
    if dim % like.ndim == 0:
        raise tracer.unsupported("a batch that grows")
    values = [one.value if isinstance(one, Traced) else one for one in parts]
    nodes = []
    for one in parts:
        if isinstance(one, Traced):
            nodes.append(one.node)
            continue
        held = tracer.constant(one, like)
        assert held.value is not None
        nodes.append(tracer.add(Constant(held), (), held.value).node)
    value = torch.cat(values, dim)
    return tracer.add(Joined(dim % like.ndim - like.ndim), tuple(nodes), value)


_POSITIVE: dict[str, Callable[..., Any]] = {
    "avg_pool2d": nn.functional.avg_pool2d,
    "adaptive_avg_pool2d": nn.functional.adaptive_avg_pool2d,
    "mean": torch.mean,
    "sum": torch.sum,
    "pad": nn.functional.pad,
    "transpose": torch.transpose,
    "permute": Tensor.permute,
}
_ARITHMETIC: dict[str, Callable[..., Any]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "div": operator.truediv,
    "tru": operator.truediv,
}
_INCREASING: dict[str, Callable[..., Any]] = {
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "exp": torch.exp,
    "log_sigmoid": nn.functional.logsigmoid,
    "logsigmoid": nn.functional.logsigmoid,
    "clamp": torch.clamp,
    "clip": torch.clamp,
    "hardtanh": nn.functional.hardtanh,
    "relu6": nn.functional.relu6,
}
_SAME = ("clone", "contiguous", "detach", "to", "float", "double", "type_as", "alias")
_SHAPES = ("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze")
_SUMS = ("add", "radd", "sub", "subtract", "rsub", "mul", "multiply", "rmul")
_HANDLERS: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(_SAME, _same),
    **dict.fromkeys(_SHAPES, _reshaped),
    **dict.fromkeys(_POSITIVE, _positive),
    **dict.fromkeys((*_SUMS, "div", "divide", "truediv", "true_divide"), _scaled),
    **dict.fromkeys(_INCREASING, _increasing),
    **dict.fromkeys(("relu", "leaky_relu"), layers.rectifier),
    **dict.fromkeys(("matmul", "mm"), layers.product),
    **dict.fromkeys(("cat", "concat", "concatenate"), _joined),
    "max_pool2d": layers.max_pool,
    "conv2d": layers.convolution,
    "linear": layers.linear,
    "batch_norm": layers.batch_norm,
    **dict.fromkeys(("dropout", "dropout1d", "dropout2d", "alpha_dropout"), layers.dropout),
    "softmax": _softmax,
    "getitem": _indexed,
    "neg": _negated,
}
