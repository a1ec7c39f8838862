"""The module inside certified consistency by randomized smoothing (Cohen et al. 2019), for L2."""

import math

import torch
from scipy import stats
from torch import Tensor, nn

from demur import seeds
from demur.errors import DemurError
from demur.hardware import tuned
from demur.metrics import clopper_pearson

SELECTING = 100
"""Draws that choose the class, as in Cohen et al. 2019."""
GRADIENT_DRAWS = 64
"""Draws of the expectation that attacks differentiate."""
AT_ONCE = 1024
NEWTON = 8
"""Steps of Newton's method; five reach the precision of float64."""
NONE = -1.0
"""The radius of an image whose class is not decided."""


class SmoothedConsistent(nn.Module):
    """Maps images to scores of the smoothed classifier (N, K) and a reject score.

    The answer c is the class that the network gives most often under Gaussian noise. R is the lower
    bound of the radius within which the smoothed classifier is constant. The score of c is R, and
    the reject score is delta: an image is accepted if R > delta. The other scores are below R.

    Where gradients are enabled, the scores are those of an expectation of the softmax over 64
    draws, which an attack can differentiate. Attacks decide success again without gradients.

    Parameters
    ----------
    network : nn.Module
    num_classes : int
    delta : float
        Euclidean.
    sigma : float
        Deviation of the noise, in the unit of pixels.
    draws : int
        Noisy copies of an image that bound the radius.
    alpha : float
        Probability that the bound of one image is wrong.
    seed : int
        The noise depends on it, and on the content of the image.
    """

    def __init__(
        self,
        network: nn.Module,
        num_classes: int,
        delta: float,
        sigma: float,
        draws: int,
        alpha: float,
        seed: int,
    ) -> None:
        super().__init__()
        if not (sigma > 0 and 0 < alpha < 1):
            raise DemurError(
                f"smoothing needs sigma above 0 and alpha in (0, 1), not {sigma} and {alpha}."
            )
        self.network = network
        self.num_classes = num_classes
        self.delta = delta
        self.sigma = sigma
        self.draws = draws
        self.alpha = alpha
        self.seed = seed

    def forward(self, images: Tensor) -> Tensor:
        """Compute the scores, and the reject score last."""
        if torch.is_grad_enabled():
            return self.expected(images, self._noise(images, GRADIENT_DRAWS, "attack"))
        answers, radii, shares = self.smoothed(images, "predict")
        best = radii.clamp(min=NONE)
        others = best[:, None] - 1 + shares  # below R, in the order of their shares
        scores = others.scatter(1, answers[:, None], best[:, None])
        # At R = delta the image is rejected: the reject score must be above.
        delta = torch.full_like(best, self.delta)
        reject = torch.where(best > delta, delta, torch.maximum(delta, best + 1e-3))
        return torch.cat([scores, reject[:, None]], 1).to(images.dtype)

    def expected(self, images: Tensor, noise: Tensor) -> Tensor:
        """Compute scores (n, K + 1) that have gradients, from the mean softmax over some noise.

        Parameters
        ----------
        images : Tensor of shape (n, ...)
        noise : Tensor of shape (n, draws, ...), or (1, draws, ...) for all images

        Returns
        -------
        Tensor
            sigma Phi^-1 of the means, and delta: an image is accepted if the best of them is above.
        """
        copies = (images[:, None] + noise).flatten(0, 1)
        shares = self.network(copies).double().log_softmax(1)
        draws = noise.shape[1]
        # The mean of a class, and that of all others together: both keep their gradients near 0.
        mean = shares.view(len(images), draws, -1).logsumexp(1) - math.log(draws)
        itself = torch.eye(mean.shape[1], dtype=torch.bool, device=mean.device)
        others = mean[:, None].masked_fill(itself, -math.inf).logsumexp(2)
        likely = mean > others
        size = normal_quantile(torch.where(likely, others, mean))
        scores = self.sigma * torch.where(likely, -size, size).to(images.dtype)
        reject = torch.full_like(scores[:, :1], self.delta)
        return torch.cat([scores, reject], 1)

    def _noise(self, images: Tensor, draws: int, name: str) -> Tensor:
        """Draw (n, draws, ...): each image's noise follows from its content."""
        keys = seeds.image_keys(images)
        drawn = seeds.normal(keys, (draws, *images.shape[1:]), self.seed, "smoothing", name)
        return self.sigma * drawn.to(images)

    @torch.no_grad()
    def smoothed(self, images: Tensor, name: str) -> tuple[Tensor, Tensor, Tensor]:
        """Bound the radius of each image.

        Parameters
        ----------
        images : Tensor of shape (n, ...)
        name : str
            Names the draws: proofs and predictions have draws of their own.

        Returns
        -------
        answers : Tensor of shape (n,), int64
        radii : Tensor of shape (n,), float64
            sigma * Phi^-1 of the lower Clopper-Pearson bound of the answer's share, at the
            confidence 1 - alpha. -1 where the share may be at most one half.
        shares : Tensor of shape (n, K), float64
            Shares of the classes, without the draws that choose the answer.
        """
        answers = []
        radii = []
        shares = []
        for number in range(len(images)):
            counts = [
                self._counts(images[number : number + 1], draws, f"{name} {part}")
                for part, draws in (("select", SELECTING), ("bound", self.draws))
            ]
            answer = int(counts[0].argmax())
            low = clopper_pearson(int(counts[1][answer]), self.draws, 1 - self.alpha, "lower")[0]
            answers.append(answer)
            radii.append(self.sigma * float(stats.norm.ppf(low)) if low > 0.5 else NONE)
            shares.append(counts[1].double() / self.draws)
        device = images.device
        found = torch.tensor(radii, dtype=torch.float64, device=device)
        return torch.tensor(answers, device=device), found, torch.stack(shares).to(device) * 0.5

    def _counts(self, image: Tensor, draws: int, name: str) -> Tensor:
        """Count the classes that the network gives noisy copies of one image."""
        counts = torch.zeros(self.num_classes, dtype=torch.int64)
        kind = image.device.type
        for start in range(0, draws, AT_ONCE):
            some = min(AT_ONCE, draws - start)
            noise = self._noise(image, some, f"{name} {start}")[0]
            with tuned(), torch.autocast(kind, enabled=False):
                scores: Tensor = self.network(image + noise)
            if scores.shape[1] != self.num_classes:
                raise DemurError("randomized smoothing takes a network without a reject column.")
            counts += torch.bincount(scores.argmax(1).cpu(), minlength=self.num_classes)
        return counts

    def smoothed_radii(self, images: Tensor) -> tuple[Tensor, Tensor, float, float]:
        """Give answers and radii of draws for a proof, delta and alpha, for certificates."""
        answers, radii, _ = self.smoothed(images, "certify")
        return answers, radii, self.delta, self.alpha


def normal_quantile(log_share: Tensor) -> Tensor:
    """Compute Phi^-1(exp(l)) for l of at most log(1/2), by Newton's method on log Phi.

    `torch.special.ndtri(l.exp())` has no gradient where exp(l) is 0 in floating point. Attacks need
    one there: the means of a sharp network are nearly 0 or 1.

    Parameters
    ----------
    log_share : Tensor of float64

    Returns
    -------
    Tensor
        Its gradient is exact.

    Examples
    --------
    >>> normal_quantile(torch.tensor([0.025, 0.5], dtype=torch.float64).log()).round(decimals=3)
    tensor([-1.9600,  0.0000], dtype=torch.float64)
    """
    with torch.no_grad():
        found = -(-2 * log_share).clamp(min=0).sqrt()  # left of it: Newton's steps do not overshoot
        for _ in range(NEWTON):
            found = found + (log_share - torch.special.log_ndtr(found)) / _slope(found)
        slope = _slope(found)
        found = found - log_share / slope
    return found + log_share / slope


def _slope(place: Tensor) -> Tensor:
    """Give the derivative of log Phi."""
    density = -0.5 * place.square() - 0.5 * math.log(2 * math.pi)
    behind: Tensor = torch.special.log_ndtr(place)
    return (density - behind).exp()


class Expected(nn.Module):
    """Maps images to the scores of an expectation over some draws, with or without gradients.

    An attack that asks it decides by these scores, and not by all draws of the smoothed classifier.

    Parameters
    ----------
    smoothed : SmoothedConsistent
    draws : int
    common : bool
        Whether all images have the same noise at every step, instead of noise by their content.
    """

    def __init__(self, smoothed: SmoothedConsistent, draws: int, common: bool) -> None:
        super().__init__()
        self.smoothed = smoothed
        self.draws = draws
        self.common = common

    def forward(self, images: Tensor) -> Tensor:
        """Compute the scores (N, K + 1)."""
        smoothed = self.smoothed
        if not self.common:
            return smoothed.expected(images, smoothed._noise(images, self.draws, "attack"))
        shape = (self.draws, *images.shape[1:])
        drawn = seeds.normal([0], shape, smoothed.seed, "smoothing", "common")
        return smoothed.expected(images, smoothed.sigma * drawn.to(images))
