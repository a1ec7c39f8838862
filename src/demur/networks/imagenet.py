"""Networks for ImageNet's 1,000 classes, with their preprocessing inside, and where their weights come from."""

import ast
from collections.abc import Callable
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

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Architecture:
    """One of torchvision's networks: how it is built, and the size of photographs that its weights are for."""

    build: Callable[..., nn.Module]
    size: int = 224
    resize: int = 256
    options: tuple[tuple[str, Any], ...] = ()


ARCHITECTURES = {
    # transform_input would shift what is normalised already; without it, and with the mean and deviation of .5 that it was trained
    # with, the network is the same.
    "inception_v3": Architecture(models.inception_v3, 299, 342, (("transform_input", False), ("init_weights", False))),
    "vgg16": Architecture(models.vgg16, options=(("init_weights", False),)),
    "resnet18": Architecture(models.resnet18),
    "resnet50": Architecture(models.resnet50),
    "mobilenet_v2": Architecture(models.mobilenet_v2),
    "squeezenet1_0": Architecture(models.squeezenet1_0),
}
CLASSES: tuple[str, ...] = tuple(models.ResNet18_Weights.IMAGENET1K_V1.meta["categories"])
"""ImageNet's class names, by class number."""


class ImageNetNetwork(nn.Module):
    """A network with its preprocessing in front: images (N, 3, H, W) in [0, 1] give scores (N, 1000).

    Attributes:
        size: pixels a side that it is meant for. resize: pixels of a photograph's shorter side, before the middle of `size` is taken.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, size: int, resize: int, mean: tuple[float, ...] = MEAN, std: tuple[float, ...] = STD) -> None:
        super().__init__()
        self.network, self.size, self.resize = network, size, resize
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Scores (N, 1000) of images (N, 3, H, W)."""
        scores = self.network((images - self.mean) / self.std)
        return scores if isinstance(scores, Tensor) else scores.logits  # Inception in training mode gives two


def imagenet_network(name: str, file: str | Path | None = None, root: str | Path | None = None) -> ImageNetNetwork:
    """Give one of ARCHITECTURES with trained weights, in evaluation mode.

    Args:
        name: `resnet18`, ...
        file: weights, a state dict of torchvision's layout (.safetensors, or .pth read without unpickling code). If None, the one in
            the data root, or in torch's cache. A safetensors file may say architecture, input_size, mean and std in its metadata.
        root: the data root, as in `data.data_root`.

    Raises: DemurError for an unknown name, weights that are not there (saying how to get them), damaged or of another network.
    """
    if name not in ARCHITECTURES:
        raise unknown("ImageNet network", name, ARCHITECTURES)
    architecture = ARCHITECTURES[name]
    path = weights.wanted(name, root) if file is None else Path(file)
    state, about = weights.read(path)
    said = about.get("architecture", name)
    if said != name:
        raise DemurError(f"{path} has the weights of {said}, not of {name}.")
    options = dict(architecture.options)
    if name == "inception_v3":
        options["aux_logits"] = any(key.startswith("AuxLogits") for key in state)
    network = architecture.build(weights=None, **options)
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:160]
        raise DemurError(f"{path} has not the weights of {name} ({reason} ...).") from error
    try:
        size = int(about.get("input_size", architecture.size))
    except ValueError as error:
        raise DemurError(f"the metadata of {path} have input_size {about['input_size']!r} where a number of pixels is wanted.") from error
    default = ((0.5,) * 3, (0.5,) * 3) if name == "inception_v3" else (MEAN, STD)
    mean, std = (_numbers(about[key], path) if key in about else other for key, other in zip(("mean", "std"), default, strict=True))
    return ImageNetNetwork(network, size, max(size, architecture.resize), mean, std).eval()


def _numbers(text: str, path: Path) -> tuple[float, ...]:
    try:
        values = ast.literal_eval(text)
        red, green, blue = (float(value) for value in values)
    except (ValueError, SyntaxError, TypeError) as error:
        raise DemurError(f"the metadata of {path} have {text!r} where three numbers are wanted.") from error
    return (red, green, blue)


def class_number(name: str | int) -> int:
    """Find one of ImageNet's classes by its number, its WordNet id (`n01443537`) or its name (`goldfish`), whatever its case.

    Raises: DemurError for anything else, offering the nearest names.
    """
    text = str(name).strip()
    if text.isdecimal():
        if int(text) >= len(CLASSES):
            raise DemurError(f"there is no class {text}: ImageNet's are 0 to {len(CLASSES) - 1}.")
        return int(text)
    wnids = files(__package__).joinpath("imagenet_wnids.txt").read_text(encoding="utf-8").split()
    if text.lower() in wnids:
        return wnids.index(text.lower())
    names = [known.lower() for known in CLASSES]
    if text.lower() in names:
        return names.index(text.lower())  # of the two names that stand for two classes each, the first
    near = [CLASSES[names.index(one)] for one in get_close_matches(text.lower(), names, n=3, cutoff=0.5)]
    said = f" The nearest names: {', '.join(near)}." if near else ""
    raise DemurError(f"ImageNet has no class {text!r}: give a number, a WordNet id (n01443537) or a name (goldfish).{said}")
