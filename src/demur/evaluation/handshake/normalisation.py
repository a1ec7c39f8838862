"""The usual normalisations, tried in place of the one that is inside a model, to suggest a flag."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from demur.classifier import Preprocess
from demur.evaluation.handshake.labels import better, share


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


def better_normalisation(
    answer: Callable[[Tensor], Tensor],
    images: Tensor,
    labels: Tensor,
    preprocess: Preprocess | None,
) -> tuple[Normalisation, float, float] | None:
    """Try the usual normalisations in place of the one that is inside the model.

    Parameters
    ----------
    answer : callable
        Gives the best class (n,) of images, which may lie outside [0, 1].
    images : Tensor of shape (n, C, H, W)
    labels : Tensor of shape (n,)
    preprocess : Preprocess, optional
        Its mean and std are inside the model.

    Returns
    -------
    (Normalisation, float, float) or None
        The best one, the accuracy without it and with it. None unless it is better by a paired test
        (p < 1e-4) and by at least 10 points, and doubles the accuracy or halves the error.
    """
    channels = images.shape[1]
    inner_mean, inner_std = _inside(preprocess, channels)
    before = answer(images) == labels
    best = None
    for one in usual_normalisations(channels):
        mean = torch.tensor(one.mean).view(1, -1, 1, 1)
        std = torch.tensor(one.std).view(1, -1, 1, 1)
        if torch.allclose(mean, inner_mean, atol=2e-3) and torch.allclose(std, inner_std, 0.02):
            continue
        after = answer((images - mean) / std * inner_std + inner_mean) == labels
        if best is None or int(after.sum()) > int(best[1].sum()):
            best = one, after
    if best is None or not better(before, best[1]):
        return None
    old, new = share(before), share(best[1])
    if new - old < 0.1 or (new < 2 * old and 1 - new > (1 - old) / 2):
        return None
    return best[0], old, new


def _inside(preprocess: Preprocess | None, channels: int) -> tuple[Tensor, Tensor]:
    """Give mean and std inside the model, each of shape (1, C, 1, 1)."""

    def each(values: Sequence[float], default: float) -> Tensor:
        return torch.tensor(tuple(values) or (default,)).expand(channels).view(1, -1, 1, 1)

    if preprocess is None or len(preprocess.mean) not in (0, 1, channels):
        return each((), 0.0), each((), 1.0)
    return each(preprocess.mean, 0.0), each(preprocess.std, 1.0)
