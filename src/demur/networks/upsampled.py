"""An ImageNet network for small images, which it enlarges itself."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from demur.errors import DemurError, unknown
from demur.networks.imagenet import ARCHITECTURES, MEAN, STD, ImageNetNetwork
from demur.networks.registry import register

ENLARGED = ("resnet18", "resnet50", "mobilenet_v2")
"""Networks that take images of any size from 32 pixels."""


class Enlarged(ImageNetNetwork):
    """An ImageNet network behind an enlargement of its images.

    The gradient flows through the enlargement, so an attack changes the small image.

    Parameters
    ----------
    network, size, resize, mean, std
        As for `ImageNetNetwork`. Images are enlarged to `size`, bilinear.

    Examples
    --------
    >>> Enlarged(nn.Identity(), 8, 8, (0, 0, 0), (1, 1, 1))(torch.rand(1, 3, 2, 2)).shape
    torch.Size([1, 3, 8, 8])
    """

    def forward(self, images: Tensor) -> Tensor:
        """Compute scores (N, outputs) of images (N, 3, H, W) in [0, 1]."""
        side = (self.size, self.size)
        return super().forward(nn.functional.interpolate(images, side, mode="bilinear"))


@register
def enlarged_imagenet_network(
    name: str,
    num_outputs: int,
    *,
    size: int = 112,
    mean: Sequence[float] = MEAN,
    std: Sequence[float] = STD,
) -> Enlarged:
    """Build one of torchvision's networks for small images of other classes, without weights.

    Parameters
    ----------
    name : {"resnet18", "resnet50", "mobilenet_v2"}
    num_outputs : int
        Number of scores, at least 2.
    size : int, default=112
        Pixels a side that images are enlarged to, at least 32.
    mean, std : sequence of 3 float
        Of each channel, for images in [0, 1].

    Returns
    -------
    Enlarged
        The network in evaluation mode, with the same initial weights at each call.

    Raises
    ------
    DemurError
        For an unknown name, or numbers outside these ranges.

    Examples
    --------
    >>> enlarged_imagenet_network("resnet18", 10, size=32)(torch.rand(1, 3, 8, 8)).shape
    torch.Size([1, 10])
    """
    if name not in ENLARGED:
        raise unknown("network", name, ENLARGED)
    if num_outputs < 2 or size < 32 or len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise DemurError(
            "an enlarged network needs at least 2 outputs, a size of at least 32, and three means "
            f"and positive deviations; got {num_outputs}, {size}, {list(mean)}, {list(std)}."
        )
    options: dict[str, Any] = {"weights": None, "num_classes": num_outputs}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = ARCHITECTURES[name].build(**options)
    return Enlarged(network, size, size, mean, std).eval()
