"""Descriptions of classifiers and networks as JSON, for bundles."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn

from demur import networks
from demur.classifier import Classifier, Preprocess, Provenance
from demur.defenses.base import Defense
from demur.errors import DemurError
from demur.networks.adapted import AdaptedNetwork

PLAIN: Final = "Classifier"
"""The kind of a classifier without a defence."""
IMAGES: Final = "provenance.images"
"""The tensor of the hashes of the images that a model was made with."""


def described(module: nn.Module) -> dict[str, Any] | None:
    """Describe a classifier or network, or None if demur does not know how to build it."""
    if isinstance(module, Defense):
        module._check_fitted()
        parts = {name: module.get_submodule(path) for name, path in module.places.items()}
        parameters = module.hyperparameters()
        learned = module.learned()
    elif type(module) is Classifier:
        parts = {"network": module.module}
        parameters = {}
        learned = {}
    elif type(module) is AdaptedNetwork:
        return {
            "adapted": {
                "mean": None if module.mean is None else module.mean.tolist(),
                "std": None if module.std is None else module.std.tolist(),
                "reject_column": module.reject_column,
            },
            "network": described(module.network),
        }
    else:
        return _architecture(module)
    return {
        "kind": type(module).__name__,
        "num_classes": module.num_classes,
        "rejects": module._columns.value,
        "threshold": module._threshold,
        "parameters": parameters,
        **{name: described(network) for name, network in parts.items()},
        "fitted": learned,
    }


def leaf_of(module: nn.Module) -> nn.Module:
    """Give the network inside classifiers, defences and their adapters.

    Examples
    --------
    >>> network = nn.Flatten()
    >>> leaf_of(Classifier(AdaptedNetwork(network), 2)) is network
    True
    """
    if isinstance(module, Defense):
        return leaf_of(module.network)
    if isinstance(module, Classifier):
        return leaf_of(module.module)
    return leaf_of(module.network) if isinstance(module, AdaptedNetwork) else module


def _architecture(module: nn.Module) -> dict[str, Any] | None:
    """Describe a network that `demur.networks` builds. Of another network, only a changed head is
    known, or None. The same goes for a network whose layers were changed.
    """
    found: Any = getattr(module, "architecture", None)
    if found is None:
        head = getattr(module, "changed_head", None)
        return None if head is None else {"head": dict(head)}
    try:
        again = blank(found)
    except DemurError:
        return None
    return dict(found) if repr(again) == repr(module) else None


def blank(architecture: Mapping[str, Any]) -> nn.Module:
    """Build a network without memory for its weights, where that is possible."""
    try:
        with torch.device("meta"):
            return networks.build(architecture)
    except DemurError:
        # A few builders read numbers from tensors, which the device "meta" does not hold.
        return networks.build(architecture)


def about(classifier: Classifier) -> dict[str, Any]:
    """Give what a bundle says of the whole classifier: class names, preprocessing, provenance.

    Names and preprocessing that are not set are those of a classifier inside.
    """
    inner = [one for one in classifier.modules() if isinstance(one, Classifier)]
    same = [one for one in inner if one.num_classes == classifier.num_classes]
    names = next((one.class_names for one in same if one.class_names is not None), None)
    preprocess = next((one.preprocess for one in inner if one.preprocess is not None), None)
    provenance = classifier.provenance
    known = None
    if provenance is not None:
        known = {
            field.name: getattr(provenance, field.name)
            for field in dataclasses.fields(provenance)
            if field.name != "images"
        }
    return {
        "class_names": None if names is None else list(names),
        "preprocess": None if preprocess is None else dataclasses.asdict(preprocess),
        "provenance": known,
    }


def hashes_to_tensor(hashes: Sequence[str]) -> Tensor:
    """Store hashes of 16 hexadecimal digits, as uint8 (n, 8)."""
    data = bytearray.fromhex("".join(hashes))
    if not data:
        return torch.zeros(0, 8, dtype=torch.uint8)
    return torch.frombuffer(data, dtype=torch.uint8).view(-1, 8).clone()


def set_about(classifier: Classifier, config: Mapping[str, Any], images: Tensor | None) -> None:
    """Set class names, preprocessing and provenance of a classifier from the config of a bundle.

    Raises
    ------
    DemurError
        If a value does not fit.
    """
    names = config.get("class_names")
    if names is not None:
        texts = isinstance(names, list) and all(isinstance(one, str) for one in names)
        if not texts or len(names) != classifier.num_classes:
            raise DemurError(f"class_names must be {classifier.num_classes} names.")
        classifier.class_names = tuple(names)
    preprocess = config.get("preprocess")
    if preprocess is not None:
        classifier.preprocess = _preprocess(preprocess)
    provenance = config.get("provenance")
    if provenance is not None:
        parts = {field.name for field in dataclasses.fields(Provenance)} - {"request", "images"}
        fits = isinstance(provenance, dict) and set(provenance) == parts | {"request"}
        if not fits or not all(isinstance(provenance[name], str) for name in parts):
            raise DemurError("its provenance has other parts than this version writes.")
        if not isinstance(provenance["request"], dict):
            raise DemurError("the request of its provenance must be a JSON object.")
        classifier.provenance = Provenance(**provenance, images=_hashes(images))


def _hashes(images: Tensor | None) -> tuple[str, ...]:
    if images is None:
        return ()
    if images.dtype != torch.uint8 or images.ndim != 2 or images.shape[1] != 8:
        raise DemurError(f"{IMAGES} must be uint8 of shape (n, 8), not {tuple(images.shape)}.")
    text = images.numpy().tobytes().hex()
    return tuple(text[start : start + 16] for start in range(0, len(text), 16))


def _preprocess(value: object) -> Preprocess:
    """Make a preprocessing of JSON. Its numbers may come from an untrusted source."""
    names = {field.name for field in dataclasses.fields(Preprocess)}
    if not isinstance(value, dict) or set(value) != names:
        raise DemurError(f"preprocess must have the parts {', '.join(sorted(names))}.")
    size = value["size"]
    sizes = [] if size is None else size
    whole = isinstance(sizes, list) and len(sizes) in (0, 2)
    integers = [*sizes, value["channels"], *([value["resize"]] if value["resize"] else [])]
    if not whole or not all(type(one) is int and 0 < one <= 1 << 14 for one in integers):
        raise DemurError("preprocess needs sizes between 1 and 16,384 pixels.")
    if not isinstance(value["interpolation"], str):
        raise DemurError("the interpolation of preprocess must be a text.")
    numbers = (numbers_of(value["mean"], "mean"), numbers_of(value["std"], "std"))
    return Preprocess(
        size=None if size is None else (size[0], size[1]),
        resize=value["resize"],
        interpolation=value["interpolation"],
        mean=numbers[0],
        std=numbers[1],
        channels=value["channels"],
    )


def numbers_of(value: object, name: str) -> tuple[float, ...]:
    """Give a list of JSON as finite numbers, at most 64; None is the empty list."""
    values = [] if value is None else value
    if (
        not isinstance(values, list)
        or len(values) > 64
        or not all(type(one) in (int, float) and math.isfinite(one) for one in values)
    ):
        raise DemurError(f"{name} must be a list of finite numbers.")
    return tuple(float(one) for one in values)
