"""Networks of timm and torchvision, without weights: from a name, a number of columns, options.

A bundle describes such a network by these three. Nothing in a description is executed: names are
looked up among those that the library knows, and options are plain values.
"""

import json
from collections.abc import Mapping
from importlib import import_module
from typing import Any, Final

import torch
from torch import nn
from torchvision import models
from torchvision.models import get_model_builder, list_models

from demur.errors import DemurError, one_line
from demur.networks.registry import register

OWN: Final = (
    *("weights", "pretrained", "num_classes", "checkpoint_path", "pretrained_cfg", "progress"),
    *("pretrained_cfg_overlay", "cache_dir"),
)
"""Arguments of the libraries' builders that demur sets itself, or that lead to a download."""


def timm() -> Any:
    """Import timm. Raise DemurError if it is not installed."""
    try:
        return import_module("timm")
    except ImportError as error:
        raise DemurError(
            "models of timm need the package timm: pip install 'demur[audit]'."
        ) from error


@register
def timm_network(name: str, num_outputs: int, options: Mapping[str, Any]) -> nn.Module:
    """Build one of timm's networks with random weights.

    Parameters
    ----------
    name : str
        ``ARCHITECTURE`` or ``ARCHITECTURE.TAG``.
    num_outputs : int
        Columns of the scores.
    options : mapping
        Further arguments of ``timm.create_model``.

    Returns
    -------
    nn.Module
        Normalised images (N, C, H, W) to scores (N, num_outputs).

    Raises
    ------
    DemurError
        If timm is not installed, has no such network, or an option is not allowed.

    Examples
    --------
    >>> timm_network("resnet18", 10, {}).fc.out_features
    10
    """
    library = timm()
    if not library.is_model(name.partition(".")[0]):
        raise DemurError(f"timm has no model {one_line(name, 80)!r}.")
    _check_options(options)
    with torch.random.fork_rng(devices=[]):
        network: nn.Module = library.create_model(
            name, pretrained=False, num_classes=num_outputs, **options
        )
    return network


@register
def torchvision_network(name: str, num_outputs: int, options: Mapping[str, Any]) -> nn.Module:
    """Build one of torchvision's classifiers with random weights.

    Parameters
    ----------
    name : str
    num_outputs : int
        Columns of the scores.
    options : mapping
        Further arguments of torchvision's function.

    Returns
    -------
    nn.Module
        Normalised images (N, 3, H, W) to scores (N, num_outputs).

    Raises
    ------
    DemurError
        If torchvision has no such classifier, or an option is not allowed.

    Examples
    --------
    >>> torchvision_network("squeezenet1_1", 10, {}).num_classes
    10
    """
    if name not in list_models(module=models):
        raise DemurError(f"torchvision has no classifier {one_line(name, 80)!r}.")
    _check_options(options)
    with torch.random.fork_rng(devices=[]):
        network: nn.Module = get_model_builder(name)(
            weights=None, num_classes=num_outputs, **options
        )
    return network


def describe(
    network: nn.Module, builder: str, name: str, num_outputs: int, options: Mapping[str, Any]
) -> None:
    """Let a network of a library say how it was built, so that a bundle can describe it.

    Parameters
    ----------
    network : nn.Module
    builder : {"timm_network", "torchvision_network"}
    name, num_outputs, options
        Arguments of the builder. Where an option is no plain value, the network stays without a
        description.
    """
    arguments = {"name": name, "num_outputs": num_outputs, "options": dict(options)}
    try:
        plain = json.loads(json.dumps(arguments, allow_nan=False))
        _check_options(plain["options"])
    except (TypeError, ValueError):
        return
    described: Any = {"name": builder, "arguments": plain}
    network.architecture = described


def _check_options(options: Mapping[str, Any]) -> None:
    for name, value in options.items():
        values = value if isinstance(value, list | tuple) else [value]
        plain = all(isinstance(one, str | int | float | bool | None) for one in values)
        if name in OWN or not plain:
            raise DemurError(f"a network of a library takes no option {one_line(name, 40)!r}.")
