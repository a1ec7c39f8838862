"""A small network of strided convolutions, which adversarial training on a CPU can afford."""

import torch
from torch import nn

from demur.errors import DemurError
from demur.networks.registry import register


@register
def strided_cnn(
    num_outputs: int = 10, *, channels: int = 1, size: int = 28, seed: int = 0, width: int = 32
) -> nn.Sequential:
    """Build the small network of `certified_cnn` without batch normalisation.

    Two convolutions of `width` and twice as many filters, 4x4 with stride 2, a dense layer of
    16 times as many units, and the output; a rectifier follows each layer but the last. It has two
    convolutions, a dense layer and an output, as the network of the localized paper. Strides
    replace the pooling: a pass has a quarter of the multiplications of `localized_network`. The
    initial weights are torch's defaults. A width of 16 and a dense layer of 100 are the network of
    Wong, Rice & Kolter 2020 for MNIST.

    Parameters
    ----------
    num_outputs : int, default=10
        Number of scores, at least 2.
    channels : int, default=1
        Channels of the images.
    size : int, default=28
        Pixels a side, divisible by 4.
    seed : int, default=0
        The initial weights depend on it alone.
    width : int, default=32
        Filters of the first convolution.

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
    >>> strided_cnn(10)(torch.rand(2, 1, 28, 28)).shape
    torch.Size([2, 10])
    """
    if num_outputs < 2 or size < 4 or size % 4 or min(channels, width) < 1:
        raise DemurError(
            "the strided network needs at least 2 outputs, a size divisible by 4, and at least 1 "
            f"for channels and width; got {num_outputs}, {size}, {channels}, {width}."
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(channels, width, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(2 * width * (size // 4) ** 2, 16 * width),
            nn.ReLU(),
            nn.Linear(16 * width, num_outputs),
        )
