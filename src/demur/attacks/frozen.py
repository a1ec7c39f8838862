"""The state that a classifier is in while it is attacked, and is taken out of again."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from demur.classifier import evaluating
from demur.errors import DemurError


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Inside: evaluation mode, and no gradients for the parameters, which halves the backward pass. Restored afterwards."""
    wanted = [parameter for parameter in module.parameters() if parameter.requires_grad]
    with evaluating(module):
        for parameter in wanted:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in wanted:
                parameter.requires_grad_(True)


@contextmanager
def widened(classifier: nn.Module, factor: float) -> Iterator[None]:
    """Inside, gradients through kernels are those of kernels with `factor` times the gamma; scores and decisions stay what they are.

    A kernel machine is flat far from its support vectors, and an attack on it blind (R14, R18): wider kernels still point the way. Every
    part of a classifier that has an attribute `widened` is meant (`defenses.rbf_svm.RBFMachines`); `strongest` tries it by itself.
    """
    if not 0 < factor <= 1:
        raise DemurError(f"kernels are widened by a factor in (0, 1], not {factor}.")
    before = [(module, module.widened) for module in kernels(classifier)]
    try:
        for module, _ in before:
            module.widened = factor
        yield
    finally:
        for module, value in before:
            module.widened = value


def kernels(classifier: nn.Module) -> list[Any]:
    """The parts of a classifier whose gradients can be widened."""
    return [module for module in classifier.modules() if hasattr(module, "widened")]


@contextmanager
def channels_last(module: nn.Module) -> Iterator[None]:
    """Inside: weights of convolutions lie channels last, and so does all that follows them: pooling is then eight times faster."""
    before = [(parameter, parameter.data) for parameter in module.parameters() if parameter.ndim == 4]
    for parameter, data in before:
        parameter.data = data.clone(memory_format=torch.channels_last)  # of one channel, contiguous would leave both orders
    try:
        yield
    finally:
        for parameter, data in before:
            parameter.data = data
