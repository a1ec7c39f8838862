"""What an attacker may want of inner features, as a goal's bonus: to be where known images are, or near one guide image.

`features` is a function of images (n, C, H, W) that gives one tensor (n, D) for each layer: `demur.defenses.neural_rejection.Taps`.
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
class Density:
    """The logarithm of a kernel-density estimate of known images' features, by feature, and the mean over layers: (n,) times `weight`.

    An attacker who seeks it stays where a rejection that measures closeness to known images cannot tell (the rejection paper's
    conclusion asks for it; Biggio et al. 2013, eq. 2, has it as a penalty). Make one with `density`.

    Attributes:
        known: (M, D) features of known images for each layer. width: of the Gaussian kernel for each layer.
    """

    features: Features
    known: tuple[Tensor, ...]
    width: tuple[float, ...]
    weight: float

    def __call__(self, images: Tensor) -> Tensor:
        """The weighted log density, (n,): of Gaussians without their constant, which no gradient sees."""
        layers = [
            torch.logsumexp(_squares(found, known) / (-2 * width**2), 1) / known.shape[1]
            for found, known, width in zip(_layers(self.features, images), self.known, self.width, strict=True)
        ]
        return self.weight * torch.stack(layers).mean(0)

    def select(self, index: Tensor) -> Self:
        """The same for all images."""
        return self


@dataclass(frozen=True, eq=False)
class Likeness:
    """Minus the squared distance from each image's guide at each layer, by the guide's squared length; the mean over layers, by `weight`.

    Feature matching (Sabour et al. 2016): an image whose inner features are another image's is answered as that one is, and
    accepted as it is. Make one with `likeness`.
    """

    features: Features
    guide: tuple[Tensor, ...]
    weight: float

    def __call__(self, images: Tensor) -> Tensor:
        """The weighted likeness, (n,)."""
        layers = [
            (found.to(guide) - guide).square().sum(1) / guide.square().sum(1).clamp(min=1e-12)
            for found, guide in zip(_layers(self.features, images), self.guide, strict=True)
        ]
        return -self.weight * torch.stack(layers).mean(0)

    def select(self, index: Tensor) -> Self:
        """The guides of the images of that index."""
        return replace(self, guide=tuple(guide[index.to(guide.device)] for guide in self.guide))


def density(features: Features, known: Tensor, *, weight: float = 1.0) -> Density:
    """Estimate the density of known images (M, C, H, W); each layer's kernel is as wide as the median distance between two of them."""
    if len(known) < 2:
        raise DemurError("a density needs at least two known images.")
    check_positive(weight=weight)
    found = _features_of(features, known)
    widths = []
    for layer in found:
        apart = _squares(layer, layer)[~torch.eye(len(layer), dtype=torch.bool, device=layer.device)]
        widths.append(max(float(apart.median()) ** 0.5, 1e-6))
    return Density(features, found, tuple(widths), weight)


def likeness(features: Features, guides: Tensor, *, weight: float = 1.0) -> Likeness:
    """Go for the features of guide images (N, C, H, W), one for each image that is attacked."""
    check_positive(weight=weight)
    return Likeness(features, _features_of(features, guides), weight)


def _layers(features: Features, images: Tensor) -> Sequence[Tensor]:
    """The features (n, D) of each layer, in evaluation mode and in the module's own precision."""
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
    return tuple(torch.cat([layer.flatten(1) for layer in layers]) for layers in zip(*batches, strict=True))


def _squares(left: Tensor, right: Tensor) -> Tensor:
    """Squared distances (n, M), in the precision of what is on the right, whatever an autocast around it asks for."""
    with torch.autocast(right.device.type, enabled=False):
        left, centre = left.to(right), right.mean(0)
        left, right = left - centre, right - centre
        return (left.square().sum(1, keepdim=True) + right.square().sum(1) - 2 * left @ right.T).clamp(min=0)
