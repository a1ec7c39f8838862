"""Training for randomized smoothing in L2: noise on the images, and consistent answers under it."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from demur.classifier import check_counts
from demur.errors import DemurError
from demur.seeds import generator


@dataclass(frozen=True)
class GaussianNoise:
    """A batch transform: noise on each image, for randomized smoothing (Cohen et al. 2019).

    Parameters
    ----------
    sigma : float
        Deviation, in the unit of pixels.
    seed : int, default 0

    Examples
    --------
    >>> images, labels = GaussianNoise(0.1)(nn.Identity(), torch.zeros(2, 4), torch.zeros(2), 0)
    >>> bool(0 < images.std() < 0.3)
    True
    """

    sigma: float
    seed: int = 0

    def __call__(
        self, network: nn.Module, images: Tensor, labels: Tensor, step: int
    ) -> tuple[Tensor, Tensor]:
        """Add noise that depends on the step."""
        draw = generator(self.seed, "noise", step)
        noise = torch.randn(images.shape, generator=draw).to(images)
        return images + self.sigma * noise, labels


@dataclass(frozen=True)
class SmoothingLoss:
    """A loss for `fit`: cross-entropy of noisy copies, and consistency of their answers.

    With F_i the softmax of copy i of m, and F their mean, the loss is the mean of CE(F_i, y), plus
    weight times the mean of KL(F || F_i), plus entropy times H(F) (Jeong & Shin 2020). The draws
    come from torch's global generator, which `fit` seeds for each step.

    Parameters
    ----------
    sigma : float
        Deviation of the noise, in the unit of pixels. That of the smoothed classifier.
    weight : float, default 10
        Of the consistency (lambda). On MNIST, Jeong & Shin take 10 with sigma .25 and 5 with .5.
    entropy : float, default 0.5
        Of the entropy of the mean (eta).
    copies : int, default 2
        Noisy copies of each image (m). One copy with entropy 0 is training with noise alone (Cohen
        et al. 2019).

    Examples
    --------
    >>> loss = SmoothingLoss(0.25)
    >>> value, scores = loss(nn.Flatten(), torch.rand(4, 1, 1, 3), torch.tensor([0, 1, 2, 0]), 0.0)
    >>> value.shape, scores.shape
    (torch.Size([]), torch.Size([4, 3]))
    """

    sigma: float
    weight: float = 10.0
    entropy: float = 0.5
    copies: int = 2

    def __post_init__(self) -> None:
        check_counts(copies=self.copies)
        if not self.sigma > 0 or min(self.weight, self.entropy) < 0:
            raise DemurError(
                "training for smoothing needs sigma above 0, and no negative weight or entropy."
            )

    def __call__(
        self, network: nn.Module, images: Tensor, labels: Tensor, epoch: float
    ) -> tuple[Tensor, Tensor]:
        """Compute the loss, and scores: the logarithm of the mean softmax.

        Parameters
        ----------
        network : nn.Module
        images : Tensor of shape (n, ...), in [0, 1]
        labels : Tensor of shape (n,), int64
        epoch : float
            Of no effect.

        Returns
        -------
        loss : Tensor of shape ()
        scores : Tensor of shape (n, outputs)
        """
        with torch.autocast(images.device.type, enabled=False):
            copies = images.repeat(self.copies, *[1] * (images.ndim - 1))
            each = network(copies + self.sigma * torch.randn_like(copies)).log_softmax(1)
            each = each.view(self.copies, len(images), -1)
            mean = each.logsumexp(0) - math.log(self.copies)
            clean = nn.functional.nll_loss(each.flatten(0, 1), labels.repeat(self.copies))
            shares = mean.exp()
            divergence = (shares * (mean - each)).sum(2).mean()
            spread = -(shares * mean).sum(1).mean()
            return clean + self.weight * divergence + self.entropy * spread, mean
