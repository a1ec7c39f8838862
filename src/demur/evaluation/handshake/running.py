"""Running a user's model before an audit: scores, gradients, the batch size, and the throughput."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from demur.classifier import Classifier, is_out_of_memory
from demur.errors import DemurError
from demur.evaluation.handshake.errors import explained
from demur.goals import Evade

VALUES: Final = 5_000_000
"""Pixels of a batch, times channels, if no batch size is given: 32 images of 3x224x224."""

LARGEST: Final = 128
"""The largest batch if no batch size is given."""

TOO_LARGE: Final = (
    "the model and one image do not fit into memory: use a smaller model or --img-size, or another "
    "device."
)

PROBE_SECONDS: Final = 0.3
PROBE_PASSES: Final = 20


class OutOfMemoryError(Exception):
    """The model and a batch do not fit into memory together."""


@dataclass(frozen=True)
class Runner:
    """A classifier that scores images on a device. It is in evaluation mode already.

    Parameters
    ----------
    classifier : Classifier
    device : torch.device
    """

    classifier: Classifier
    device: torch.device

    @torch.no_grad()
    def scores(self, images: Tensor, batch_size: int) -> Tensor:
        """Compute scores (n, columns), float32 on the CPU. They may be NaN.

        Raises
        ------
        DemurError
            If the classifier fails.
        OutOfMemoryError
        """
        return torch.cat([self._scores(part).cpu() for part in torch.split(images, batch_size)])

    def _scores(self, images: Tensor) -> Tensor:
        given = images.to(self.device)
        try:
            with explained(self.classifier, given):
                scores: Tensor = self.classifier(given)
                return scores.float()
        except Exception as error:
            raise _of_memory(error) from error

    def gradient(self, images: Tensor, labels: Tensor) -> Tensor | None:
        """Compute the gradients of the cross-entropy, of the shape of the images; None if the
        scores have none.

        Raises
        ------
        DemurError
            If the forward or the backward pass fails.
        OutOfMemoryError
        """
        given = images.to(self.device).requires_grad_()
        with torch.enable_grad():
            scores = self._scores(given)
            if not scores.requires_grad:
                return None
            num_classes = self.classifier.num_classes
            loss = Evade().loss(scores, labels.to(self.device), num_classes, "cross_entropy")
            try:
                with explained(self.classifier, given.detach()):
                    (found,) = torch.autograd.grad(loss.sum(), given, allow_unused=True)
            except Exception as error:
                raise _of_memory(error) from error
        return None if found is None else found.detach()


def _of_memory(error: Exception) -> Exception:
    return OutOfMemoryError() if is_out_of_memory(error) else error


def default_batch_size(images: Tensor) -> int:
    """Give a power of two for which a batch of such images is not large.

    Examples
    --------
    >>> default_batch_size(torch.zeros(1, 3, 224, 224)), default_batch_size(torch.zeros(1, 1, 8, 8))
    (32, 128)
    """
    fits = max(1, VALUES // images[0].numel())
    return int(min(LARGEST, 2 ** (fits.bit_length() - 1)))


def fitting_batch_size(run: Callable[[int], object], batch_size: int) -> int:
    """Halve the batch size until a batch fits into memory.

    Parameters
    ----------
    run : callable
        Takes a batch size, and raises OutOfMemoryError if it is too large.
    batch_size : int
        The first one that is tried.

    Returns
    -------
    int

    Raises
    ------
    DemurError
        If one image does not fit.
    """
    while True:
        try:
            run(batch_size)
            return batch_size
        except OutOfMemoryError as error:
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            if batch_size == 1:
                raise DemurError(TOO_LARGE) from error
        batch_size //= 2


def images_per_second(run: Callable[[], object], count: int, device: torch.device) -> float:
    """Measure how many images a second a pass over `count` images reaches."""
    passes = 0
    run()  # The first pass allocates memory and chooses algorithms.
    _wait(device)
    start = time.perf_counter()
    while True:
        run()
        passes += 1
        _wait(device)
        seconds = time.perf_counter() - start
        if seconds >= PROBE_SECONDS or passes == PROBE_PASSES:
            return count * passes / max(seconds, 1e-9)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
