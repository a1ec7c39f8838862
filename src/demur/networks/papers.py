"""The networks of the papers, layer by layer."""

import torch
from torch import Tensor, nn

from demur.errors import DemurError
from demur.networks.registry import register


class Centre(nn.Module):
    """Shift pixels from [0, 1] to [-0.5, 0.5], the range of the background-class paper.

    Examples
    --------
    >>> Centre()(torch.tensor([0.0, 1.0]))
    tensor([-0.5000,  0.5000])
    """

    def forward(self, images: Tensor) -> Tensor:
        """Shift images of shape (N, C, H, W)."""
        return images - 0.5


@register
def background_class_network(
    num_outputs: int, *, channels: int = 1, size: int = 28, seed: int = 0, width: int = 32
) -> nn.Sequential:
    """Build the network of the background-class paper (McCoyd & Wagner 2018, Table II).

    It is the MNIST example of Keras with batch normalisation in place of dropout. Convolutions have
    valid padding, so there are 9,216 features at 28x28. "MaxOut 2x2" is max pooling, and the logits
    are batch-normalised. What the paper leaves out is as in Keras: uniform Glorot weights, biases
    of 0, and an epsilon of .001.

    Deviations: batch statistics are averaged with a momentum of .9 in place of Keras' .99, which
    lags behind the weights and needs the paper's 39,000 steps to catch up. The rectifier follows
    the pooling; the two commute, and the rectifier then has a quarter of the work.

    Parameters
    ----------
    num_outputs : int
        Number of scores, at least 2: 10 for digits, 11 with the background class.
    channels : int, default=1
        Channels of the images.
    size : int, default=28
        Pixels a side, even and at least 6.
    seed : int, default=0
        The initial weights depend on it alone.
    width : int, default=32
        Filters of the first convolution; the second has twice as many, and the dense layer four
        times as many. The paper's width is 32.

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
    >>> background_class_network(11).eval()(torch.rand(2, 1, 28, 28)).shape
    torch.Size([2, 11])
    """
    _check("background-class network", num_outputs, channels)
    if width < 1:
        raise DemurError(f"the background-class network needs a width of at least 1, not {width}.")
    if size < 6 or size % 2:
        raise DemurError(
            "the background-class network needs images of an even size of at least 6 pixels, "
            f"not {size}."
        )
    eps = 1e-3
    momentum = 0.1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = nn.Sequential(
            Centre(),
            nn.Conv2d(channels, width, 3),
            nn.BatchNorm2d(width, eps, momentum),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3),
            nn.BatchNorm2d(2 * width, eps, momentum),
            nn.MaxPool2d(2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(2 * width * ((size - 4) // 2) ** 2, 4 * width),
            nn.BatchNorm1d(4 * width, eps, momentum),
            nn.ReLU(),
            nn.Linear(4 * width, num_outputs),
            nn.BatchNorm1d(num_outputs, eps, momentum),
        )
        for layer in network:
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
    return network


@register
def dnr_cnn(
    num_outputs: int = 10, *, channels: int = 1, size: int = 28, seed: int = 0
) -> nn.Sequential:
    """Build the MNIST network of the deep-neural-rejection paper (Sotgiu et al. 2020, Table 1).

    It is the network of Carlini & Wagner 2017 with padding: two convolutions of 32 filters, max
    pooling, two of 64 filters, max pooling, two dense layers of 200, and the output. Convolutions
    are 3x3 with padding 1, and a rectifier follows each layer. Dropout of one half follows the
    first dense layer, as in the code of Carlini & Wagner; the paper does not say where.

    The paper draws the filters of convolutions from a normal distribution; Keras' is N(0, .05). It
    does not mention dense layers. Their weights are Keras' default here, uniform Glorot: with
    N(0, .05), training at the paper's rate of .1 sometimes ends at chance.

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
    >>> dnr_cnn(10)(torch.rand(2, 1, 28, 28)).shape
    torch.Size([2, 10])
    """
    _check("rejection network", num_outputs, channels, size)

    def double(before: int, after: int) -> list[nn.Module]:
        first = nn.Conv2d(before, after, 3, padding=1)
        second = nn.Conv2d(after, after, 3, padding=1)
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


@register
def localized_network(
    num_outputs: int = 10, *, channels: int = 1, size: int = 28, seed: int = 0
) -> nn.Sequential:
    """Build the MNIST network of the localized-adversarial-training paper (Rothberg et al. 2019).

    The paper describes "two convolutional layers, a fully connected layer, and an output layer".
    This is the MNIST network of Madry et al. 2018, from which the paper takes its number of
    training steps and its eps: a 5x5 convolution of 32 filters, max pooling, a 5x5 convolution of
    64 filters, max pooling, a dense layer of 1,024, and the output. Weights are drawn from a normal
    distribution of deviation .1, truncated at two deviations; biases begin at .1.

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
    >>> localized_network(10)(torch.rand(2, 1, 28, 28)).shape
    torch.Size([2, 10])
    """
    _check("localized network", num_outputs, channels, size)
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


def _check(kind: str, num_outputs: int, channels: int, size: int = 4) -> None:
    if num_outputs < 2 or channels < 1:
        raise DemurError(
            f"the {kind} needs at least 2 outputs and 1 channel, not {num_outputs} and {channels}."
        )
    if size < 4 or size % 4:
        raise DemurError(f"the {kind} needs a size divisible by 4, not {size}.")
