"""Small classifiers whose behaviour is known, for tests."""

import torch
from torch import Tensor, nn

from demur import Classifier


class Linear(nn.Module):
    """scores = W x + b, on flattened images."""

    def __init__(self, weights: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.weights = nn.Parameter(weights)
        self.bias = nn.Parameter(
            torch.zeros(len(weights), dtype=weights.dtype) if bias is None else bias
        )

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1) @ self.weights.T + self.bias


def linear(outputs: int, pixels: int, num_classes: int, seed: int = 0) -> Classifier:
    """A random linear classifier; with outputs == num_classes + 1 it has a reject column."""
    generator = torch.Generator().manual_seed(seed)
    return Classifier(Linear(torch.randn(outputs, pixels, generator=generator)), num_classes)


class Constant(nn.Module):
    """The same scores for every image, whatever is in it."""

    def __init__(self, scores: list[float]) -> None:
        super().__init__()
        self.scores = torch.tensor(scores)

    def forward(self, images: Tensor) -> Tensor:
        return self.scores.expand(len(images), -1) + 0 * images.flatten(1).sum(1, keepdim=True)


def convolutional(
    num_classes: int, outputs: int | None = None, size: int = 8, seed: int = 0
) -> Classifier:
    """A small network with batch norm and dropout, untrained, in training mode."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Classifier(
            nn.Sequential(
                nn.Conv2d(1, 8, 3),
                nn.BatchNorm2d(8),
                nn.ReLU(),
                nn.Dropout(0.5),
                nn.Flatten(),
                nn.Linear(8 * (size - 2) ** 2, outputs or num_classes),
            ),
            num_classes,
        )


def images_of(
    count: int, channels: int = 1, size: int = 8, seed: int = 0, levels: int = 255
) -> Tensor:
    """Random images on the grid of 8-bit levels (or fewer), float32 in [0, 1]."""
    return (
        torch.randint(
            0,
            levels + 1,
            (count, channels, size, size),
            generator=torch.Generator().manual_seed(seed),
        )
        / levels
    )
