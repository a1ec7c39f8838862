"""Background-class training: one class for everything that is none of the key classes."""

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from demur.classifier import check_labels
from demur.data import to_float
from demur.defenses.base import Defense
from demur.errors import DemurError
from demur.training import fit


class BackgroundClass(Defense):
    """A classifier whose reject score is the logit of a background class (McCoyd & Wagner 2018).

    Parameters
    ----------
    network : nn.Module
        A network with num_classes + 1 outputs. The last output is the background class.
    num_classes : int
        Number of key classes: the classes that are to be told apart.
    prefit : bool, default False
        Whether the network is trained already.

    Examples
    --------
    >>> from demur import data, networks
    >>> from demur.defenses import BackgroundClass
    >>> train, test = data.load("digits", "train"), data.load("digits", "test")
    >>> digits, others = train.select_classes(range(8)), train.select_classes([8, 9])
    >>> defense = BackgroundClass(networks.dnr_cnn(9), num_classes=8)
    >>> defense = defense.fit(
    ...     digits.images[:64], digits.labels[:64], others.images[:16], epochs=1, batch_size=16
    ... )
    >>> defense.rejects, defense.predict(test.to_float()[:2]).shape
    (True, torch.Size([2]))
    """

    _remedy: ClassVar[str] = ", or say prefit=True if the network is trained already"

    def __init__(self, network: nn.Module, num_classes: int, *, prefit: bool = False) -> None:
        super().__init__(network, num_classes, rejects=True, fitted=prefit)

    @classmethod
    def rebuild(
        cls,
        networks: Mapping[str, Any],
        num_classes: int,
        hyperparameters: Mapping[str, Any],
        learned: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
    ) -> Self:
        """Make a fitted defence from a bundle; see `Defense.rebuild`."""
        parameters = {**hyperparameters, "prefit": True}
        return super().rebuild(networks, num_classes, parameters, learned, tensors)

    def fit(self, images: Tensor, labels: Tensor, background: Tensor, **options: Any) -> Self:
        """Train the network on key images and background images.

        Parameters
        ----------
        images : Tensor of shape (N, C, H, W), uint8 or float in [0, 1]
            Key images.
        labels : Tensor of shape (N,), integers in 0..num_classes-1
        background : Tensor of shape (M, C, H, W), same dtype as `images`
            Images of none of the key classes.
        options
            Of `training.fit`: epochs, batch_size, seed, device, ...

        Returns
        -------
        self

        Raises
        ------
        DemurError
            If the images have different shapes or dtypes, a label is out of range, or the network
            does not have num_classes + 1 outputs.
        """
        same = images.shape[1:] == background.shape[1:] and images.dtype == background.dtype
        if not same or not len(background):
            raise DemurError(
                f"background images {tuple(background.shape)} {background.dtype} do not fit key "
                f"images {tuple(images.shape)} {images.dtype}: give at least one background image "
                "of the same shape and dtype."
            )
        check_labels(labels, len(images), self.num_classes)
        with self._fitting():
            self.scores(to_float(images[:1]))  # checks the number of outputs before the training
            classes = torch.cat([labels, labels.new_full((len(background),), self.num_classes)])
            together = torch.cat([images, background])
            self.history_ = fit(self.module, together, classes, **options)
        return self
