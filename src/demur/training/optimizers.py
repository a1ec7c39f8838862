"""The optimizers of the papers."""

from collections.abc import Callable, Iterable

import torch
from torch import nn


def adadelta(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Make the optimizer of the background-class paper: Adadelta with the defaults of Keras 2017.

    The values are fixed here because Keras and torch have both changed their defaults.

    Parameters
    ----------
    parameters : iterable of nn.Parameter
        What is optimized.

    Returns
    -------
    torch.optim.Adadelta
        With a learning rate of 1, rho of .95 and epsilon of 1e-7.

    Examples
    --------
    >>> adadelta([nn.Parameter(torch.zeros(1))]).defaults["rho"]
    0.95
    """
    return torch.optim.Adadelta(parameters, lr=1.0, rho=0.95, eps=1e-7)


def rejection_sgd(parameters: Iterable[nn.Parameter], rate: float = 0.1) -> torch.optim.Optimizer:
    """Make the optimizer of the deep-neural-rejection paper (Table 2): SGD with momentum .9.

    The learning rate decays as in Keras: after step t it is ``rate / (1 + 1e-6 * t)``.

    Parameters
    ----------
    parameters : iterable of nn.Parameter
        What is optimized.
    rate : float, default=0.1
        Initial learning rate.

    Returns
    -------
    torch.optim.SGD
        It changes its own learning rate after each step.

    Examples
    --------
    >>> rejection_sgd([nn.Parameter(torch.zeros(1))]).defaults["momentum"]
    0.9
    """
    optimizer = torch.optim.SGD(parameters, lr=rate, momentum=0.9)
    return _decaying(optimizer, lambda step: rate / (1 + 1e-6 * step))


def stepwise_sgd(
    parameters: Iterable[nn.Parameter], steps: int, rate: float = 0.1
) -> torch.optim.Optimizer:
    """Make the optimizer of Madry et al. 2018 for CIFAR-10: SGD with a stepwise learning rate.

    Parameters
    ----------
    parameters : iterable of nn.Parameter
        What is optimized.
    steps : int
        Number of steps of the whole training. After a half and after three quarters of them, the
        learning rate falls to a tenth.
    rate : float, default=0.1
        Initial learning rate.

    Returns
    -------
    torch.optim.SGD
        With momentum .9 and weight decay 2e-4. It changes its own learning rate after each step.

    Examples
    --------
    >>> stepwise_sgd([nn.Parameter(torch.zeros(1))], steps=100).defaults["weight_decay"]
    0.0002
    """
    optimizer = torch.optim.SGD(parameters, lr=rate, momentum=0.9, weight_decay=2e-4)
    return _decaying(
        optimizer, lambda step: rate * 0.1 ** ((step >= steps / 2) + (step >= 3 * steps / 4))
    )


def one_cycle_sgd(
    parameters: Iterable[nn.Parameter], steps: int, rate: float = 0.1, warm_up: float = 0.2
) -> torch.optim.Optimizer:
    """Make an optimizer for a short training: SGD whose learning rate rises and falls once.

    The rate rises linearly during the share `warm_up` of the steps and falls linearly to 0 in the
    others (after Smith & Topin 2018, without their change of the momentum).

    Parameters
    ----------
    parameters : iterable of nn.Parameter
        What is optimized.
    steps : int
        Number of steps of the whole training.
    rate : float, default=0.1
        Largest learning rate.
    warm_up : float in (0, 1), default=0.2
        Share of the steps before it.

    Returns
    -------
    torch.optim.SGD
        With Nesterov momentum .9 and weight decay 5e-4. It changes its own learning rate after each
        step.

    Examples
    --------
    >>> optimizer = one_cycle_sgd([nn.Parameter(torch.zeros(1))], steps=100)
    >>> round(optimizer.defaults["lr"], 6)
    0.005
    """
    top = max(1.0, warm_up * steps)

    def at(step: int) -> float:
        return rate * max(0.0, min((step + 1) / top, (steps - step) / (steps - top + 1)))

    optimizer = torch.optim.SGD(
        parameters, lr=at(0), momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    return _decaying(optimizer, at)


def _decaying(
    optimizer: torch.optim.Optimizer, rate: Callable[[int], float]
) -> torch.optim.Optimizer:
    """Set the learning rate after each step, from the number of steps."""

    def decay(*_: object) -> None:
        for group in optimizer.param_groups:
            group["steps"] = group.get("steps", 0) + 1  # in the group: a checkpoint then has it
            group["lr"] = rate(group["steps"])

    optimizer.register_step_post_hook(decay)
    return optimizer
