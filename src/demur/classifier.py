"""The ground floor: a classifier gives scores, a decision is their argmax, and every answer has one of three outcomes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import IntEnum
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from demur.errors import DemurError
from demur.hardware import tuned

REJECT: Final = -1
"""The prediction of a classifier that declines to answer."""


class Outcome(IntEnum):
    """What became of an image: answered rightly, declined, or answered wrongly (the papers' "other")."""

    CORRECT = 0
    REJECTED = 1
    WRONG = 2


class Classifier(nn.Module):
    """A network whose scores say what it decides.

    `module(images)` gives scores of shape (N, num_classes), or (N, num_classes + 1) where the last column is the reject
    score. Images are float (N, C, H, W) in [0, 1]: normalisation, centring and filters belong inside the module. It
    is an ordinary nn.Module: differentiable end to end, saved, moved and attacked like any other.
    """

    def __init__(self, module: nn.Module, num_classes: int) -> None:
        super().__init__()
        if num_classes < 2:
            raise DemurError(f"a classifier needs at least 2 classes, not {num_classes}.")
        self.module = module
        self.num_classes = num_classes

    def forward(self, images: Tensor) -> Tensor:
        """Scores (N, num_classes [+ 1]) of images (N, C, H, W), which are taken in the module's own precision."""
        parameter = next(self.parameters(), None)
        if parameter is not None and images.is_floating_point() and parameter.is_floating_point():
            images = images.to(parameter.dtype)
        scores: Tensor = self.module(images)
        if scores.ndim != 2 or scores.shape[1] - self.num_classes not in (0, 1):
            raise DemurError(
                f"the module gave scores of shape {tuple(scores.shape)} for {len(images)} images; a classifier of "
                f"{self.num_classes} classes gives (N, {self.num_classes}), or (N, {self.num_classes + 1}) with a reject column."
            )
        return scores

    @torch.no_grad()
    def predict(self, images: Tensor, batch_size: int = 512) -> Tensor:
        """Decide (N,) int64: a class 0..num_classes-1, or REJECT. In evaluation mode, whatever mode the network is in.

        Raises: DemurError if the images are not float (N, C, H, W) in [0, 1], or the scores are not finite.
        """
        return decide(self.scores(images, batch_size), self.num_classes)

    @torch.no_grad()
    def scores(self, images: Tensor, batch_size: int = 512) -> Tensor:
        """Compute scores in evaluation mode and float32, batch by batch, on the network's device; they come back on the images' device.

        Raises: DemurError as `predict` does.
        """
        check_images(images)
        device = device_of(self, images.device)
        with evaluating(self), tuned(), torch.autocast(device.type, enabled=False):
            scores = torch.cat([self(batch.to(device)).float().to(images.device) for batch in torch.split(images, batch_size)])
        if not bool(torch.isfinite(scores).all()):
            bad = int((~torch.isfinite(scores)).any(dim=1).sum())
            raise DemurError(
                f"the classifier gave NaN or infinite scores for {bad} of {len(images)} images: no decision can be made on them."
            )
        return scores


class _BlackBox(nn.Module):
    def __init__(self, function: Callable[[NDArray[np.float32]], NDArray[np.floating]]) -> None:
        super().__init__()
        self.function = function

    def forward(self, images: Tensor) -> Tensor:
        answer = np.asarray(self.function(images.detach().cpu().numpy().astype(np.float32)))
        if answer.dtype.kind not in "fiu" or len(answer) != len(images):
            raise DemurError(
                f"the black box gave {answer.dtype} of shape {answer.shape} for {len(images)} images; it must give one row for each."
            )
        return torch.as_tensor(answer, dtype=images.dtype, device=images.device)


def black_box(function: Callable[[NDArray[np.float32]], NDArray[np.floating]], num_classes: int) -> Classifier:
    """Make a classifier of a function that answers only: an HTTP endpoint, an ONNX session, a scikit-learn model.

    The function takes images as a float32 array (N, C, H, W) in [0, 1] and gives scores as an array (N, num_classes), or
    (N, num_classes + 1) with a reject column. Attacks that need gradients refuse it; `square`, `noise` and `transfer` take it.
    """
    return Classifier(_BlackBox(function), num_classes)


def decide(scores: Tensor, num_classes: int) -> Tensor:
    """The decision on scores (N, num_classes [+ 1]): the argmax, where column `num_classes` means REJECT. (N,) int64."""
    columns = scores.argmax(dim=1)
    return torch.where(columns == num_classes, REJECT, columns)


def outcomes(classifier: Classifier, images: Tensor, labels: Tensor) -> Tensor:
    """Outcome of each image, (N,) int64: CORRECT, REJECTED or WRONG.

    Raises: DemurError for what is no Classifier, images not float (N, C, H, W) in [0, 1], or labels not (N,) integers in
        0..num_classes-1.
    """
    check_classifier(classifier)
    check_labels(labels, len(images), classifier.num_classes)
    return outcomes_of(classifier.predict(images), labels)


def outcomes_of(predictions: Tensor, labels: Tensor) -> Tensor:
    """Outcome of each prediction (N,) against its label (N,), as `outcomes` gives them."""
    labels = labels.to(predictions.device)
    answered = torch.where(predictions == labels, int(Outcome.CORRECT), int(Outcome.WRONG))
    return torch.where(predictions == REJECT, int(Outcome.REJECTED), answered)


def check_classifier(classifier: object) -> None:
    """Raise DemurError unless it is a Classifier: a bare network does not say how many classes it has, nor if it can reject."""
    if not isinstance(classifier, Classifier):
        remedy = " Wrap it: Classifier(module, num_classes=...)." if isinstance(classifier, nn.Module) else ""
        raise DemurError(f"a demur Classifier is wanted, not {type(classifier).__name__}.{remedy}")


def check_images(images: Tensor) -> None:
    """Raise DemurError unless images are a non-empty float (N, C, H, W) tensor, finite and in [0, 1]."""
    if not isinstance(images, Tensor) or not images.is_floating_point():
        kind = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise DemurError(f"images must be a float tensor in [0, 1], not {kind}; divide uint8 images by 255.")
    if images.ndim < 2 or images.ndim == 3:
        single = "; a single image is images[None]" if images.ndim == 3 else ""
        raise DemurError(f"images must have shape (N, C, H, W), or (N, F) for vectors, not {tuple(images.shape)}{single}.")
    if len(images) == 0:
        raise DemurError("there are no images: the set is empty.")
    if not bool(torch.isfinite(images).all()):
        raise DemurError("images contain NaN or infinite pixels.")
    low, high = float(images.min()), float(images.max())
    if low < 0 or high > 1:
        raise DemurError(f"images must lie in [0, 1], but reach from {low:g} to {high:g}; normalisation belongs inside the network.")


def check_labels(labels: Tensor, count: int, num_classes: int) -> None:
    """Raise DemurError unless labels are (count,) integers in 0..num_classes-1."""
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        kind = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise DemurError(f"labels must be an integer tensor, not {kind}.")
    if labels.shape != (count,):
        raise DemurError(f"labels must have shape ({count},), one for each image, not {tuple(labels.shape)}.")
    if count and not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
        raise DemurError(f"labels must lie in 0..{num_classes - 1}, but reach from {int(labels.min())} to {int(labels.max())}.")


def device_of(module: nn.Module, default: torch.device) -> torch.device:
    """The device of the module's first parameter or buffer, or `default` where it has none."""
    for tensor in (*module.parameters(), *module.buffers()):
        return tensor.device
    return default


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Inside, every part of the module is in evaluation mode; afterwards each is in the mode it was in."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode
