"""`demur export`: a model as one graph for other programs."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from demur.commands.audit_images import find, image_shape_of, images_for
from demur.commands.audit_subject import load
from demur.data.images import to_float
from demur.errors import DemurError
from demur.loading import read_model
from demur.loading.export import IMAGES, Parity, check_format, parity_images
from demur.loading.export import export as write
from demur.loading.wrapping import channels_of


def export(
    model: str | Path,
    form: str = "onnx",
    *,
    out: str | Path | None = None,
    data: str | Path | None = None,
    seed: int = 0,
    model_options: Mapping[str, Any] | None = None,
    data_options: Mapping[str, Any] | None = None,
) -> tuple[Path, Parity]:
    """Write a model as one graph, and compare it with the original on 256 images.

    Parameters
    ----------
    model : str or path
        A bundle, or another source of `demur.load_model`. If it does not know the size of its
        images, `data` gives it, or `model_options`.
    form : {"onnx", "pt2"}
    out : path, optional
        Default: ``model.onnx`` or ``model.pt2`` in the folder of the bundle, or in the current
        folder for other sources.
    data : str or path, optional
        Images for the comparison, as for `demur.audit`. Default: made ones, of noise and blobs.
    seed : int, default 0
        Of the choice of images.
    model_options, data_options : mapping, optional
        Options of `demur.load_model` and `demur.data.read_images`.

    Returns
    -------
    path : Path
    parity : Parity

    Raises
    ------
    DemurError
        If the model cannot be loaded or exported; see `demur.loading.export.export`.
    """
    # What is wrong with the request is said before the model is loaded.
    check_format(form)
    content = None if data is None else find(data, dict(data_options or {}))
    if content is None:
        classifier = read_model(model, **dict(model_options or {})).classifier.cpu()
    else:
        loaded = load(model, dict(model_options or {}), partial(image_shape_of, content))
        classifier = loaded.classifier.cpu()
    known = classifier.preprocess
    if content is not None:
        source = images_for(content, classifier).sample(IMAGES, seed)
        images = to_float(source.read(slice(0, len(source))))
    elif known is None or known.size is None:
        raise DemurError(
            "the size of the model's images is not known: give --img-size N, or --data DATA."
        )
    else:
        channels = known.channels if classifier.preprocess else channels_of(classifier)
        images = parity_images((channels, *known.size), seed=seed)
    classifier.scores(images[:1])  # whether it rejects is known from here on
    folder = Path(model) if Path(model).is_dir() else Path()
    path = Path(out) if out is not None else folder / f"model.{form}"
    channels, height, width = images.shape[1:]
    with torch.random.fork_rng(devices=[]):
        return path, write(classifier, path, form, (channels, height, width), images)
