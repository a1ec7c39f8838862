"""Networks for certified training: strided convolutions with batch normalisation, no pooling."""

import math

import torch
from torch import nn

from demur.errors import DemurError
from demur.networks.registry import register


@register
def certified_cnn(
    num_outputs: int = 10, *, channels: int = 1, size: int = 28, seed: int = 0
) -> nn.Sequential:
    """Build a small network for certified training on a CPU.

    Two convolutions of 32 and 64 filters, 4x4 with stride 2, a dense layer of 512, and the output.
    Batch normalisation and a rectifier follow each layer but the last.

    Parameters
    ----------
    num_outputs : int, default=10
        Number of scores, at least 2.
    channels : int, default=1
        Channels of the images.
    size : int, default=28
        Pixels a side, divisible by 4.
    seed : int, default=0
        The initial weights depend on it alone: see `certified_weights`.

    Returns
    -------
    nn.Sequential
        The network, in training mode: images (N, C, H, W) in [0, 1] to scores (N, num_outputs).

    Raises
    ------
    DemurError
        For numbers outside these ranges.

    Examples
    --------
    >>> certified_cnn(10)(torch.rand(2, 1, 28, 28)).shape
    torch.Size([2, 10])
    """
    _check(num_outputs, channels, size, 4)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = nn.Sequential(
            *_convolution(channels, 32, 4, 2),
            *_convolution(32, 64, 4, 2),
            nn.Flatten(),
            *_dense(64 * (size // 4) ** 2, 512),
            nn.Linear(512, num_outputs),
        )
        certified_weights(network)
    return network


@register
def certified_cnn7(
    num_outputs: int = 10, *, channels: int = 3, size: int = 32, seed: int = 0
) -> nn.Sequential:
    """Build the seven-layer network of certified training (Shi et al. 2021), for a GPU.

    Five 3x3 convolutions of 64, 64, 128, 128 and 128 filters, the third with stride 2, a dense
    layer of 512, and the output. Batch normalisation and a rectifier follow each layer but the
    last.

    Parameters
    ----------
    num_outputs, channels, size, seed
        As for `certified_cnn`. The size is even.

    Returns
    -------
    nn.Sequential

    Examples
    --------
    >>> certified_cnn7(10, size=8)(torch.rand(2, 3, 8, 8)).shape
    torch.Size([2, 10])
    """
    _check(num_outputs, channels, size, 2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = nn.Sequential(
            *_convolution(channels, 64, 3, 1),
            *_convolution(64, 64, 3, 1),
            *_convolution(64, 128, 3, 2),
            *_convolution(128, 128, 3, 1),
            *_convolution(128, 128, 3, 1),
            nn.Flatten(),
            *_dense(128 * (size // 2) ** 2, 512),
            nn.Linear(512, num_outputs),
        )
        certified_weights(network)
    return network


def certified_weights(network: nn.Module) -> None:
    """Draw the initial weights of certified training, in place, from torch's global generator.

    Weights of dense layers and convolutions are N(0, sqrt(2 pi) / fan_in) and biases 0 (Shi et al.
    2021, sec. 3.1): intervals then keep their width from layer to layer.

    Examples
    --------
    >>> layer = nn.Linear(400, 100)
    >>> certified_weights(layer)
    >>> bool(abs(float(layer.weight.detach().std()) - 2.5066 / 400) < 3e-4)
    True
    """
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            fan_in = layer.weight[0].numel()
            nn.init.normal_(layer.weight, std=math.sqrt(2 * math.pi) / fan_in)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def _convolution(before: int, after: int, kernel: int, stride: int) -> list[nn.Module]:
    layer = nn.Conv2d(before, after, kernel, stride, padding=1)
    return [layer, nn.BatchNorm2d(after), nn.ReLU()]


def _dense(before: int, after: int) -> list[nn.Module]:
    return [nn.Linear(before, after), nn.BatchNorm1d(after), nn.ReLU()]


def _check(num_outputs: int, channels: int, size: int, divisor: int) -> None:
    if num_outputs < 2 or channels < 1 or size < 4 or size % divisor:
        raise DemurError(
            "a network for certified training needs at least 2 outputs and 1 channel, and a size "
            f"of at least 4 that {divisor} divides, not {num_outputs}, {channels} and {size}."
        )
