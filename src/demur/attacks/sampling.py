"""Square on some of the images: on those nearest to an error, and on a random sample of the rest.

Square costs thousands of passes for each image, and rarely breaks one that gradients have not
broken. Where it does, either the image was near an error already, or gradients are hidden. The
sample shows hidden gradients.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from demur import seeds
from demur.attacks.tally import Tally
from demur.errors import amount

CONFIDENCE = 0.95


@dataclass(frozen=True)
class SquareSample:
    """On which images Square ran, and what that says of the others.

    Attributes
    ----------
    left : int
        Images that no attack before Square broke.
    attacked : int
        Those among them that Square met.
    broken : int
        Those among the attacked ones that Square broke.
    sampled : int
        Those among the attacked ones that were chosen at random; 0 if Square met all images.

    Examples
    --------
    >>> from demur.attacks import SquareSample
    >>> SquareSample(left=250, attacked=96, broken=2, sampled=64).bound
    0.0457...
    """

    left: int
    attacked: int
    broken: int
    sampled: int

    @property
    def bound(self) -> float:
        """Upper bound, at 95 % confidence, on the share that Square would break of the images that
        it did not meet: 1 - .05^(1/m) after none of m sampled images; 0 if it met all.
        """
        if self.attacked == self.left:
            return 0.0
        return float(1 - (1 - CONFIDENCE) ** (1 / self.sampled))

    def __str__(self) -> str:
        """Give one or two sentences for a report."""
        if self.attacked == self.left:
            images = amount(self.left, "image left", "images left")
            return f"Square attacked {'all ' * (self.left > 1)}{images}, and broke {self.broken}."
        return (
            f"Square attacked {self.attacked} of {self.left} images left, and broke "
            f"{self.broken}: {self.attacked - self.sampled} nearest to an error, and "
            f"{self.sampled} at random, of which it broke none. With 95 % confidence it breaks "
            f"at most {100 * self.bound:.1f} % of the {self.left - self.attacked} others."
        )


def attack_in_stages(
    meet: Callable[[Tensor], None], tally: Tally, images: Tensor, size: int | None, seed: int
) -> SquareSample:
    """Attack the images left, the most promising ones first, and all of them if there is a reason.

    First come the images whose margin is nearest to success, half as many as `size`, and a random
    sample of `size` of the rest. If one of the sample breaks, all images follow. Otherwise the next
    nearest ones follow, as many again, until none of them breaks.

    Parameters
    ----------
    meet : callable
        Attacks the images at the given indices, and tells the tally.
    tally : Tally
    images : Tensor of shape (N, C, H, W)
        The sample depends on the pixels of the images left and on the seed, not on their order.
    size : int or None
        None attacks all images left at once.
    seed : int

    Returns
    -------
    SquareSample
    """
    left = tally.left(bounded=True)
    nearest = 0 if size is None else max(1, size // 2)
    if size is None or len(left) <= size + nearest:
        meet(left)
        return SquareSample(len(left), len(left), _broken(tally, left), 0)
    order = left[tally.margins[left].argsort(descending=True, stable=True)]
    block, rest = order[:nearest], order[nearest:]
    sample = _at_random(images, rest, size, seed)
    met = torch.cat([block, sample])
    meet(met)
    hidden = bool(_broken(tally, sample))
    while hidden or _broken(tally, block):
        others = order[~torch.isin(order, met)]
        block = others if hidden else others[:nearest]
        if not len(block):
            break
        meet(block)
        met = torch.cat([met, block])
        if hidden:
            break
    sampled = 0 if len(met) == len(left) else len(sample)
    return SquareSample(len(left), len(met), _broken(tally, met), sampled)


def _broken(tally: Tally, rows: Tensor) -> int:
    return int(tally.best.success[rows].sum())


def _at_random(images: Tensor, rows: Tensor, size: int, seed: int) -> Tensor:
    """Choose at least `size` of the rows by the pixels and the seed. Equal images go together."""
    keys = seeds.image_keys(images[rows])
    ranks = [seeds.derive(seed, "Square's sample", key) for key in keys]
    last = sorted(ranks)[size - 1]
    return rows[torch.tensor([rank <= last for rank in ranks], device=rows.device)]
