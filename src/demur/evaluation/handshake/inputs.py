"""The points of a handshake that need no forward pass: pixels, labels, mode, device."""

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor
from torch.fx import GraphModule

from demur.classifier import Classifier, check_images, device_of
from demur.classifier.checks import INTEGERS
from demur.data.messages import printable, quoted
from demur.errors import DemurError
from demur.evaluation.handshake.lines import Line, pairs_of, shape_of
from demur.loading.wrapping import precisions

NAMED: Final = 3
"""Classes that a message names."""


def check_pixels(images: Tensor) -> Line:
    """Pixels lie in [0, 1]."""
    _check_range(images)
    check_images(images)
    if images.ndim != 4:
        raise DemurError(f"images must have shape (n, C, H, W), not {tuple(images.shape)}.")
    low = images.min().item()
    high = images.max().item()
    if 0 < high <= 1.001 / 255:
        raise DemurError(
            f"the brightest pixel is {high:.4g}: the images were divided by 255 twice; give pixels "
            "in [0, 1]."
        )
    count, *shape = images.shape
    text = f"{count} images of {shape_of(shape)}, pixels from {low:.3g} to {high:.3g}."
    return Line("pixels", "ok", text)


def _check_range(images: Tensor) -> None:
    """Tell images that are normalised, or have pixels from 0 to 255."""
    floats = isinstance(images, Tensor) and images.is_floating_point()
    if not floats or not images.numel() or not bool(images.isfinite().all()):
        return  # the general check speaks of it
    low = images.min().item()
    high = images.max().item()
    if low < 0:
        mean = images.double().mean().item()
        raise DemurError(
            f"pixels reach from {low:.3g} to {high:.3g} with mean {mean:.2g}: the images are "
            "normalised; demur wants pixels in [0, 1] and normalisation inside the model "
            "(--mean --std, or demur.wrap(preprocess=))."
        )
    if 1 < high <= 255:
        raise DemurError(
            f"pixels reach to {high:.4g}: demur wants pixels in [0, 1]; divide them by 255. If the "
            "model takes 0 to 255, give --mean 0 --std 0.00392157."
        )


def check_labels(
    labels: Tensor, count: int, classifier: Classifier, class_names: Sequence[str] | None
) -> Line:
    """Labels are class numbers of the model, and names are in its order."""
    if not isinstance(labels, Tensor) or labels.dtype not in INTEGERS:
        kind = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise DemurError(f"labels must be an integer tensor such as int64, not {kind}.")
    if labels.shape != (count,):
        raise DemurError(f"there are {count} images and labels of shape {tuple(labels.shape)}.")
    wanted = classifier.num_classes
    check_range(labels, wanted, class_names)
    _check_names(classifier, class_names)
    present = int((torch.bincount(labels) > 0).sum())
    return Line("labels", "ok", f"{present} of {wanted} classes occur in the sample.")


def check_range(labels: Tensor, wanted: int, class_names: Sequence[str] | None) -> None:
    """Raise DemurError if labels are no class numbers of a model; name the classes they are of.

    Parameters
    ----------
    labels : Tensor of shape (n,), integers
    wanted : int
        The number of the model's classes.
    class_names : sequence of str, optional
        The names of the data's classes.
    """
    least = int(labels.min())
    most = int(labels.max())
    if least == 1 and most == wanted:
        raise DemurError(
            f"labels run from 1 to {wanted}, and the classes of the model from 0 to {wanted - 1}: "
            "the labels are shifted by one; subtract 1, or give --label-map."
        )
    if least >= 0 and most < wanted:
        return
    names = class_names or ()
    beyond = [one for one in sorted(set(labels.tolist())) if wanted <= one < len(names)]
    said = ", ".join(f"label {one} is the class {quoted(names[one])}" for one in beyond[:NAMED])
    more = f", and {len(beyond) - NAMED} more" if len(beyond) > NAMED else ""
    which = (
        f": {said}{more} of the data. Take out the images of the class that the model does not "
        "know, or give --label-map or --num-classes."
    )
    raise DemurError(
        f"labels reach from {least} to {most}, and the model has {wanted} classes, 0 to "
        f"{wanted - 1}{which if beyond else ': give --label-map or --num-classes.'}"
    )


def _check_names(classifier: Classifier, class_names: Sequence[str] | None) -> None:
    if class_names is None:
        return
    names = [str(name) for name in class_names]
    if len(names) != classifier.num_classes:
        raise DemurError(
            f"the data have {len(names)} classes, and the model {classifier.num_classes}: give "
            "--label-map."
        )
    known = classifier.class_names
    if known is None or sorted(known) != sorted(names) or list(known) == names:
        return
    pairs = [(one, known.index(name)) for one, name in enumerate(names) if name != known[one]]
    raise DemurError(
        "the class order differs between the data and the model "
        f"({pairs_of(pairs, names, known)}): give --label-map."
    )


def check_mode(classifier: Classifier) -> Line:
    """The model is used in evaluation mode, whatever its mode is."""
    # demur's own wrappers behave equally in both modes.
    parts = [one for one in classifier.modules() if not type(one).__module__.startswith("demur.")]
    if any(isinstance(one, GraphModule) and "eval" in vars(one) for one in parts):
        text = "the model is an exported program: the export has fixed its mode."
        return Line("evaluation mode", "note", text)
    training = sum(getattr(part, "training", False) for part in parts)
    if not training:
        return Line("evaluation mode", "ok", "the model is in evaluation mode.")
    return Line(
        "evaluation mode",
        "note",
        f"{training} of {len(parts)} parts of the model were in training mode: demur uses the "
        "model in evaluation mode.",
    )


def move(classifier: Classifier, device: torch.device) -> Line:
    """Move the model to the device. It has weights, which are loaded."""
    if any(one.is_meta for one in (*classifier.parameters(), *classifier.buffers())):
        raise DemurError(
            "the weights of the model are on the device meta: they were never loaded; load a "
            "checkpoint first."
        )
    before = device_of(classifier, device)
    try:
        classifier.to(device)
    except (RuntimeError, NotImplementedError, AssertionError) as error:
        raise DemurError(
            f"the model cannot be moved to {device}: {printable(error).rstrip('.')}."
        ) from error
    moved = before.type != device.type
    numbers = sum(one.numel() for one in classifier.parameters())
    text = f"{numbers:,} weights on {device}."
    if moved:
        text += f" The model was on {before}, and demur moved it."
    half = [kind for kind in precisions(classifier) if kind in ("float16", "bfloat16")]
    if half:
        text += (
            f" Weights are {' and '.join(half)}: scores are rounded coarsely; convert the model "
            "with .float() for exact figures."
        )
    return Line("device", "note" if moved or half else "ok", text)
