"""The wide residual network of Madry et al. 2018."""

import torch
from torch import Tensor, nn

from demur.errors import DemurError
from demur.networks.registry import register


class Standardized(nn.Module):
    """Subtract each image's mean and divide by its deviation, as TensorFlow does.

    The deviation counts as at least 1 / sqrt(number of values of the image).

    Examples
    --------
    >>> float(Standardized()(torch.rand(1, 3, 8, 8)).mean().abs()) < 1e-6
    True
    """

    def forward(self, images: Tensor) -> Tensor:
        """Standardize images of shape (N, C, H, W)."""
        least = images[0].numel() ** -0.5
        deviation = images.std((1, 2, 3), keepdim=True, correction=0).clamp(min=least)
        return (images - images.mean((1, 2, 3), keepdim=True)) / deviation


class _WideUnit(nn.Module):
    """Two convolutions and a shortcut; the shortcut is averaged and zero-padded where needed."""

    def __init__(self, before: int, after: int, stride: int, activate_first: bool) -> None:
        super().__init__()
        self.stride = stride
        self.more = after - before
        self.activate_first = activate_first
        self.first_norm = _batch_norm(before)
        self.second_norm = _batch_norm(after)
        self.first = nn.Conv2d(before, after, 3, stride, padding=1, bias=False)
        self.second = nn.Conv2d(after, after, 3, padding=1, bias=False)

    def forward(self, values: Tensor) -> Tensor:
        """(n, before, h, w) to (n, after, h / stride, w / stride)."""
        active = _leaky(self.first_norm(values))
        shortcut = active if self.activate_first else values
        inner = self.second(_leaky(self.second_norm(self.first(active))))
        if self.stride > 1:
            shortcut = nn.functional.avg_pool2d(shortcut, self.stride)
        if self.more:
            below = self.more // 2
            shortcut = nn.functional.pad(shortcut, (0, 0, 0, 0, below, self.more - below))
        return torch.as_tensor(inner + shortcut)


def _batch_norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.1)


def _leaky(values: Tensor) -> Tensor:
    return nn.functional.leaky_relu(values, 0.1)


def _groups(widen: int, units: int) -> list[nn.Module]:
    """Three groups of `units` units with 16, 32 and 64 times `widen` channels."""
    layers: list[nn.Module] = []
    before = 16
    for group, after in enumerate((16 * widen, 32 * widen, 64 * widen)):
        for unit in range(units):
            stride = 2 if group and not unit else 1
            layers.append(_WideUnit(before, after, stride, activate_first=not group and not unit))
            before = after
    return layers


@register
def wide_resnet(
    num_outputs: int = 10,
    *,
    channels: int = 3,
    size: int = 32,
    widen: int = 10,
    units: int = 5,
    seed: int = 0,
) -> nn.Sequential:
    """Build the residual network w32-10 of Madry et al. 2018 for CIFAR-10.

    The localized-adversarial-training paper reports the natural accuracy of this network. It has a
    3x3 convolution of 16 filters, three groups of `units` units with 16, 32 and 64 times `widen`
    channels, and the mean over the image. Weights of convolutions are drawn with deviation
    sqrt(2 / (9 * outputs)). The defaults give 46 million weights.

    Parameters
    ----------
    num_outputs : int, default=10
        Number of scores, at least 2.
    channels : int, default=3
        Channels of the images.
    size : int, default=32
        Pixels a side, divisible by 4.
    widen : int, default=10
        Factor of the number of channels.
    units : int, default=5
        Residual units in each group.
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
    >>> wide_resnet(10, widen=1, units=1)(torch.rand(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """
    if num_outputs < 2 or size < 4 or size % 4 or min(channels, widen, units) < 1:
        raise DemurError(
            "the wide network needs at least 2 outputs, a size divisible by 4, and at least 1 for "
            f"channels, widen and units; got {num_outputs}, {size}, {channels}, {widen}, {units}."
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        first = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        groups = _groups(widen, units)
        last = nn.Linear(64 * widen, num_outputs)
        network = nn.Sequential(
            Standardized(),
            first,
            *groups,
            _batch_norm(64 * widen),
            nn.LeakyReLU(0.1),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            last,
        )
        for layer in network.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, std=(2 / (9 * layer.out_channels)) ** 0.5)
        bound = (3 / last.in_features) ** 0.5  # TensorFlow's uniform unit scaling
        nn.init.uniform_(last.weight, -bound, bound)
        nn.init.zeros_(last.bias)
    return network
