"""Models of timm: `timm:NAME`."""

from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn

from demur.classifier import Preprocess
from demur.errors import DemurError
from demur.loading.names import no_such
from demur.loading.preprocessing import PreprocessOverrides, from_metadata, resize_of
from demur.loading.request import Found, ModelRequest
from demur.loading.state_dicts import read_weights
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
from demur.networks import CLASSES
from demur.networks.libraries import describe, timm

HUB = ("huggingface_hub", "httpx", "httpx2", "requests", "urllib3")
"""Packages whose errors mean that a download failed."""


def read_timm(name: str, request: ModelRequest) -> Found:
    """Make a classifier of one of timm's networks.

    Parameters
    ----------
    name : str
        ``ARCHITECTURE`` or ``ARCHITECTURE.TAG``.
    request : ModelRequest

    Raises
    ------
    DemurError
        For an unknown name, a model that gives features, or weights that are not there.
    """
    request.allow_only("timm's models", *OPTIONS)
    check_kwargs(request)
    about = _about(name)
    label = f"timm:{name}"
    options = {**_size_option(about, request), **request.model_kwargs}
    file = None
    notes: tuple[str, ...]
    if request.checkpoint is None:
        network = _downloaded(name, about, options, request)
        notes = (f"The weights are those of {about.architecture}.{about.tag} in timm.",)
    else:
        file = read_weights(request.checkpoint, request.allow_pickle)
        plan = Blueprint(label, partial(_built, name, options), about.num_classes or 1000, _head)
        network, notes = loaded(plan, file, request)
    columns: Any = network.num_classes
    describe(network, "timm_network", name, columns, options)
    base, more = _preprocess(network, request)
    if file is not None:
        base = from_metadata(file.about, base, file.path)
    request = replace(request, preprocess=_with_crop(network, request.preprocess))
    names = _names(network, about)
    return Found(finished(network, base, names, request), (*notes, *more))


def _about(name: str) -> Any:
    """Give timm's description of a model."""
    library = timm()
    architecture = name.partition(".")[0]
    if not library.is_model(architecture):
        known = [*library.list_models(), *library.list_pretrained()]
        raise no_such("timm has no model", name, known)
    try:
        return library.models.get_pretrained_cfg(name, allow_unregistered=False)
    except RuntimeError as error:
        tagged = library.list_pretrained(f"{architecture}.*")
        raise no_such("timm has no weights", name, tagged) from error


def _size_option(about: Any, request: ModelRequest) -> dict[str, Any]:
    """Give timm's argument for another image size, where the network is built for one size."""
    given = request.preprocess
    if not about.fixed_input_size or not isinstance(given, PreprocessOverrides):
        return {}
    return {} if given.img_size is None else {"img_size": given.img_size}


def _built(name: str, options: dict[str, Any], columns: int) -> nn.Module:
    create = timm().create_model
    return built(
        f"timm:{name}", partial(create, name), pretrained=False, num_classes=columns, **options
    )


def _downloaded(name: str, about: Any, options: dict[str, Any], request: ModelRequest) -> nn.Module:
    """Let timm build a network with weights, which it downloads into its cache."""
    label = f"timm:{name}"
    if not about.has_weights:
        raise DemurError(
            f"timm has no weights of {name}: give some as checkpoint=FILE (--checkpoint FILE)."
        )
    if not about.num_classes:
        raise DemurError(f"demur audits classifiers; {label} gives features: it has no classes.")
    check_columns(request, about.num_classes, label)
    try:
        return built(label, partial(timm().create_model, name), pretrained=True, **options)
    except (OSError, DemurError) as error:
        cause = error.__cause__ if isinstance(error, DemurError) else error
        if not isinstance(cause, OSError) and type(cause).__module__.split(".")[0] not in HUB:
            raise
        file, url = about.url.rpartition("/")[2], about.url
        if about.hf_hub_id:
            file = about.hf_hub_filename or "model.safetensors"
            url = f"https://huggingface.co/{about.hf_hub_id}"
        raise not_downloaded(label, file, url, cause) from error


def _preprocess(network: Any, request: ModelRequest) -> tuple[Preprocess, tuple[str, ...]]:
    """Read how timm prepares images for a model."""
    config = timm().data.resolve_model_data_config(network)
    given = request.preprocess
    channels, height, width = config["input_size"]
    size = (height, width)
    notes = []
    resize: int | None = resize_of(size, min(config["crop_pct"], 1.0))
    if config["crop_mode"] == "squash":
        resize = None
    inexact = config["crop_mode"] == "border" or config["crop_pct"] > 1 or height != width
    if inexact or (config["crop_mode"] == "squash" and config["crop_pct"] != 1):
        notes.append(
            f"timm prepares images with crop_mode={config['crop_mode']} and "
            f"crop_pct={config['crop_pct']:g}, which demur only approximates."
        )
    tested = network.pretrained_cfg.get("test_input_size")
    if tested and tuple(tested[1:]) != size and given is None and request.checkpoint is None:
        share = network.pretrained_cfg.get("test_crop_pct") or config["crop_pct"]
        notes.append(
            f"The images have {height} pixels a side. timm's own results for these weights are for "
            f"{tested[1]}: img_size={tested[1]}, crop_pct={share:g}."
        )
    mean, std = config["mean"], config["std"]
    if given is not None and given.mean:
        mean, std = given.mean, given.std or std
    base = Preprocess(size, resize, config["interpolation"], tuple(mean), tuple(std), channels)
    return base, tuple(notes)


def _with_crop(
    network: Any, given: Preprocess | PreprocessOverrides | None
) -> Preprocess | PreprocessOverrides | None:
    """Keep timm's crop_pct for another image size; it rounds the size before the crop by it."""
    config = timm().data.resolve_model_data_config(network)
    if not isinstance(given, PreprocessOverrides) or given.img_size is None:
        return given
    if given.crop_pct is not None or config["crop_mode"] == "squash":
        return given
    return replace(given, crop_pct=min(config["crop_pct"], 1.0))


def _head(network: Any) -> str | None:
    """Name the weights of the layer that timm calls the classifier."""
    said = network.pretrained_cfg.get("classifier")
    layer = said[0] if isinstance(said, tuple | list) else said
    return f"{layer}.weight" if layer else None


def _names(network: Any, about: Any) -> tuple[str, ...] | None:
    """Give the names of the classes: timm's own, or ImageNet's for 1,000 classes."""
    if about.label_names:
        return tuple(str(name) for name in about.label_names)
    return CLASSES if network.num_classes == len(CLASSES) else None
