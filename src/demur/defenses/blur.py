"""Blurring as a preprocessing defence: the same filter at training and at prediction.

Jézéquel 2019, Protecting networks against adversarial attacks, sec. 3. The filter is part of the
classifier, so every attack goes through it.
"""

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from demur.classifier import Classifier, check_labels
from demur.data import to_float
from demur.defenses.base import Defense
from demur.defenses.filters import GaussianFilter, MedianFilter
from demur.training import fit


class _Blur(Defense):
    """A network behind a filter."""

    places: ClassVar[Mapping[str, str]] = {"network": "module.network"}

    def __init__(
        self, blur: nn.Module, network: nn.Module, num_classes: int, rejects: bool | None
    ) -> None:
        module = nn.Sequential(OrderedDict(filter=blur, network=network))
        super().__init__(module, num_classes, rejects, fitted=True)

    @property
    def filter(self) -> nn.Module:
        """The filter in front of the network."""
        return self.module.get_submodule("filter")

    def fit(self, images: Tensor, labels: Tensor, **options: Any) -> Self:
        """Train the network on filtered images only (sec. 3).

        Parameters
        ----------
        images : Tensor of shape (N, C, H, W), uint8 or float in [0, 1]
        labels : Tensor of shape (N,), integers in 0..num_classes-1
        options
            Of `training.fit`: epochs, batch_size, seed, device, ...

        Returns
        -------
        self
        """
        check_labels(labels, len(images), self.num_classes)
        self.scores(to_float(images[:1]))  # checks the number of outputs before the training
        self.history_ = fit(self.module, images, labels, **options)
        return self

    def _probabilities(self, scores: Tensor) -> Tensor:
        inner = self.network
        if isinstance(inner, Classifier) and inner.num_classes == self.num_classes:
            return inner._probabilities(scores)
        return scores.softmax(1)


class GaussianBlur(_Blur):
    """A classifier that sees images through a Gaussian blur. It can be used without `fit`.

    Parameters
    ----------
    network : nn.Module
        A network or classifier: images (N, C, H, W) in [0, 1] to scores, with or without a reject
        column.
    num_classes : int
        Number of classes K.
    sigma : float, in pixels, above 0, default 1.5
        Standard deviation of the Gaussian. The default is the paper's best.
    rejects : bool, optional
        Whether the scores have a reject column. If None, the first forward pass decides.

    Raises
    ------
    DemurError
        If sigma is not above 0, or images are too small for it.

    Examples
    --------
    >>> import torch
    >>> from demur.defenses import GaussianBlur
    >>> network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3))
    >>> GaussianBlur(network, 3, sigma=1.0).predict(torch.rand(2, 1, 8, 8)).shape
    torch.Size([2])
    """

    def __init__(
        self,
        network: nn.Module,
        num_classes: int,
        sigma: float = 1.5,
        *,
        rejects: bool | None = None,
    ) -> None:
        super().__init__(GaussianFilter(sigma), network, num_classes, rejects)
        self.sigma = sigma

    def hyperparameters(self) -> dict[str, Any]:
        """Give sigma, as JSON."""
        return {"sigma": self.sigma}


class MedianBlur(_Blur):
    """A classifier that sees images through a median blur. It can be used without `fit`.

    Parameters
    ----------
    network : nn.Module
        A network or classifier: images (N, C, H, W) in [0, 1] to scores, with or without a reject
        column.
    num_classes : int
        Number of classes K.
    size : int, in pixels, odd, at most 15, default 3
        Side of the window of the median.
    rejects : bool, optional
        Whether the scores have a reject column. If None, the first forward pass decides.

    Raises
    ------
    DemurError
        If the size is even, below 1 or above 15, or images are too small for it.

    Examples
    --------
    >>> import torch
    >>> from demur.defenses import MedianBlur
    >>> network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3))
    >>> MedianBlur(network, 3, size=5).predict(torch.rand(2, 1, 8, 8)).shape
    torch.Size([2])
    """

    def __init__(
        self, network: nn.Module, num_classes: int, size: int = 3, *, rejects: bool | None = None
    ) -> None:
        super().__init__(MedianFilter(size), network, num_classes, rejects)
        self.size = size

    def hyperparameters(self) -> dict[str, Any]:
        """Give the size, as JSON."""
        return {"size": self.size}
