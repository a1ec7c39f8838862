"""Augmentation: random changes of a batch that leave its labels right."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from demur.classifier import check_counts


@dataclass(frozen=True)
class CropAndFlip:
    """Shift each image by some pixels at random, and mirror half of them: a batch transform.

    An image is padded with zeros and cropped to its size at a random place, which is the usual
    augmentation of CIFAR-10 (He et al. 2016, sec. 4.2). The draws come from torch's global
    generator, which `fit` seeds for each step.

    Parameters
    ----------
    padding : int, default 4
        Largest shift in pixels.
    flip : bool, default True
        Whether half of the images are mirrored.

    Examples
    --------
    >>> images = torch.rand(2, 3, 8, 8)
    >>> changed, labels = CropAndFlip()(nn.Identity(), images, torch.tensor([0, 1]), 0)
    >>> changed.shape
    torch.Size([2, 3, 8, 8])
    """

    padding: int = 4
    flip: bool = True

    def __post_init__(self) -> None:
        check_counts(padding=self.padding)

    def __call__(
        self, network: nn.Module, images: Tensor, labels: Tensor, step: int
    ) -> tuple[Tensor, Tensor]:
        """Change images of shape (n, C, H, W)."""
        count, _, height, width = images.shape
        padded = nn.functional.pad(images, [self.padding] * 4)
        down, right = torch.randint(2 * self.padding + 1, (2, count, 1))
        rows = torch.arange(height) + down
        columns = torch.arange(width).expand(count, width)
        if self.flip:
            columns = torch.where(torch.rand(count, 1) < 0.5, columns.flip(1), columns)
        chosen = [torch.arange(count)[:, None, None], rows[:, :, None], (columns + right)[:, None]]
        image, row, column = (one.to(images.device) for one in chosen)
        return padded.permute(0, 2, 3, 1)[image, row, column].permute(0, 3, 1, 2), labels
