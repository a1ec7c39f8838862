"""Networks for ImageNet's 1,000 classes, with their preprocessing inside."""

import ast
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import models

from demur.errors import DemurError, unknown
from demur.networks import weights
from demur.networks.registry import register

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Architecture:
    """One of torchvision's networks.

    Parameters
    ----------
    build : callable
        torchvision's function that builds the network.
    size : int
        Pixels a side of the images that its weights are for.
    resize : int
        Pixels of a photograph's shorter side before the centre of `size` is cropped.
    options : tuple of (str, object)
        Arguments of `build`.

    Examples
    --------
    >>> ARCHITECTURES["inception_v3"].size
    299
    """

    build: Callable[..., nn.Module]
    size: int = 224
    resize: int = 256
    options: tuple[tuple[str, Any], ...] = ()


ARCHITECTURES = {
    # transform_input would normalise a second time. Without it, and with the mean and deviation of
    # .5 that the network was trained with, it is the same network.
    "inception_v3": Architecture(
        models.inception_v3, 299, 342, (("transform_input", False), ("init_weights", False))
    ),
    "vgg16": Architecture(models.vgg16, options=(("init_weights", False),)),
    "resnet18": Architecture(models.resnet18),
    "resnet50": Architecture(models.resnet50),
    "mobilenet_v2": Architecture(models.mobilenet_v2),
    "squeezenet1_0": Architecture(models.squeezenet1_0),
}
"""torchvision's networks that `imagenet_network` knows, by name."""

CLASSES: tuple[str, ...] = tuple(models.ResNet18_Weights.IMAGENET1K_V1.meta["categories"])
"""ImageNet's class names, by class number."""


class ImageNetNetwork(nn.Module):
    """A network with its preprocessing in front.

    Parameters
    ----------
    network : nn.Module
        Normalised images (N, 3, H, W) to scores (N, 1000).
    size : int
        Pixels a side of the images that the network is for.
    resize : int
        Pixels of a photograph's shorter side before the centre of `size` is cropped.
    mean, std : sequence of 3 float
        Mean and deviation of each channel, for images in [0, 1].

    Examples
    --------
    >>> doubling = ImageNetNetwork(nn.Identity(), 224, 256, (0, 0, 0), (0.5, 0.5, 0.5))
    >>> float(doubling(torch.full((1, 3, 2, 2), 0.25)).max())
    0.5
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        network: nn.Module,
        size: int,
        resize: int,
        mean: Sequence[float] = MEAN,
        std: Sequence[float] = STD,
    ) -> None:
        super().__init__()
        self.network = network
        self.size = size
        self.resize = resize
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Compute scores (N, 1000) of images (N, 3, H, W) in [0, 1]."""
        scores = self.network((images - self.mean) / self.std)
        # Inception returns two tensors in training mode.
        return scores if isinstance(scores, Tensor) else scores.logits


@register
def untrained_imagenet_network(
    name: str,
    *,
    size: int,
    resize: int,
    mean: Sequence[float] = MEAN,
    std: Sequence[float] = STD,
    aux_logits: bool | None = None,
) -> ImageNetNetwork:
    """Build one of torchvision's networks with its preprocessing, but without trained weights.

    `networks.build` rebuilds the networks of `imagenet_network` with this function.

    Parameters
    ----------
    name : str
        A key of `ARCHITECTURES`.
    size : int
        Pixels a side of the images that the network is for.
    resize : int
        Pixels of a photograph's shorter side before the crop, at least `size`.
    mean, std : sequence of 3 float
        Mean and deviation of each channel, for images in [0, 1]. Deviations are positive.
    aux_logits : bool, optional
        Whether Inception has its auxiliary classifier. None for every other network.

    Returns
    -------
    ImageNetNetwork
        The network in evaluation mode, with the same initial weights at each call.

    Raises
    ------
    DemurError
        For an unknown name, or numbers outside these ranges.

    Examples
    --------
    >>> network = untrained_imagenet_network("squeezenet1_0", size=64, resize=64)
    >>> network(torch.rand(1, 3, 64, 64)).shape
    torch.Size([1, 1000])
    """
    if name not in ARCHITECTURES:
        raise unknown("ImageNet network", name, ARCHITECTURES)
    if size < 1 or resize < size:
        raise DemurError(f"size must be at least 1 and resize at least size: {size}, {resize}.")
    mean = _three_numbers(mean, "mean")
    std = _three_numbers(std, "std")
    if min(std) <= 0:
        raise DemurError(f"the deviations std must be positive, not {list(std)}.")
    options = dict(ARCHITECTURES[name].options)
    if aux_logits not in ((None, True, False) if name == "inception_v3" else (None,)):
        raise DemurError(
            f"{name} cannot have aux_logits={aux_logits!r}: only inception_v3 has any."
        )
    if name == "inception_v3":
        options["aux_logits"] = aux_logits is not False
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = ARCHITECTURES[name].build(weights=None, **options)
    return ImageNetNetwork(network, size, resize, mean, std).eval()


def imagenet_network(
    name: str, file: str | Path | None = None, root: str | Path | None = None
) -> ImageNetNetwork:
    """Load one of torchvision's networks with trained weights and its preprocessing.

    Parameters
    ----------
    name : str
        A key of `ARCHITECTURES`, for example ``"resnet18"``.
    file : path, optional
        Weights: a state dict in torchvision's layout, as .safetensors or as .pth (read without
        unpickling code). The metadata of a safetensors file may give architecture, input_size, mean
        and std. By default the file in the data root or in torch's cache.
    root : path, optional
        The data root, as in `data.data_root`.

    Returns
    -------
    ImageNetNetwork
        The network in evaluation mode.

    Raises
    ------
    DemurError
        For an unknown name, or weights that do not exist (the message names the command that
        downloads them), are damaged, or belong to another network.

    Examples
    --------
    >>> imagenet_network("resnet18")(images)  # doctest: +SKIP
    """
    if name not in ARCHITECTURES:
        raise unknown("ImageNet network", name, ARCHITECTURES)
    path = weights.wanted(name, root) if file is None else Path(file)
    state, about = weights.read(path)
    said = about.get("architecture", name)
    if said != name:
        raise DemurError(f"{path} has the weights of {said}, not of {name}.")
    inception = name == "inception_v3"
    mean = (0.5, 0.5, 0.5) if inception else MEAN
    std = (0.5, 0.5, 0.5) if inception else STD
    try:
        size = int(about.get("input_size", ARCHITECTURES[name].size))
        network = untrained_imagenet_network(
            name,
            size=size,
            resize=max(size, ARCHITECTURES[name].resize),
            mean=ast.literal_eval(about["mean"]) if "mean" in about else mean,
            std=ast.literal_eval(about["std"]) if "std" in about else std,
            aux_logits=any(key.startswith("AuxLogits") for key in state) if inception else None,
        )
    except Exception as error:  # of the metadata, which literal_eval reads
        reason = str(error).rstrip(".")[:160]
        raise DemurError(f"the metadata of {path} are not usable: {reason}.") from error
    weights.load_into(network.network, state, path, name)
    return network


def _three_numbers(values: Sequence[float], name: str) -> tuple[float, float, float]:
    try:
        red, green, blue = (float(value) for value in values)
    except (TypeError, ValueError) as error:
        raise DemurError(f"{name} must be three numbers, not {str(values)[:80]!r}.") from error
    if not all(map(math.isfinite, (red, green, blue))):
        raise DemurError(f"{name} must be three finite numbers, not {[red, green, blue]}.")
    return (red, green, blue)


def wordnet_ids() -> list[str]:
    """Give the WordNet id of each of ImageNet's classes, by class number.

    Examples
    --------
    >>> wordnet_ids()[1]
    'n01443537'
    """
    text = files(__package__).joinpath("imagenet_wnids.txt").read_text(encoding="utf-8")
    return text.split()


def class_number(name: str | int) -> int:
    """Find one of ImageNet's classes, ignoring case.

    Parameters
    ----------
    name : str or int
        Its number, its WordNet id (``n01443537``) or its name (``goldfish``). Two names stand for
        two classes each; the first one is given.

    Returns
    -------
    int
        The class number, 0 to 999.

    Raises
    ------
    DemurError
        For anything else. The message offers the nearest names.

    Examples
    --------
    >>> class_number("goldfish")
    1
    """
    text = str(name).strip().lower()
    if text.isdecimal():
        number = int(text) if len(text) < 10 else len(CLASSES)
        if number >= len(CLASSES):
            raise DemurError(
                f"there is no class {text[:20]}: ImageNet has 0 to {len(CLASSES) - 1}."
            )
        return number
    wnids = wordnet_ids()
    if text in wnids:
        return wnids.index(text)
    names = [known.lower() for known in CLASSES]
    if text in names:
        return names.index(text)
    near = [CLASSES[names.index(one)] for one in get_close_matches(text, names, n=3, cutoff=0.5)]
    nearest = f" The nearest names: {', '.join(near)}." if near else ""
    raise DemurError(
        f"ImageNet has no class {str(name)!r}: give a number, a WordNet id (n01443537) or a name "
        f"(goldfish).{nearest}"
    )
