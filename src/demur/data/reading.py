"""Images for a model, by name or from a path: in files that are read on demand, or in memory."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from demur.classifier import Preprocess
from demur.data.catalogue import SOURCES
from demur.data.decoding import has_grey_mode
from demur.data.formats import NoSplitError
from demur.data.image_files import ImageFiles, ResizedImages
from demur.data.image_source import ImageSource
from demur.data.images import ImageSet
from demur.data.label_map import MatchedClasses, Names, match_classes, read_label_map
from demur.data.listing import (
    TRAINING,
    VALIDATION,
    Listing,
    check_split,
    list_folder,
    list_manifest,
)
from demur.data.messages import printable
from demur.data.sources import expect_path, load
from demur.data.threads import in_threads
from demur.errors import DemurError
from demur.untrusted import user_path


def read_images(
    spec: str | Path,
    split: str = "test",
    *,
    root: str | Path | None = None,
    preprocess: Preprocess | None = None,
    label_map: str | Path | None = None,
    classes: Sequence[Names] | None = None,
    name: str | None = None,
) -> ImageSource:
    """Read labelled images for a model.

    Image files are opened when their pixels are asked for. Data sets of demur and npz archives lie
    in memory in their own size.

    Parameters
    ----------
    spec : str or Path
        A name of `list_datasets`, a folder with a sub-folder for each class, an .npz archive, or a
        .csv manifest with a line path,label for each image.
    split : str, default="test"
        "train" or "training"; "test" or "testing"; "val", "valid", "validation", "eval" or
        "evaluation". Data without any split are used whole, and a note says so.
    root : str or Path, optional
        The data root of demur's own data sets.
    preprocess : Preprocess, optional
        What the model takes. Without it, images keep their size, and files are grey if all are
        grey, else RGB.
    label_map : str or Path, optional
        CSV or JSON file: the model's class, by name or number, for classes of the data.
    classes : sequence of str or of sequences of str, optional
        Names of the model's classes in their order. A class may have several names, of which the
        first one is shown.
    name : str, optional
        Name of the images. Default: that of the data set, folder or file.

    Returns
    -------
    ImageSource
        `ImageFiles`, `ResizedImages` or `ImageSet`. Labels and class names are those of the model.
        `notes` says what was done.

    Raises
    ------
    DemurError
        If there are no such data, they do not fit the model, or their classes cannot be matched.

    Examples
    --------
    >>> read_images("digits", preprocess=Preprocess(size=(32, 32)))
    ResizedImages('digits': 359 images of 3x32x32, 10 classes)
    """
    found = find_images(spec, split, root=root, label_map=label_map, name=name)
    return found.read(preprocess, classes)


@dataclass(frozen=True, eq=False)
class FoundImages:
    """Labelled images that were found, before a model says how it takes them.

    Parameters
    ----------
    content : Listing or ImageSet
        The image files, or the images in memory.
    name : str
        Name of the images.
    label_map : mapping
        The model's class for classes of the data.
    """

    content: Listing | ImageSet
    name: str
    label_map: Mapping[str, str | int]

    def read(
        self, preprocess: Preprocess | None = None, classes: Sequence[Names] | None = None
    ) -> ImageSource:
        """Give the images as a model takes them; see `read_images`."""
        if isinstance(self.content, Listing):
            return _files(self.content, self.name, preprocess, classes, self.label_map)
        images = _relabelled(self.content, classes, self.label_map)
        return images if preprocess is None else _fitted(images, preprocess)


def find_images(
    spec: str | Path,
    split: str = "test",
    *,
    root: str | Path | None = None,
    label_map: str | Path | None = None,
    name: str | None = None,
) -> FoundImages:
    """Find labelled images without a model: list the files, or load what lies in memory.

    What is wrong with the data is said here, before a model is loaded. The parameters and errors
    are those of `read_images`.

    Returns
    -------
    FoundImages

    Examples
    --------
    >>> find_images("digits").read(Preprocess(size=(32, 32)))
    ResizedImages('digits': 359 images of 3x32x32, 10 classes)
    """
    check_split(split)
    mapping = {} if label_map is None else read_label_map(user_path(label_map))
    path = user_path(spec)
    known = isinstance(spec, str) and spec in SOURCES
    if not known:
        expect_path(path, str(spec))
    if known or (path.suffix.lower() == ".npz" and path.is_file()):
        images = _from_memory(spec, split, root)
        title = name or images.name
        return FoundImages(replace(images, name=title), title, mapping)
    if path.is_dir():
        return FoundImages(
            list_folder(path, split), name or printable(path.resolve().name), mapping
        )
    if path.suffix.lower() == ".csv" and path.is_file():
        return FoundImages(list_manifest(path), name or printable(path.stem), mapping)
    raise DemurError(
        f"{printable(path)} is neither a folder, nor an .npz archive, nor a .csv manifest."
    )


def _files(
    listing: Listing,
    name: str,
    preprocess: Preprocess | None,
    classes: Sequence[Names] | None,
    label_map: Mapping[str, str | int],
) -> ImageFiles:
    matched = match_classes(listing.classes, classes, label_map, name)
    if len(matched.class_names) < 2:
        raise DemurError(
            f"{printable(name)} has images of one class only, and the names of the model's classes "
            "are not known; a classifier needs at least 2 classes."
        )
    if preprocess is None:
        grey_files = in_threads(lambda path: has_grey_mode(Path(path)), listing.paths)
        preprocess = Preprocess(channels=1 if all(grey_files) else 3)
        grey = ""
    else:
        grey = "The model takes grey images: coloured ones are converted by their luminance."
    notes = (*listing.notes, matched.note, grey if preprocess.channels == 1 else "")
    return ImageFiles(
        listing.paths,
        matched.ids[listing.members],
        matched.class_names,
        name,
        preprocess,
        tuple(filter(None, notes)),
    )


def _from_memory(spec: str | Path, split: str, root: str | Path | None) -> ImageSet:
    read = partial(load, spec, root=root)
    note = ""
    try:
        images = read("train" if split in TRAINING else "test")
        if split in VALIDATION:
            note = f"{printable(images.name)} has no {split} split: its test images are used."
    except NoSplitError:
        images = read("train")
        note = f"{printable(images.name)} has no {split} split: all of its images are used."
    return replace(images, notes=(note,) if note else ())


def _relabelled(
    images: ImageSet, classes: Sequence[Names] | None, label_map: Mapping[str, str | int]
) -> ImageSet:
    """Give images the labels and the class names of the model."""
    if classes is None and not label_map:
        return images
    present = images.counts().nonzero().flatten()  # other classes need no counterpart
    names = [images.class_names[number] for number in present.tolist()]
    matched: MatchedClasses = match_classes(names, classes, label_map, images.name)
    ids = torch.zeros(images.num_classes, dtype=torch.int64)
    ids[present] = matched.ids
    notes = (*images.notes, matched.note) if matched.note else images.notes
    return replace(images, labels=ids[images.labels], class_names=matched.class_names, notes=notes)


def _fitted(images: ImageSet, preprocess: Preprocess) -> ImageSet | ResizedImages:
    """Bring images to the size and the channels of the model, if they have others."""
    channels, height, width = images.image_shape
    colour = "grey" if channels == 1 else "colour"
    if channels > preprocess.channels:
        raise DemurError(
            f"the images of {printable(images.name)} are coloured, but the model takes grey ones. "
            "Give grey images."
        )
    done = []
    if preprocess.size not in (None, (height, width)):
        rows, columns = preprocess.size
        cropped = f" with {preprocess.resize} pixels of the shorter side, then cropped"
        done.append(
            f"resized ({preprocess.interpolation}){cropped if preprocess.resize else ''} to "
            f"{columns}x{rows}"
        )
    else:
        # They have the size of the model's crop already.
        preprocess = replace(preprocess, resize=None)
    if channels < preprocess.channels:
        done.append("repeated to three channels")
    if not done:
        return images
    note = (
        f"The images of {printable(images.name)} are {width}x{height} {colour}; they are "
        f"{' and '.join(done)} for the model."
    )
    return ResizedImages(images, preprocess, (*images.notes, note))
