"""Background-class training: one large "none of the above" class, learnt from images of other things."""

from typing import Any, Self

import torch
from torch import Tensor, nn

from demur.classifier import Classifier
from demur.data import as_floats
from demur.errors import DemurError
from demur.networks import Epoch, fit


class BackgroundClass(Classifier):
    """A classifier whose reject score is the logit of a background class (McCoyd & Wagner 2018).

    Args:
        module: a network with num_classes + 1 outputs, the last of which becomes the background's.
        num_classes: the key classes, that is, those which are to be told apart.

    Attributes:
        history_: list of Epoch, after `fit`.
    """

    history_: list[Epoch]

    def __init__(self, module: nn.Module, num_classes: int) -> None:
        super().__init__(module, num_classes)

    def fit(self, images: Tensor, labels: Tensor, background: Tensor, **options: Any) -> Self:
        """Train the network on key images and background images together, as one more class.

        Args:
            images: key images (N, C, H, W), uint8 or float in [0, 1].
            labels: (N,) integers in 0..num_classes-1.
            background: images (M, C, H, W) of none of the key classes, in the same type.
            options: as for `networks.fit`: epochs, batch_size, seed, device, checkpoint, ...

        Raises: DemurError for images of different shapes or types, labels out of range, or a network without the extra output.
        """
        if images.shape[1:] != background.shape[1:] or images.dtype != background.dtype or not len(background):
            raise DemurError(
                f"background images {tuple(background.shape)} {background.dtype} do not go with key images "
                f"{tuple(images.shape)} {images.dtype}: at least one is needed, of the same shape and type."
            )
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < self.num_classes:
            raise DemurError(f"labels of key images must lie in 0..{self.num_classes - 1}; the background gets its label here.")
        self._check_outputs(images)
        together = torch.cat([labels, labels.new_full((len(background),), self.num_classes)])
        self.history_ = fit(self.module, torch.cat([images, background]), together, **options)
        return self

    def _check_outputs(self, images: Tensor) -> None:
        columns = self.scores(as_floats(images[:2])).shape[1]
        if columns != self.num_classes + 1:
            raise DemurError(f"a background class needs a network with {self.num_classes + 1} outputs; this one has {columns}.")
