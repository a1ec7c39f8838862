"""Unstable predictions: how much the scores change under small noise."""

from dataclasses import dataclass
from typing import ClassVar, Final

import torch
from torch import Tensor

from demur import seeds
from demur.classifier import Classifier
from demur.evaluation.store import Computed
from demur.goals import Evade

FLOOR: Final = 0.1
"""Of the median margin: a smaller margin counts as this much, since its ratio means nothing."""


@dataclass(frozen=True)
class Stability:
    """Indicator 2 of Pintor et al. 2022: the relative change of the loss under small noise.

    For an image x, it is the mean over draws d, uniform in +-radius/2, of
    abs(L(x) - L(x + d)) / abs(L(x)), each at most 1. L is the margin of the true class over the
    best other one. The reject score is left out.

    Deviations: the paper takes the loss of the attack, mostly the cross-entropy. Near zero its
    ratios mean nothing. The margin is used here, and a small one counts as `FLOOR` times the
    median margin of the images. The neighbourhood is that of the clean image.

    Parameters
    ----------
    draws : int
    radius : float, default 8 / 255
        In Linf.

    Examples
    --------
    >>> from demur import Classifier
    >>> network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3))
    >>> images, labels = torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 2, 0])
    >>> probe = Stability(draws=5)
    >>> _, found = probe.run(Classifier(network, 3), images, labels, seed=0, batch_size=4)
    >>> found["change"].shape
    torch.Size([4])
    """

    title: ClassVar[str] = "unstable predictions"
    draws: int
    radius: float = 8 / 255

    def run(
        self, model: Classifier, images: Tensor, labels: Tensor, seed: int, batch_size: int
    ) -> Computed:
        """Give the mean change of each image: `change` (n,)."""
        here = _margins(model, images, labels, batch_size)
        floor = max(FLOOR * float(here.abs().median()), torch.finfo(torch.float32).tiny)
        keys = seeds.image_keys(images)
        total = torch.zeros(len(images))
        for draw in range(self.draws):
            noise = 2 * seeds.uniform(keys, images.shape[1:], seed, "stability", draw) - 1
            moved = (images + self.radius / 2 * noise).clamp(0, 1)
            there = _margins(model, moved, labels, batch_size)
            total += ((there - here).abs() / here.abs().clamp(min=floor)).clamp(max=1)
        return {}, {"change": total / self.draws}

    def passes(self) -> tuple[float, float]:
        """One forward pass for each draw."""
        return self.draws + 1, 0


def _margins(model: Classifier, images: Tensor, labels: Tensor, batch_size: int) -> Tensor:
    classes = model.scores(images, batch_size)[:, : model.num_classes]
    return -Evade().margin(classes, labels, model.num_classes)
