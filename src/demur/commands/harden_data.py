"""The model and the images of `demur harden`."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from demur.commands.audit_images import check_readable, find, image_shape_of, images_for
from demur.commands.audit_subject import load, shape_of
from demur.data import ImageFiles, ImageSet, ImageSource, in_memory, split_by_hash
from demur.data.decoding import image_files
from demur.data.messages import printable
from demur.errors import DemurError
from demur.evaluation.handshake.inputs import check_range
from demur.files import digest
from demur.loading import LoadedModel
from demur.untrusted import user_path

PARTS: Final = (0.6, 0.2, 0.2)
"""Shares of the images that are learned from, that set the threshold, and that are reported on."""


@dataclass(frozen=True, eq=False)
class Material:
    """The model that is hardened, and three parts of the images, by their content.

    Parameters
    ----------
    base : LoadedModel
    learn, held_out, report : ImageSet
        To learn from, to set the threshold on, and to report on.
    background : Tensor of shape (n, C, H, W), uint8, optional
    fingerprint : str
        Of all images.
    seen : tuple of str
        The hashes of the first two parts, as the data has them: those of files where it is files.
    notes : tuple of str
    """

    base: LoadedModel
    learn: ImageSet
    held_out: ImageSet
    report: ImageSet
    background: Tensor | None
    fingerprint: str
    seen: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def background_fingerprint(self) -> str:
        """A digest of the background images; empty without them."""
        if self.background is None:
            return ""
        return digest(str(tuple(self.background.shape)), self.background.numpy().tobytes())


def read_material(
    model: str | Path | nn.Module,
    data: str | Path | ImageSource | tuple[Tensor, Tensor],
    *,
    background: str | Path | None,
    num_samples: int | None,
    seed: int,
    model_options: Mapping[str, Any],
    data_options: Mapping[str, Any],
) -> Material:
    """Read the model and the images; see `demur.harden`."""
    content = find(data, data_options)
    options = {**shape_of(model, data), **model_options}
    base = load(model, options, partial(image_shape_of, content))
    source = images_for(content, base.classifier)
    if num_samples is not None:
        source = source.sample(num_samples, seed)
    check_range(source.labels, base.classifier.num_classes, source.class_names)
    check_readable(source)
    learn, held_out, report = split_by_hash(source, PARTS, seed)
    others = None
    if background is not None:
        others = _background(background, base, source)
    return Material(
        base=base,
        learn=in_memory(learn),
        held_out=in_memory(held_out),
        report=in_memory(report),
        background=others,
        fingerprint=source.fingerprint,
        # Before they are read: in memory, an image has the hash of its pixels, and an audit of the
        # same files would not know it.
        seen=tuple(sorted({*learn.hashes, *held_out.hashes})),
        notes=(*base.notes, *source.notes),
    )


def _background(given: str | Path, base: LoadedModel, source: ImageSource) -> Tensor:
    """Read the images of a folder and of the folders in it, as the model takes them.

    Raises
    ------
    DemurError
        If there is no image, or one of the classes' images is among them.
    """
    folder = user_path(given)
    shown = printable(folder)
    if not folder.is_dir():
        raise DemurError(f"the background {shown} is no folder of images.")
    folders = sorted(Path(place) for place, _, _ in os.walk(folder))
    files = [file for one in folders for file in image_files(one)[0]]
    if not files:
        raise DemurError(f"the background folder {shown} has no image.")
    preprocess = base.classifier.preprocess
    channels, height, width = source.image_shape
    if preprocess is None or preprocess.size is None:
        from demur.classifier import Preprocess

        kept = preprocess or Preprocess(channels=channels)
        preprocess = replace(kept, size=(height, width), channels=channels, mean=(), std=())
    names = (str(folder), "none")
    labels = torch.zeros(len(files), dtype=torch.int64)
    images = ImageFiles(tuple(map(str, files)), labels, names, shown, preprocess)
    same = set(images.hashes) & set(source.hashes)
    named = {name.lower() for name in source.class_names}
    classes = sorted({one.name for one in folders[1:] if one.name.lower() in named})
    if same or classes:
        found = f"{len(same)} images of the data" if same else f"a folder {printable(classes[0])!r}"
        raise DemurError(
            f"the background folder {shown} holds {found}: background images must be of none of "
            "the model's classes. Take them out."
        )
    return images.read(slice(None))


def by_chunks(images: ImageSet, function: Callable[[Tensor], Tensor], size: int = 256) -> Tensor:
    """Call a function on float images, some at a time."""
    parts = [
        function(images.to_float(torch.arange(start, min(start + size, len(images)))))
        for start in range(0, len(images), size)
    ]
    return torch.cat(parts)
