"""Images without classes: those of none of the classes of a model."""

from pathlib import Path

import torch

from demur.classifier import Preprocess
from demur.data.catalogue import SOURCES
from demur.data.decoding import image_files
from demur.data.image_files import ImageFiles
from demur.data.image_source import ImageSource
from demur.data.messages import printable
from demur.data.reading import read_images
from demur.data.sources import expect_path
from demur.errors import DemurError
from demur.untrusted import user_path

NO_CLASSES = ("no class", "another")
"""Names in place of classes; all labels are 0."""


def read_unlabelled(
    spec: str | Path, preprocess: Preprocess, *, root: str | Path | None = None
) -> ImageSource:
    """Read images whose classes do not matter, for a model.

    Parameters
    ----------
    spec : str or Path
        A folder; its sub-folders are searched, too. Or a name of `list_datasets`: its test images.
    preprocess : Preprocess
        What the model takes.
    root : str or Path, optional
        The data root of demur's own data sets.

    Returns
    -------
    ImageSource
        The labels say nothing.

    Raises
    ------
    DemurError
        If there is no such folder or name, it holds no image, or a file cannot be read.

    Examples
    --------
    >>> read_unlabelled("digits", Preprocess(size=(28, 28), channels=1))
    ImageSet('digits': 359 images of 1x28x28, 10 classes)
    """
    if isinstance(spec, str) and spec in SOURCES:
        return read_images(spec, preprocess=preprocess, root=root)
    path = user_path(spec)
    expect_path(path, str(spec))
    if not path.is_dir():
        raise DemurError(f"{printable(path)} is no folder of images.")
    try:
        folders = [path, *sorted(one for one in path.rglob("*") if one.is_dir())]
    except OSError as error:
        raise DemurError(f"cannot read {printable(path)}: {error.strerror}.") from error
    files = [str(file) for folder in folders for file in image_files(folder)[0]]
    if not files:
        raise DemurError(f"{printable(path)} holds no images.")
    labels = torch.zeros(len(files), dtype=torch.int64)
    name = printable(path.resolve().name)
    return ImageFiles(tuple(files), labels, NO_CLASSES, name, preprocess)
