"""The usual normalisations, tried in place of the one that is inside a model, to suggest a flag."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

import torch
from torch import Tensor

from demur.classifier import Preprocess
from demur.errors import DemurError
from demur.evaluation.handshake.labels import SURE, share
from demur.metrics.intervals import paired_p_value

CLEAR: Final = 0.01
"""The largest probability of naming another normalisation where all are equally good."""


@dataclass(frozen=True)
class Normalisation:
    """A usual normalisation: (pixels - mean) / std.

    Parameters
    ----------
    name : str
    mean, std : tuple of float
        One number for each channel.
    """

    name: str
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __str__(self) -> str:
        """Give the flags."""
        mean = ",".join(f"{value:.6g}" for value in self.mean)
        std = ",".join(f"{value:.6g}" for value in self.std)
        return f"--mean {mean} --std {std}"


def usual_normalisations(channels: int) -> list[Normalisation]:
    """List the usual normalisations of images with 1 or 3 channels.

    Examples
    --------
    >>> print(usual_normalisations(1)[0])
    --mean 0 --std 1
    """
    grey = [("MNIST", 0.1307, 0.3081), ("Fashion-MNIST", 0.286, 0.353)]
    colour = [
        ("ImageNet", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ("CIFAR-10", (0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616)),
        ("CIFAR-100", (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    ]
    same = [("none", 0.0, 1.0), ("0.5", 0.5, 0.5), ("0 to 255", 0.0, 1 / 255)]
    found = [Normalisation(name, (m,) * channels, (s,) * channels) for name, m, s in same]
    if channels == 1:
        found += [Normalisation(name, (m,), (s,)) for name, m, s in grey]
    if channels == 3:
        found += [Normalisation(*one) for one in colour]
    return found


@dataclass(frozen=True)
class Better:
    """A normalisation with which a model answers more images correctly.

    Parameters
    ----------
    normalisation : Normalisation
    before, after : float
        The accuracy without it and with it, on the same images.
    gained, lost : int
        Images that only it, and only the model without it answers correctly.
    sure : bool
        Whether the difference is so large that the present normalisation must be wrong: p < 1e-4,
        at least 10 points, and twice the accuracy or half the error.
    """

    normalisation: Normalisation
    before: float
    after: float
    gained: int
    lost: int
    sure: bool


def better_normalisation(
    answer: Callable[[Tensor], Tensor],
    images: Tensor,
    labels: Tensor,
    correct: Tensor,
    preprocess: Preprocess | None,
) -> Better | None:
    """Try the usual normalisations in place of the one that is inside the model.

    A normalisation can only gain images that are wrong without it, so these are scored first. The
    others are scored only where enough of these become correct.

    Parameters
    ----------
    answer : callable
        Gives the best class (n,) of images, which may lie outside [0, 1]. It may raise DemurError
        for such images: the normalisation is left out then.
    images : Tensor of shape (n, C, H, W)
    labels : Tensor of shape (n,)
    correct : Tensor of shape (n,), bool
        Whether the model answers each image correctly as it is.
    preprocess : Preprocess, optional
        Its mean and std are inside the model.

    Returns
    -------
    Better or None
        The one with the highest accuracy. None unless its gain is no chance: McNemar's exact
        one-sided test on the same images, with p below 0.01 divided by the number of normalisations
        that were tried (Bonferroni).
    """
    tried = _others(images.shape[1], preprocess)
    best = None
    for one, normalised in tried:
        try:
            gained = _hits(answer, normalised, images, labels, ~correct)
            if _p_value(gained, 0) * len(tried) >= CLEAR:
                continue
            kept = _hits(answer, normalised, images, labels, correct)
        except DemurError:
            continue
        lost = int(correct.sum()) - kept
        if best is None or gained - lost > best[1] - best[2]:
            best = one, gained, lost
    if best is None or _p_value(*best[1:]) * len(tried) >= CLEAR:
        return None
    one, gained, lost = best
    old = share(correct)
    new = old + (gained - lost) / len(labels)
    large = new - old >= 0.1 and (new >= 2 * old or 1 - new <= (1 - old) / 2)
    return Better(one, old, new, gained, lost, large and _p_value(gained, lost) < SURE)


def _others(
    channels: int, preprocess: Preprocess | None
) -> list[tuple[Normalisation, Callable[[Tensor], Tensor]]]:
    """List the usual normalisations other than that of the model, each with the images that the
    model must be given in its place.
    """
    inner_mean, inner_std = _inside(preprocess, channels)
    found: list[tuple[Normalisation, Callable[[Tensor], Tensor]]] = []
    for one in usual_normalisations(channels):
        mean = torch.tensor(one.mean).view(1, -1, 1, 1)
        std = torch.tensor(one.std).view(1, -1, 1, 1)
        if torch.allclose(mean, inner_mean, atol=2e-3) and torch.allclose(std, inner_std, 0.02):
            continue
        scale = inner_std / std
        found.append((one, partial(_moved, scale=scale, shift=inner_mean - mean * scale)))
    return found


def _moved(images: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return images * scale + shift


def _hits(
    answer: Callable[[Tensor], Tensor],
    normalised: Callable[[Tensor], Tensor],
    images: Tensor,
    labels: Tensor,
    chosen: Tensor,
) -> int:
    """Count the chosen images (n,) bool that are answered correctly after a normalisation."""
    if not bool(chosen.any()):
        return 0
    return int((answer(normalised(images[chosen])) == labels[chosen]).sum())


def _p_value(gained: int, lost: int) -> float:
    return paired_p_value(gained, lost, max(1, gained + lost), alternative="greater")


def _inside(preprocess: Preprocess | None, channels: int) -> tuple[Tensor, Tensor]:
    """Give mean and std inside the model, each of shape (1, C, 1, 1)."""

    def each(values: Sequence[float], default: float) -> Tensor:
        return torch.tensor(tuple(values) or (default,)).expand(channels).view(1, -1, 1, 1)

    if preprocess is None or len(preprocess.mean) not in (0, 1, channels):
        return each((), 0.0), each((), 1.0)
    return each(preprocess.mean, 0.0), each(preprocess.std, 1.0)
