"""The state of a classifier while it is attacked.

One thread attacks at a time, others wait: an attack freezes and lays out weights, widens kernels,
and seeds the random state of the process (D8).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import RLock

import torch
from torch import nn

from demur.classifier import evaluating
from demur.errors import DemurError

_ONE_AT_A_TIME = RLock()


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Inside: evaluation mode, and parameters without gradients, which halves the backward pass."""
    with _ONE_AT_A_TIME, evaluating(module):
        # Weights that were made in inference mode cannot be changed outside of it.
        learning = [
            one for one in module.parameters() if one.requires_grad and not one.is_inference()
        ]
        for parameter in learning:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in learning:
                parameter.requires_grad_(True)


@contextmanager
def channels_last(module: nn.Module) -> Iterator[None]:
    """Inside: weights of convolutions are stored channels last, and so is what follows them.

    Pooling is then up to eight times as fast.
    """
    before = [
        (parameter, parameter.data)
        for parameter in module.parameters()
        if parameter.ndim == 4 and not parameter.is_inference()
    ]
    for parameter, data in before:
        # A clone: with one input channel, a contiguous call would leave both orders.
        parameter.data = data.clone(memory_format=torch.channels_last)
    try:
        yield
    finally:
        for parameter, data in before:
            parameter.data = data


class KernelMachine(nn.Module):
    """Base class of modules whose gradients can be those of wider kernels; see `wider_kernels`.

    Attributes
    ----------
    wider_kernels : float in (0, 1]
        What gamma is multiplied by in the gradients. The scores ignore it.
    """

    wider_kernels: float = 1.0


def kernel_machines(classifier: nn.Module) -> list[KernelMachine]:
    """Give the parts of a classifier whose gradients can be widened."""
    return [module for module in classifier.modules() if isinstance(module, KernelMachine)]


@contextmanager
def wider_kernels(classifier: nn.Module, factor: float) -> Iterator[None]:
    """Inside, gradients through kernels are those of kernels with `factor` times the gamma.

    Scores and decisions do not change. A kernel machine is flat far from its support vectors, and
    an attack on it is blind (R14, R18): wider kernels still point the way. This sets the attribute
    `wider_kernels` of every `KernelMachine` of the classifier, such as `OneVsRestRBFSVM`.

    Parameters
    ----------
    classifier : Module
    factor : float in (0, 1]

    Raises
    ------
    DemurError
        If the factor is out of range.

    Examples
    --------
    >>> import torch
    >>> from demur.attacks import wider_kernels
    >>> with wider_kernels(torch.nn.Linear(2, 2), 0.1):
    ...     pass
    """
    if not 0 < factor <= 1:
        raise DemurError(f"kernels are widened by a factor in (0, 1], not {factor}.")
    with _ONE_AT_A_TIME:
        before = [(machine, machine.wider_kernels) for machine in kernel_machines(classifier)]
        try:
            for machine, _ in before:
                machine.wider_kernels = factor
            yield
        finally:
            for machine, value in before:
                machine.wider_kernels = value
