"""Fine-tuning inside `demur harden`: the whole network or its head, with early stopping."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from demur.classifier import Classifier
from demur.data import ImageSet
from demur.defenses.descriptions import leaf_of
from demur.errors import DemurError
from demur.networks.heads import find_head, replace_head

STOP = 0.15
"""The share of the images to learn from that decides when a training ends."""


class StillStatistics:
    """A batch transform: batch norms keep their statistics, as in evaluation."""

    def __call__(
        self, network: nn.Module, images: Tensor, labels: Tensor, step: int
    ) -> tuple[Tensor, Tensor]:
        """Put the batch norms into evaluation mode."""
        for part in network.modules():
            if isinstance(part, nn.modules.batchnorm._BatchNorm):
                part.eval()
        return images, labels

    def fingerprint(self) -> str:
        """There is nothing to depend on."""
        return "still statistics"


@contextmanager
def head_alone(classifier: Classifier, image: Tensor, frozen: bool) -> Iterator[None]:
    """Inside, only the last layer learns, if `frozen`."""
    if not frozen:
        yield
        return
    network = leaf_of(classifier)
    head = dict(network.named_modules())[_head_of(classifier, image)]
    learning = {id(one) for one in head.parameters()}
    before = [(one, one.requires_grad) for one in classifier.parameters()]
    for one, _ in before:
        one.requires_grad_(id(one) in learning)
    try:
        yield
    finally:
        for one, learns in before:
            one.requires_grad_(learns)


def _head_of(classifier: Classifier, image: Tensor) -> str:
    """Find the last layer, by its name in the network inside the wrappers."""
    columns = classifier.scores(image).shape[1]
    leaf = leaf_of(classifier)
    path = find_head(classifier, image, columns)
    for name, part in classifier.named_modules():
        if part is leaf:
            return path.removeprefix(f"{name}." if name else "")
    raise DemurError("the last layer does not belong to the network.")


def widened(classifier: Classifier, image: Tensor) -> None:
    """Give a classifier one more output, in place: the score of rejection.

    Raises
    ------
    DemurError
        If it has a reject column already, or no last layer that could be changed.
    """
    if classifier.scores(image).shape[1] > classifier.num_classes:
        raise DemurError(
            "background-class adds the reject column, and the model has one already: leave it out, "
            "or put it before the other defences."
        )
    network: Any = leaf_of(classifier)
    head = {"path": _head_of(classifier, image), "outputs": classifier.num_classes + 1}
    replace_head(network, head)
    known = getattr(network, "architecture", None)
    if known is None:
        network.changed_head = head
    else:
        network.architecture = {**known, "head": head}
    for part in classifier.modules():
        if isinstance(part, Classifier):
            part._columns.value = True


def to_learn_and_stop(images: ImageSet, seed: int) -> tuple[ImageSet, ImageSet]:
    """Split images: those to learn from, and those that say when a training ends."""
    return images.split(STOP, seed)


def descent(rate: float) -> Any:
    """Make the optimizer of fine-tuning from its learning rate."""
    return partial(torch.optim.SGD, lr=rate, momentum=0.9, nesterov=True)
