"""Models of torchvision: `torchvision:NAME[@WEIGHTS]`."""

import re
from dataclasses import replace
from functools import partial
from typing import Any, Final

from torch import nn
from torchvision import models
from torchvision.models import WeightsEnum, get_model_builder, get_model_weights, list_models

from demur.classifier import Preprocess
from demur.data.messages import printable
from demur.errors import DemurError, unknown
from demur.loading.names import no_such
from demur.loading.preprocessing import from_metadata
from demur.loading.request import Found, ModelRequest
from demur.loading.state_dicts import WeightsFile, read_weights
from demur.loading.zoo import (
    OPTIONS,
    Blueprint,
    built,
    check_columns,
    check_kwargs,
    finished,
    loaded,
    not_downloaded,
)
from demur.networks.libraries import describe

OTHERS: Final = {
    "detection": "a detection model",
    "segmentation": "a segmentation model",
    "video": "a video model",
    "optical_flow": "an optical flow model",
    "quantization": "a quantized model, which has no gradients",
}
"""torchvision's packages of models that cannot be audited."""
AUXILIARY: Final = {"googlenet": "aux1", "inception_v3": "AuxLogits"}
"""Networks from Google, and a part that only some of their weights have."""


def read_torchvision(text: str, request: ModelRequest) -> Found:
    """Make a classifier of one of torchvision's networks.

    Parameters
    ----------
    text : str
        ``NAME`` or ``NAME@WEIGHTS``, for example ``resnet50@IMAGENET1K_V2``.
    request : ModelRequest

    Raises
    ------
    DemurError
        For an unknown name, a model that is no classifier, or weights that are not there.
    """
    request.allow_only("torchvision's models", *OPTIONS)
    check_kwargs(request)
    name, _, member = text.partition("@")
    _check_name(name)
    weights = _weights(name, member)
    label = f"torchvision:{name}"
    base = preprocess_of(weights)
    if request.checkpoint is None:
        network = _downloaded(name, weights, request)
        notes: tuple[str, ...] = (f"The weights are {weights}, from {weights.url}.",)
    else:
        file = read_weights(request.checkpoint, request.allow_pickle)
        options, base = _for_file(name, file, base)
        options |= request.model_kwargs
        build = partial(_built, name, options)
        plan = Blueprint(label, build, len(weights.meta["categories"]), _head)
        network, notes = loaded(plan, _modern(name, file), request)
        said = f"Images are prepared as for {weights}, where the file does not say otherwise."
        notes = (said, *notes)
    _describe(network, name, request)
    return Found(finished(network, base, weights.meta["categories"], request), notes)


def _describe(network: nn.Module, name: str, request: ModelRequest) -> None:
    """Let the network say how it is built again: with the options that its weights set, too."""
    options: dict[str, Any] = dict(request.model_kwargs)
    if name in AUXILIARY:
        options["init_weights"] = False
        options |= {one: getattr(network, one) for one in ("transform_input", "aux_logits")}
    if name.startswith("vit_"):
        options["image_size"] = network.image_size
    head = _last(network)
    if head is not None:
        describe(network, "torchvision_network", name, len(network.get_parameter(head)), options)


def _check_name(name: str) -> None:
    classifiers = list_models(module=models)
    if name in classifiers:
        return
    if name in list_models():
        package = get_model_builder(name).__module__.split(".")[2]
        raise DemurError(
            f"demur audits classifiers; torchvision's {name} is {OTHERS.get(package, package)}."
        )
    raise no_such("torchvision has no classifier", name, classifiers)


def _weights(name: str, member: str) -> WeightsEnum:
    known = get_model_weights(name)
    short = member.rpartition(".")[2] or "DEFAULT"
    if short not in known.__members__:
        raise unknown(f"weights of torchvision's {name}", printable(member, 60), known.__members__)
    weights: WeightsEnum = known[short]
    return weights


def preprocess_of(weights: WeightsEnum) -> Preprocess:
    """Read how torchvision prepares images for some weights."""
    transform = weights.transforms()
    (crop,) = transform.crop_size
    (resize,) = transform.resize_size
    return Preprocess(
        size=(crop, crop),
        resize=resize,
        interpolation=transform.interpolation.value,
        mean=tuple(transform.mean),
        std=tuple(transform.std),
    )


def _downloaded(name: str, weights: WeightsEnum, request: ModelRequest) -> nn.Module:
    """Let torchvision build a network with weights, which it downloads into its cache."""
    label = f"torchvision:{name}"
    check_columns(request, len(weights.meta["categories"]), label)
    builder = get_model_builder(name)
    try:
        return built(label, builder, weights=weights, progress=False, **request.model_kwargs)
    except OSError as error:
        raise not_downloaded(label, weights.url.rpartition("/")[2], weights.url, error) from error


def _built(name: str, options: dict[str, Any], columns: int) -> nn.Module:
    builder = get_model_builder(name)
    return built(f"torchvision:{name}", builder, weights=None, num_classes=columns, **options)


def _for_file(name: str, file: WeightsFile, base: Preprocess) -> tuple[dict[str, Any], Preprocess]:
    """Give torchvision's arguments for the weights of a file, and their preprocessing."""
    options: dict[str, Any] = {}
    if name in AUXILIARY:
        # transform_input would normalise a second time. Without it, and with the mean and
        # deviation of .5 that the network was trained with, it is the same network.
        base = replace(base, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
        part = f".{AUXILIARY[name]}."
        options = {
            "transform_input": False,
            "init_weights": False,
            "aux_logits": any(part in f".{key}" for key in file.state),
        }
    base = from_metadata(file.about, base, file.path)
    if name.startswith("vit_") and base.size is not None:
        options = {"image_size": base.size[0]}
    return options, base


def _head(network: nn.Module) -> str | None:
    """Name the last tensor with a row for each of ImageNet's classes."""
    state = network.state_dict()
    return next(
        (name for name in reversed(state) if len(state[name].shape) and len(state[name]) == 1000),
        None,
    )


def _last(network: nn.Module) -> str | None:
    """Name the weights of the last layer."""
    layers = [
        name
        for name, one in network.named_modules()
        if isinstance(one, nn.Linear | nn.Conv2d) and "aux" not in name.lower()
    ]
    return f"{layers[-1]}.weight" if layers else None


def _modern(name: str, file: WeightsFile) -> WeightsFile:
    """Give the names of today to the layers in torchvision's old files of DenseNet."""
    if not name.startswith("densenet"):
        return file
    old = re.compile(r"(denselayer\d+\.(?:norm|relu|conv))\.([12])\.")
    state = {old.sub(r"\1\2.", key): value for key, value in file.state.items()}
    return replace(file, state=state)
