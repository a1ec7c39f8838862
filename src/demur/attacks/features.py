"""Regularizers over inner features: stay where known images are, or near one guide image.

`features` is a function of images (n, C, H, W) that gives one tensor (n, D) for each layer, for
example `demur.networks.FeatureExtractor`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor, nn

from demur.attacks.checks import check_positive
from demur.classifier import check_images, device_of, evaluating
from demur.errors import DemurError

Features = Callable[[Tensor], Sequence[Tensor]]


@dataclass(frozen=True, eq=False)
class FeatureDensity:
    """The regularizer that `feature_density` makes.

    Attributes
    ----------
    features : callable
    known : tuple of Tensor of shape (M, D)
        Features of known images, one tensor for each layer.
    width : tuple of float
        Width of the Gaussian kernel of each layer.
    weight : float
    """

    features: Features
    known: tuple[Tensor, ...]
    width: tuple[float, ...]
    weight: float

    def __call__(self, images: Tensor) -> Tensor:
        """Compute the weighted log density, (n,), without the constants of the Gaussians."""
        layers = []
        found = _layers(self.features, images)
        for layer, known, width in zip(found, self.known, self.width, strict=True):
            squares = _squares(layer, known)
            layers.append(torch.logsumexp(squares / (-2 * width**2), 1) / known.shape[1])
        return self.weight * torch.stack(layers).mean(0)

    def select(self, index: Tensor) -> Self:
        """Give itself: the density is the same for all images."""
        return self


@dataclass(frozen=True, eq=False)
class FeatureMatching:
    """The regularizer that `feature_matching` makes.

    Attributes
    ----------
    features : callable
    guide : tuple of Tensor of shape (N, D)
        Features of the guide images, one tensor for each layer.
    weight : float
    """

    features: Features
    guide: tuple[Tensor, ...]
    weight: float

    @property
    def count(self) -> int:
        """Number of guide images N. An attack refuses another number of images."""
        return len(self.guide[0])

    def __call__(self, images: Tensor) -> Tensor:
        """Compute the negative weighted distance, (n,)."""
        layers = []
        for layer, guide in zip(_layers(self.features, images), self.guide, strict=True):
            square = (layer.to(guide) - guide).square().sum(1)
            layers.append(square / guide.square().sum(1).clamp(min=1e-12))
        return -self.weight * torch.stack(layers).mean(0)

    def select(self, index: Tensor) -> Self:
        """Give the guides of the images at `index`."""
        return replace(self, guide=tuple(guide[index.to(guide.device)] for guide in self.guide))


def feature_density(features: Features, known: Tensor, *, weight: float = 1.0) -> FeatureDensity:
    """Make a regularizer: the log of a kernel density estimate of known images' features, averaged
    over layers.

    An attacker that seeks a high density stays where a rejection that measures closeness to known
    images cannot detect it. The conclusion of the rejection paper asks for it; Biggio et al. 2013,
    eq. 2, has it as a penalty.

    Parameters
    ----------
    features : callable
        Gives one tensor (n, D) for each layer.
    known : Tensor of shape (M, C, H, W), float in [0, 1]
        At least two known images. The kernel of each layer is as wide as the median distance
        between two of them.
    weight : float, default 1
        Factor of the term.

    Returns
    -------
    FeatureDensity

    Raises
    ------
    DemurError
        If there are fewer than two known images, or the weight is not positive.

    Examples
    --------
    >>> import torch
    >>> from demur.attacks import feature_density
    >>> images = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    >>> feature_density(lambda x: [x.flatten(1)], images)(images).shape
    torch.Size([4])
    """
    if len(known) < 2:
        raise DemurError("a density needs at least two known images.")
    check_positive(weight=weight)
    found = _features_of(features, known)
    widths = []
    for layer in found:
        others = ~torch.eye(len(layer), dtype=torch.bool, device=layer.device)
        apart = _squares(layer, layer)[others]
        widths.append(max(float(apart.median()) ** 0.5, 1e-6))
    return FeatureDensity(features, found, tuple(widths), weight)


def feature_matching(features: Features, guides: Tensor, *, weight: float = 1.0) -> FeatureMatching:
    """Make a regularizer: minus the squared distance of features from those of guide images,
    averaged over layers.

    Feature matching (Sabour et al. 2016): an image with the inner features of another image is
    answered and accepted like that image. Each distance is divided by the squared length of the
    guide's features.

    Parameters
    ----------
    features : callable
        Gives one tensor (n, D) for each layer.
    guides : Tensor of shape (N, C, H, W), float in [0, 1]
        One guide for each attacked image.
    weight : float, default 1
        Factor of the term.

    Returns
    -------
    FeatureMatching

    Raises
    ------
    DemurError
        If the weight is not positive, or the guides are no images in [0, 1].

    Examples
    --------
    >>> import torch
    >>> from demur.attacks import feature_matching
    >>> images = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    >>> float(feature_matching(lambda x: [x.flatten(1)], images)(images).abs().max())
    0.0
    """
    check_positive(weight=weight)
    return FeatureMatching(features, _features_of(features, guides), weight)


def _layers(features: Features, images: Tensor) -> Sequence[Tensor]:
    """Compute the features (n, D) of each layer in the module's precision."""
    module = features if isinstance(features, nn.Module) else nn.Identity()
    parameter = next(module.parameters(), None)
    with evaluating(module):
        return features(images if parameter is None else images.to(parameter.dtype))


@torch.no_grad()
def _features_of(features: Features, images: Tensor, batch_size: int = 256) -> tuple[Tensor, ...]:
    check_images(images)
    module = features if isinstance(features, nn.Module) else nn.Identity()
    device = device_of(module, images.device)
    batches = [_layers(features, batch.to(device)) for batch in torch.split(images, batch_size)]
    by_layer = zip(*batches, strict=True)
    return tuple(torch.cat([layer.flatten(1) for layer in layers]) for layers in by_layer)


def _squares(left: Tensor, right: Tensor) -> Tensor:
    """Compute squared distances (n, M) in the precision of `right`, whatever autocast asks for."""
    with torch.autocast(right.device.type, enabled=False):
        centre = right.mean(0)
        left = left.to(right) - centre
        right = right - centre
        lengths = left.square().sum(1, keepdim=True) + right.square().sum(1)
        return (lengths - 2 * left @ right.T).clamp(min=0)
