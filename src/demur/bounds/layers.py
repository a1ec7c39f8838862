"""How calls of torch that compute layers with weights, or windows, become nodes of the graph."""

from typing import Any

import torch
from torch import nn

from demur.bounds.affine import Convolution, Linear, Normalisation
from demur.bounds.curved import MaxPool, Rectifier
from demur.bounds.held import Held
from demur.bounds.tracing import Traced, Tracer

Given = dict[str, Any]


def linear(tracer: Tracer, name: str, args: Any, kwargs: Given) -> Any:
    """Record a product with a weight."""
    values = [*args, *[kwargs[key] for key in ("weight", "bias") if key in kwargs]]
    given, weight = values[:2]
    bias = values[2] if len(values) > 2 else None
    if isinstance(weight, Traced) or isinstance(bias, Traced):
        raise tracer.unsupported("a product of two values of the images")
    value = nn.functional.linear(given.value, weight, bias)
    operation = Linear(tracer.held(weight), None if bias is None else tracer.held(bias))
    return tracer.add(operation, (given.node,), value)


def product(tracer: Tracer, name: str, args: Any, kwargs: Given) -> Any:
    """Record a matrix product with a constant on the right."""
    given, matrix = args
    if not isinstance(given, Traced) or isinstance(matrix, Traced) or matrix.ndim != 2:
        raise tracer.unsupported(f"the operation {name} of these values")
    operation = Linear(Held(None, matrix.T), None)
    return tracer.add(operation, (given.node,), given.value @ matrix)


def convolution(tracer: Tracer, name: str, args: Any, kwargs: Given) -> Any:
    """Record a two-dimensional convolution."""
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    given = dict(zip(names, args, strict=False)) | kwargs
    weight = given["weight"]
    bias = given.get("bias")
    if isinstance(weight, Traced) or isinstance(bias, Traced):
        raise tracer.unsupported("a convolution of two values of the images")
    padding = given.get("padding", 0)
    dilation = _pair(given.get("dilation", 1))
    if padding == "valid":
        padding = 0
    elif padding == "same":
        reach = [d * (k - 1) for d, k in zip(dilation, weight.shape[-2:], strict=True)]
        if any(one % 2 for one in reach):
            raise tracer.unsupported("a convolution with uneven padding")
        padding = tuple(one // 2 for one in reach)
    stride = _pair(given.get("stride", 1))
    options = (stride, _pair(padding), dilation, given.get("groups", 1))
    value = nn.functional.conv2d(given["input"].value, weight, bias, *options)
    held = None if bias is None else tracer.held(bias)
    operation = Convolution(tracer.held(weight), held, options)
    return tracer.add(operation, (given["input"].node,), value)


def _pair(value: Any) -> tuple[int, int]:
    first, second = (value, value) if isinstance(value, int) else value * (3 - len(value))
    return int(first), int(second)


def batch_norm(tracer: Tracer, name: str, args: Any, kwargs: Given) -> Any:
    """Record a batch norm: of the running statistics, or in training of those of these images."""
    names = ["input", "running_mean", "running_var", "weight", "bias"]
    names += ["training", "momentum", "eps"]
    given = dict(zip(names, args, strict=False)) | kwargs
    traced = given.pop("input")
    value = traced.value
    training = given.get("training", False)
    mean = given.get("running_mean")
    variance = given.get("running_var")
    if mean is None or variance is None or (training and not tracer.training):
        raise tracer.unsupported("a batch norm of the statistics of a batch")
    dims = [0, *range(2, value.ndim)]
    if training:  # the statistics of these images, which are the clean ones
        spread, centre = torch.var_mean(value, dims, correction=0)
        statistics = (Held(None, spread), Held(None, centre))
    else:
        statistics = (tracer.held(variance), tracer.held(mean))
    learned = [given.get(key) for key in ("weight", "bias")]
    weight, bias = (None if one is None else tracer.held(one) for one in learned)
    eps = given.get("eps", 1e-5)
    found = nn.functional.batch_norm(value, **given)
    operation = Normalisation(*statistics, weight, bias, eps, value.ndim)
    return tracer.add(operation, (traced.node,), found)


def rectifier(tracer: Tracer, name: str, args: Any, kwargs: Given) -> Any:
    """Record a rectifier."""
    slope = 0.0
    if name == "leaky_relu":
        slope = args[1] if len(args) > 1 else kwargs.get("negative_slope", 0.01)
    if not 0 <= slope <= 1:
        raise tracer.unsupported(f"a rectifier of slope {slope}")
    value = nn.functional.leaky_relu(args[0].value, slope) if slope else args[0].value.relu()
    return tracer.add(Rectifier(float(slope)), (args[0].node,), value)


def max_pool(tracer: Tracer, name: str, args: Any, kwargs: Given) -> Any:
    """Record a max pooling."""
    names = ("input", "kernel_size", "stride", "padding", "dilation", "ceil_mode")
    given = dict(zip(names, args, strict=False)) | kwargs
    if _pair(given.get("dilation", 1)) != (1, 1) or given.get("return_indices"):
        raise tracer.unsupported("a dilated max pooling, or one with indices,")
    kernel = _pair(given["kernel_size"])
    stride = given.get("stride")
    step = kernel if stride is None or stride == [] else _pair(stride)
    operation = MaxPool(kernel, step, _pair(given.get("padding", 0)), bool(given.get("ceil_mode")))
    return tracer.add(operation, (given["input"].node,), operation._at(given["input"].value))


def dropout(tracer: Tracer, name: str, args: Any, kwargs: Given) -> Any:
    """Record a dropout that does nothing, as in evaluation mode."""
    given = dict(zip(("input", "p", "training", "inplace"), args, strict=False)) | kwargs
    if given.get("training", True) and given.get("p", 0.5) > 0:
        raise tracer.unsupported("a dropout in training mode")
    first = given["input"]
    return type(first)(tracer, first.node, first.value, first.alias)
