"""The networks of the papers, layer by layer."""

import torch
from torch import Tensor, nn

from demur.errors import DemurError


class Centre(nn.Module):
    """Shift pixels from [0, 1] to [-0.5, 0.5], the range of the background-class paper; the attacks never see it."""

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W), shifted."""
        return images - 0.5


def background_class_network(num_outputs: int, *, channels: int = 1, size: int = 28, seed: int = 0) -> nn.Sequential:
    """Build the network of the background-class paper (Table II), with 10 outputs, or 11 with the background class.

    It is the MNIST example of Keras with batch normalisation for dropout: valid padding, so 9,216 features at 28x28;
    "MaxOut 2x2" is max-pooling, and the logits are batch-normalised. What the paper leaves out is as in Keras: Glorot's
    uniform weights, biases of 0, an epsilon of .001. Only the batch statistics are averaged with .9 where Keras has .99: that
    lags behind the weights, and needs the paper's 39,000 steps to catch up. The rectifier stands after the pooling, with which
    it commutes, because there it has a quarter of the work. The initial weights depend on `seed` alone.
    """
    if size < 6 or size % 2:
        raise DemurError(f"the background-class network needs images of an even size of at least 6 pixels, not {size}.")
    if num_outputs < 2 or channels < 1:
        raise DemurError(f"the background-class network needs at least 2 outputs and 1 channel, not {num_outputs} and {channels}.")
    eps, momentum = 1e-3, 0.1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = nn.Sequential(
            Centre(),
            nn.Conv2d(channels, 32, 3),
            nn.BatchNorm2d(32, eps, momentum),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3),
            nn.BatchNorm2d(64, eps, momentum),
            nn.MaxPool2d(2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(64 * ((size - 4) // 2) ** 2, 128),
            nn.BatchNorm1d(128, eps, momentum),
            nn.ReLU(),
            nn.Linear(128, num_outputs),
            nn.BatchNorm1d(num_outputs, eps, momentum),
        )
        for layer in network:
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
    return network


def rejection_network(num_outputs: int = 10, *, channels: int = 1, size: int = 28, seed: int = 0) -> nn.Sequential:
    """Build the MNIST network of the rejection paper (Table 1), which is that of Carlini & Wagner 2017 with padding.

    Conv32-Conv32-Pool-Conv64-Conv64-Pool-FC200-FC200, all convolutions 3x3 with padding 1, rectifiers after each, dropout of one half
    after the first dense layer (as in Carlini & Wagner's code; the paper does not say where). The paper draws the filters of convolutions
    from a normal distribution: Keras' is N(0, .05). Of dense layers it says nothing: Keras' default is Glorot's uniform one; with
    N(0, .05) there, too, training at the paper's rate of .1 sometimes ends at chance. The initial weights depend on `seed` alone.
    """
    if num_outputs < 2 or size < 4 or size % 4:
        raise DemurError(f"the rejection network needs 2 outputs or more and a size divisible by 4, not {num_outputs} and {size}.")

    def double(before: int, after: int) -> list[nn.Module]:
        first, second = nn.Conv2d(before, after, 3, padding=1), nn.Conv2d(after, after, 3, padding=1)
        return [first, nn.ReLU(), second, nn.ReLU(), nn.MaxPool2d(2)]

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = nn.Sequential(
            *double(channels, 32),
            *double(32, 64),
            nn.Flatten(),
            nn.Linear(64 * (size // 4) ** 2, 200),
            nn.ReLU(),
            nn.Dropout(0.5),
            nn.Linear(200, 200),
            nn.ReLU(),
            nn.Linear(200, num_outputs),
        )
        for layer in network:
            if isinstance(layer, nn.Conv2d | nn.Linear):
                if isinstance(layer, nn.Conv2d):
                    nn.init.normal_(layer.weight, std=0.05)
                else:
                    nn.init.xavier_uniform_(layer.weight)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
    return network


def localized_network(num_outputs: int = 10, *, channels: int = 1, size: int = 28, seed: int = 0) -> nn.Sequential:
    """Build the network of the localized paper: "two convolutional layers, a fully connected layer, and an output layer".

    It is that of Madry et al. 2018 for MNIST, whose number of training steps and eps the paper has: Conv5x5-32, Pool, Conv5x5-64,
    Pool, FC1024, output; weights from a normal distribution of deviation .1, cut off at two deviations, and biases of .1. The
    initial weights depend on `seed` alone.
    """
    if num_outputs < 2 or size < 4 or size % 4:
        raise DemurError(f"the localized network needs 2 outputs or more and a size divisible by 4, not {num_outputs} and {size}.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = nn.Sequential(
            nn.Conv2d(channels, 32, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(64 * (size // 4) ** 2, 1024),
            nn.ReLU(),
            nn.Linear(1024, num_outputs),
        )
        for layer in network:
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.1, a=-0.2, b=0.2)
                if layer.bias is not None:
                    nn.init.constant_(layer.bias, 0.1)
    return network


class Standardized(nn.Module):
    """Each image less its mean, over its deviation (1 / sqrt(number of values) at the least): as TensorFlow has it."""

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W), standardized."""
        deviation = images.std((1, 2, 3), keepdim=True, correction=0).clamp(min=images[0].numel() ** -0.5)
        return (images - images.mean((1, 2, 3), keepdim=True)) / deviation


class _WideUnit(nn.Module):
    """Two convolutions beside a shortcut; a wider unit's shortcut is averaged down, and padded with channels of 0."""

    def __init__(self, before: int, after: int, stride: int, activate_first: bool) -> None:
        super().__init__()
        self.stride, self.more, self.activate_first = stride, after - before, activate_first
        self.first_norm, self.second_norm = _batch_norm(before), _batch_norm(after)
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
            shortcut = nn.functional.pad(shortcut, (0, 0, 0, 0, self.more // 2, self.more - self.more // 2))
        return torch.as_tensor(inner + shortcut)


def _batch_norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.1)


def _leaky(values: Tensor) -> Tensor:
    return nn.functional.leaky_relu(values, 0.1)


def wide_network(num_outputs: int = 10, *, channels: int = 3, size: int = 32, widen: int = 10, units: int = 5, seed: int = 0) -> nn.Module:
    """Build the residual network of Madry et al. 2018 for CIFAR-10, w32-10, whose natural accuracy the localized paper has.

    Conv3x3-16, three groups of `units` units with 16, 32 and 64 times `widen` channels, and the mean over the image. Convolutions
    begin with deviation sqrt(2 / (9 outputs)). 46 million weights as it is; a smaller `widen` or `units` makes a smaller one. The
    initial weights depend on `seed` alone.
    """
    if num_outputs < 2 or size < 4 or size % 4 or min(widen, units) < 1:
        raise DemurError(f"the wide network needs 2 outputs or more and a size divisible by 4, not {num_outputs} and {size}.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers: list[nn.Module] = [Standardized(), nn.Conv2d(channels, 16, 3, padding=1, bias=False)]
        before = 16
        for group, after in enumerate((16 * widen, 32 * widen, 64 * widen)):
            for unit in range(units):
                layers.append(_WideUnit(before, after, 2 if group and not unit else 1, activate_first=not group and not unit))
                before = after
        last = nn.Linear(before, num_outputs)
        network = nn.Sequential(*layers, _batch_norm(before), nn.LeakyReLU(0.1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), last)
        for layer in network.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, std=(2 / (9 * layer.out_channels)) ** 0.5)
        bound = (3 / last.in_features) ** 0.5  # TensorFlow's uniform unit scaling
        nn.init.uniform_(last.weight, -bound, bound)
        nn.init.zeros_(last.bias)
    return network
