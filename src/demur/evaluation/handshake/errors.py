"""Errors of a user's model, each as one line with the remedy."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import torch
from torch import Tensor, nn

import demur
from demur.classifier import Classifier, is_out_of_memory
from demur.data.messages import printable
from demur.errors import DemurError, ModuleError
from demur.loading.user_code import last_line
from demur.loading.wrapping import precisions
from demur.networks.adapted import scores_of

SIZES: Final = (224, 32, 28, 64, 96, 128, 160, 192, 256, 299, 336, 384, 448)
"""Pixels a side that are tried where a model fails on the size of the images."""

BATCHES: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256)
"""Numbers of images that are tried where a model fails on the size of a batch."""

LIBRARIES: Final = (Path(torch.__file__).parent, Path(demur.__file__).parent)
"""The folders of torch and demur: their lines say nothing about a user's module."""

_DEVICE = re.compile(r"same device|expected device|meta tensor", re.IGNORECASE)
_PRECISION = re.compile(
    r"same dtype|scalar type|'Half'|BFloat16|Input type .* should be the same", re.IGNORECASE
)
_BATCH_NORM = re.compile(r"more than 1 value per channel when training", re.IGNORECASE)
_SHAPE = re.compile(
    r"shape|size|dimension|channels|elements|height|width|broadcast|index", re.IGNORECASE
)


@contextmanager
def explained(classifier: Classifier, images: Tensor) -> Iterator[None]:
    """Turn an error of the classifier on these images into one line.

    An error of memory passes, so that a smaller batch can be tried.

    Parameters
    ----------
    classifier : Classifier
    images : Tensor of shape (N, C, H, W)

    Raises
    ------
    DemurError
        Instead of any other error.
    """
    try:
        yield
    except ModuleError as error:
        cause = error.__cause__
        if not isinstance(cause, Exception):
            raise
        if is_out_of_memory(cause):
            raise cause from None
        raise _explanation(cause, classifier, images) from cause
    except DemurError:
        raise
    except Exception as error:  # a backward pass may fail with any error
        if is_out_of_memory(error):
            raise
        raise _explanation(error, classifier, images) from error


def _explanation(error: Exception, classifier: Classifier, images: Tensor) -> DemurError:
    text = str(error)
    # The kind of an error is a class name of the user.
    reason = f"{printable(type(error).__name__, 60)}: {printable(text)}".rstrip(".: ")
    if _BATCH_NORM.search(text):
        return DemurError(
            f"a batch norm computes with the statistics of the batch ({reason}): the model must "
            "use its running statistics, as in evaluation mode."
        )
    if _DEVICE.search(text):
        return DemurError(
            f"a part of the model is on another device ({reason}): keep its tensors as parameters, "
            "or with register_buffer."
        )
    mixed = len({one.dtype for one in classifier.parameters()}) > 1
    if _PRECISION.search(text) and (mixed or precisions(classifier)):
        return DemurError(
            f"the precisions of the weights do not fit together ({reason}): convert the model with "
            ".float()."
        )
    return (
        _of_batches(classifier, images)
        or _of_inputs(classifier, images)
        or _other(error, reason, images)
    )


def _of_batches(classifier: Classifier, images: Tensor) -> DemurError | None:
    """Find out whether the model works on another number of images: an export may fix it."""
    count, *shape = images.shape
    if _works(classifier, images, (count, *shape)):
        return None  # it fails on these very pixels
    for other in BATCHES:
        if other != count and _works(classifier, images, (other, *shape)):
            return DemurError(
                f"the model fails on {count} images at once, and works on {other}: export it with "
                "a batch dimension that is dynamic."
            )
    return None


def _of_inputs(classifier: Classifier, images: Tensor) -> DemurError | None:
    """Find out whether the model works on images of another size or other channels."""
    count, channels, *sides = images.shape
    if images.ndim != 4 or _works(classifier, images, (count, channels, *sides)):
        return None  # the shape is not what it fails on
    others = [one for one in (3, 1) if one != channels]
    sizes = [(side, side) for side in SIZES if [side, side] != sides]
    for kind in others:
        if _works(classifier, images, (1, kind, *sides)):
            return DemurError(f"{_colours(kind, channels)}.")
    for size in sizes:
        if _works(classifier, images, (1, channels, *size)):
            return DemurError(
                f"the model fails on images of {sides[0]}x{sides[1]} pixels, and works on "
                f"{size[0]}x{size[1]}: give --img-size {size[0]}."
            )
    for kind in others:
        for size in sizes:
            if _works(classifier, images, (1, kind, *size)):
                return DemurError(
                    f"{_colours(kind, channels)}. It fails on {sides[0]}x{sides[1]} pixels, and "
                    f"works on {size[0]}x{size[1]}: give --img-size {size[0]}."
                )
    return None


def _colours(wanted: int, given: int) -> str:
    kinds = {1: "grey", 3: "RGB"}
    remedy = "RGB" if wanted == 3 else "grey"
    return (
        f"the model takes images of {wanted} channels ({kinds[wanted]}), and these have {given}"
        f"{f' ({kinds[given]})' if given in kinds else ''}: convert the images to {remedy}"
    )


def _works(classifier: Classifier, images: Tensor, shape: tuple[int, ...]) -> bool:
    try:
        with torch.no_grad():
            classifier(torch.zeros(shape, device=images.device, dtype=images.dtype))
    except ModuleError as error:
        return error.__cause__ is None  # an answer is looked at elsewhere
    except DemurError:
        return True
    return True


def _other(error: Exception, reason: str, images: Tensor) -> DemurError:
    place = last_line(error, lambda file: not any(map(file.is_relative_to, LIBRARIES)))
    where = f" at {place}" if place else ""
    shape = tuple(images.shape[1:])
    if _SHAPE.search(str(error)):
        return DemurError(
            f"the model fails on images of shape {shape}{where}: {reason}. Give the size that it "
            "takes, --img-size."
        )
    return DemurError(f"the model raised an error{where}: {reason}.")


def check_answer(classifier: Classifier, images: Tensor) -> None:
    """Score some images, and explain an answer that is no table of scores.

    Parameters
    ----------
    classifier : Classifier
    images : Tensor of shape (N, C, H, W), on the device of the classifier

    Raises
    ------
    DemurError
        If the classifier fails, or its module returns something else than scores.
    """
    try:
        with explained(classifier, images):
            classifier(images)
    except DemurError as error:
        answer = _answer(classifier.module, images)
        if answer is None:
            raise
        raise _unfit(answer, classifier, len(images)) or error from None


def _answer(module: nn.Module, images: Tensor) -> object:
    """Give what the module itself returns, or None if it fails."""
    parameter = next(module.parameters(), None)
    dtype = images.dtype if parameter is None else parameter.dtype
    try:
        return module(images.clone().to(dtype))
    except Exception:  # a module may fail with any error
        return None


def _unfit(answer: object, classifier: Classifier, count: int) -> DemurError | None:
    """Say why an answer is no table of scores; None if it may be one."""
    if not isinstance(answer, Tensor):
        try:
            scores_of(answer)
        except DemurError as error:
            return error
        kind = printable(type(answer).__name__, 40)
        return DemurError(
            f"the module returned a {kind} with logits instead of a tensor of scores: wrap it with "
            "demur.wrap(module)."
        )
    shape = tuple(answer.shape)
    if answer.ndim == 4:
        return DemurError(
            f"the module returned {shape} for {count} images, a score for each pixel: it looks "
            "like a model for segmentation; demur audits classifiers."
        )
    if answer.ndim == 1 or shape == (count, 1):
        return DemurError(
            f"the module returned one score for each image, {shape}: demur needs a column for each "
            "class; return torch.cat([-z, z], 1) / 2 of a logit z (N, 1)."
        )
    columns = answer.shape[-1]
    wanted = classifier.num_classes
    if answer.ndim == 2 and len(answer) == count and columns not in (wanted, wanted + 1):
        return DemurError(
            f"the model gives {columns} scores for {wanted} classes: give --num-classes {columns}, "
            "and --label-map if the data have other classes."
        )
    return None
