"""A small residual network for CIFAR-10 that a CPU trains in minutes."""

import torch
from torch import Tensor, nn

from demur.errors import DemurError
from demur.networks.papers import Centre
from demur.networks.registry import register


class Residual(nn.Module):
    """Add what two convolutions make of the values to the values.

    Parameters
    ----------
    channels : int

    Examples
    --------
    >>> Residual(4)(torch.rand(2, 4, 8, 8)).shape
    torch.Size([2, 4, 8, 8])
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(*_block(channels, channels), *_block(channels, channels))

    def forward(self, values: Tensor) -> Tensor:
        """(n, channels, h, w) to the same shape."""
        return torch.as_tensor(values + self.inner(values))


def _block(before: int, after: int, *, pooled: bool = False) -> list[nn.Module]:
    """A convolution, batch norm and rectifier; both follow the pooling, on a quarter of values."""
    convolution = nn.Conv2d(before, after, 3, padding=1, bias=False)
    pooling = [nn.MaxPool2d(2)] if pooled else []
    return [convolution, *pooling, nn.BatchNorm2d(after), nn.ReLU()]


@register
def resnet9(
    num_outputs: int = 10, *, channels: int = 3, size: int = 32, width: int = 32, seed: int = 0
) -> nn.Sequential:
    """Build a residual network of nine layers for small images.

    It follows the ResNet-9 of Page 2018 ("How to train your ResNet", DAWNBench): a convolution of
    `width` filters; one of twice as many with pooling, and a residual unit; one of four times as
    many with pooling; one of eight times as many with pooling, and a residual unit; the maximum
    over the image; a linear layer. Convolutions are 3x3, and batch norm and a rectifier follow
    each. The original has a width of 64; with 32 there are 1.6 million weights.

    Deviations: batch norm and rectifier follow the pooling, on a quarter of the values, and scores
    are not multiplied by .125.

    Parameters
    ----------
    num_outputs : int, default=10
        Number of scores, at least 2.
    channels : int, default=3
        Channels of the images.
    size : int, default=32
        Pixels a side, divisible by 8.
    width : int, default=32
        Filters of the first convolution.
    seed : int, default=0
        The initial weights depend on it alone.

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
    >>> resnet9(10, width=4)(torch.rand(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """
    if num_outputs < 2 or size < 8 or size % 8 or min(channels, width) < 1:
        raise DemurError(
            "the residual network needs at least 2 outputs, a size divisible by 8, and at least 1 "
            f"for channels and width; got {num_outputs}, {size}, {channels}, {width}."
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = nn.Sequential(
            Centre(),
            *_block(channels, width),
            *_block(width, 2 * width, pooled=True),
            Residual(2 * width),
            *_block(2 * width, 4 * width, pooled=True),
            *_block(4 * width, 8 * width, pooled=True),
            Residual(8 * width),
            nn.MaxPool2d(size // 8),
            nn.Flatten(),
            nn.Linear(8 * width, num_outputs),
        )
        for layer in network.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    return network
