"""`demur predict`: classes, or rejections, of image files."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from demur.classifier import REJECT, Classifier, Preprocess, decide
from demur.data.decoding import image_files, read_image
from demur.data.geometry import fit_pixels
from demur.data.messages import printable
from demur.errors import DemurError, ModuleError
from demur.loading import read_model
from demur.loading.wrapping import channels_of
from demur.untrusted import user_path

AT_ONCE: Final = 32
"""Images that are read and scored at a time: memory does not grow with their number."""
REJECTED: Final = "REJECT"


@dataclass(frozen=True)
class Prediction:
    """The answer to an image file.

    Parameters
    ----------
    path : str
    prediction : str
        The name of the class, its number where names are not known, or "REJECT". Empty if the file
        could not be read.
    score : float
        The probability of the best class, given that one of the classes is right. It is reported
        for rejected images, too.
    rejected : bool, default False
        Whether the image was rejected. A class may have the name "REJECT", too.
    error : str, default ""
        Why the file could not be read.

    Examples
    --------
    >>> Prediction("a.png", "REJECT", 0.4, rejected=True).rejected
    True
    """

    path: str
    prediction: str
    score: float
    rejected: bool = False
    error: str = ""


def predict(
    model: str | Path | Classifier,
    images: Sequence[str | Path],
    *,
    device: str = "cpu",
    model_options: Mapping[str, Any] | None = None,
) -> Iterator[Prediction]:
    """Decide on image files, one after the other.

    Parameters
    ----------
    model : str, path or Classifier
        As for `demur.load_model`.
    images : sequence of path
        Files, and folders, whose image files are read, those of the folders in them too.
    device : {"cpu", "cuda"}
    model_options : mapping, optional
        Options of `demur.load_model`.

    Yields
    ------
    Prediction
        In the order of the files, as soon as a few of them are decided.

    Raises
    ------
    DemurError
        If the model cannot be loaded, there is no image, or a path does not exist. A file that
        cannot be read is no error: its prediction says why.

    Examples
    --------
    >>> import tempfile
    >>> import numpy as np
    >>> from PIL import Image
    >>> from demur import black_box
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     Image.new("L", (2, 1), 255).save(Path(folder, "white.png"))
    ...     classifier = black_box(lambda images: images.reshape(len(images), -1)[:, :2], 2)
    ...     classifier.preprocess = Preprocess(channels=1)
    ...     [one.prediction for one in predict(classifier, [folder])]
    ['0']
    """
    if isinstance(model, Classifier):
        classifier = model
    else:
        classifier = read_model(model, **dict(model_options or {})).classifier
    files = _files(images)
    classifier.to(device)
    known = classifier.preprocess or Preprocess(channels=channels_of(classifier))
    return _predictions(classifier, known, files)


def _predictions(
    classifier: Classifier, preprocess: Preprocess, files: Sequence[Path]
) -> Iterator[Prediction]:
    for start in range(0, len(files), AT_ONCE):
        read = [(path, _pixels(path, preprocess)) for path in files[start : start + AT_ONCE]]
        for _, alike in groupby(read, lambda pair: getattr(pair[1], "shape", None)):
            yield from _decided(classifier, list(alike))


def _decided(
    classifier: Classifier, read: Sequence[tuple[Path, Tensor | str]]
) -> Iterator[Prediction]:
    """Decide on images of one shape; or say why files could not be read."""
    images = [one for _, one in read if isinstance(one, Tensor)]
    if not images:
        for path, said in read:
            yield Prediction(str(path), "", 0.0, error=str(said))
        return
    try:
        scores = classifier.scores(torch.stack(images).float() / 255)
    except ModuleError as error:
        known = classifier.preprocess
        if known is not None and known.size is not None:
            raise
        raise DemurError(
            f"{error} The size of the model's images is not known, so the images keep their own: "
            "give --img-size N."
        ) from error
    best = classifier._probabilities(scores[:, : classifier.num_classes]).amax(1)
    names = classifier.class_names or tuple(map(str, range(classifier.num_classes)))
    decisions = decide(scores, classifier.num_classes).tolist()
    for (path, _), decision, score in zip(read, decisions, best.tolist(), strict=True):
        rejected = decision == REJECT
        name = REJECTED if rejected else names[decision]
        yield Prediction(str(path), name, score, rejected)


def _pixels(path: Path, preprocess: Preprocess) -> Tensor | str:
    """Read an image as the model takes it, or say why it cannot be read."""
    try:
        return torch.from_numpy(fit_pixels(read_image(path), preprocess, path).copy())
    except DemurError as error:
        return str(error)


def _files(images: Sequence[str | Path]) -> list[Path]:
    """List the files, and those of folders and of the folders in them."""
    found: list[Path] = []
    for one in images:
        path = user_path(one)
        if path.is_dir():
            folders = sorted(Path(place) for place, _, _ in os.walk(path))
            found += [file for folder in folders for file in image_files(folder)[0]]
        elif path.exists():
            found.append(path)
        else:
            raise DemurError(f"there is no file or folder {printable(path)}.")
    if not found:
        raise DemurError(f"there is no image in {', '.join(map(printable, images))}.")
    return found
