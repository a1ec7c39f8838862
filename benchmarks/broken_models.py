"""Thirteen defences that hide their weakness from attacks, and eleven honest models.

The regression set of the self-tests: `tests/test_broken_models.py` and `benchmarks/selftests.py`
audit these models. Each broken one is a small network, its honest twin, behind a trick that makes
attacks with gradients fail and no image safer.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Final

import torch
from torch import Tensor, nn

from demur import Classifier, data, masks
from demur.attacks import PGD
from demur.data import ImageSet, synthetic_backgrounds
from demur.defenses import (
    AdversarialTraining,
    BackgroundClass,
    ConfidenceThreshold,
    DeepNeuralRejection,
    EitherRejects,
    GaussianBlur,
    MedianBlur,
    NeuralRejection,
)
from demur.training import fit

CLASSES: Final = 10
EPS: Final = 0.1
"""In Linf: the threat of the audits, and of the trainings."""


@dataclass(frozen=True)
class Material:
    """What the models are made of.

    Parameters
    ----------
    train : ImageSet
        Grey images of 28x28 pixels.
    seed : int
        Of weights and trainings.
    epochs : int
    """

    train: ImageSet
    seed: int = 0
    epochs: int = 15

    def images(self) -> tuple[Tensor, Tensor]:
        """Give the images (N, 1, 28, 28), uint8, and the labels."""
        return self.train.images, self.train.labels

    def fitted(self, network: nn.Module) -> nn.Module:
        """Train a network without an attack."""
        options = {"epochs": self.epochs, "batch_size": 64, "seed": self.seed, "device": "cpu"}
        fit(network, *self.images(), **options)  # type: ignore[arg-type]
        return network.eval()

    def network(
        self, outputs: int = CLASSES, activation: Callable[[], nn.Module] = nn.ReLU
    ) -> nn.Sequential:
        """Build a small network, without training."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return nn.Sequential(
                nn.AvgPool2d(2),
                nn.Conv2d(1, 16, 3, stride=2, padding=1),
                activation(),
                nn.Flatten(),
                nn.Linear(16 * 7 * 7, 64),
                activation(),
                nn.Linear(64, outputs),
            )

    def plain(self) -> nn.Module:
        """Train the honest twin."""
        return self.fitted(self.network())


# Broken


class KWinnersTakeAll(nn.Module):
    """Keep the largest tenth of the activations of an image (Xiao et al. 2020)."""

    def __init__(self, share: float = 0.1) -> None:
        super().__init__()
        self.share = share

    def forward(self, values: Tensor) -> Tensor:
        """Compute it."""
        flat = values.flatten(1)
        least = flat.topk(max(1, int(self.share * flat.shape[1])), 1).values[:, -1:]
        return (flat * (flat >= least)).view_as(values)


class Before(nn.Module):
    """A network behind a function of the images."""

    def __init__(self, function: Callable[[Tensor], Tensor], network: nn.Module) -> None:
        super().__init__()
        self.function = function
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        """Compute it."""
        scores: Tensor = self.network(self.function(images))
        return scores


class After(Before):
    """A network before a function of its scores."""

    def forward(self, images: Tensor) -> Tensor:
        """Compute it."""
        return self.function(self.network(images))


class Sparse(nn.Module):
    """Set activations near their mean to the mean, which blocks the gradient (MeanSparse)."""

    def __init__(self, width: float = 3.0) -> None:
        super().__init__()
        self.width = width

    def forward(self, values: Tensor) -> Tensor:
        """Compute it."""
        flat = values.flatten(1)
        mean, spread = flat.mean(1, keepdim=True), flat.std(1, keepdim=True)
        away = (flat - mean).abs() > self.width * spread
        rounded = mean.detach() + ((flat - mean) / (0.2 * spread)).detach().round() * 0.2 * spread
        return torch.where(away, flat, rounded.detach()).view_as(values)


def noisy(images: Tensor) -> Tensor:
    """Add noise."""
    return images + 0.15 * torch.randn_like(images)


def reseeded(images: Tensor) -> Tensor:
    """Add the same noise in each call, by a seed of the whole process."""
    torch.manual_seed(1)
    return noisy(images)


def quantised(images: Tensor, levels: int = 16) -> Tensor:
    """Round pixels to levels that are nearer to each other than EPS."""
    return (images * levels).round() / levels


def compressed(images: Tensor) -> Tensor:
    """Round the cosine transform of each block of 4x4 pixels, as JPEG does."""
    steps = torch.arange(4)
    cosines = torch.cos(torch.pi * (2 * steps[None] + 1) * steps[:, None] / 8)
    basis = cosines * torch.where(steps == 0, 0.5, 0.5**0.5)[:, None]
    blocks = images.unfold(2, 4, 4).unfold(3, 4, 4)
    spectrum = basis @ blocks @ basis.T
    back = basis.T @ ((spectrum * 5).round() / 5) @ basis
    return back.permute(0, 1, 2, 4, 3, 5).reshape(images.shape)


class Detached(nn.Module):
    """Compute the scores without a gradient, and add a gradient that tells nothing."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        """Compute it."""
        scores: Tensor = self.network(images.detach())
        return scores + 1e-4 * images.flatten(1)[:, : scores.shape[1]]


class OfTheBatch(nn.Module):
    """Normalise by the statistics of the batch, in evaluation mode too."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        """Compute it."""
        centred = images - images.mean((0, 2, 3), keepdim=True)
        scores: Tensor = self.network(centred / images.std().clamp(min=1e-3))
        return scores


class Counting(nn.Module):
    """Answer as the network for so many calls, and then one class for everything."""

    def __init__(self, network: nn.Module, calls: int = 150) -> None:
        super().__init__()
        self.network = network
        self.calls = calls

    def forward(self, images: Tensor) -> Tensor:
        """Compute it."""
        self.calls -= 1
        scores: Tensor = self.network(images)
        if self.calls >= 0:
            return scores
        return scores.roll(1, 1)


class Checkerboard(nn.Module):
    """Raise the best score by an amount that changes fast and far with the image."""

    def __init__(self, network: nn.Module, height: float = 30.0, pitch: float = 400.0) -> None:
        super().__init__()
        self.network = network
        self.height = height
        self.pitch = pitch

    def forward(self, images: Tensor) -> Tensor:
        """Compute it."""
        scores: Tensor = self.network(images)
        board = (self.pitch * images.flatten(1)[:, ::3]).sin().mean(1, keepdim=True) * 10
        best = nn.functional.one_hot(scores.argmax(1), scores.shape[1])
        return scores + best * self.height * (1 + board.sin())


class SignDetector(nn.Module):
    """Reject an image whose pixels differ from their neighbourhood, by a step without gradient."""

    def __init__(self, network: nn.Module, limit: float) -> None:
        super().__init__()
        self.network = network
        self.limit = limit

    def rough(self, images: Tensor) -> Tensor:
        """Measure how rough dark places are (N,): attacks by signs make them rough."""
        around = nn.functional.avg_pool2d(images, 3, 1, 1)
        rough = (images - around).abs() * (around < 0.3)
        return rough.flatten(1).mean(1)

    def forward(self, images: Tensor) -> Tensor:
        """Compute it."""
        scores: Tensor = self.network(images)
        attacked = (self.rough(images) > self.limit).to(scores)
        reject = scores.amax(1).detach() + 20 * attacked - 10
        return torch.cat([scores, reject[:, None]], 1)


def saturated(scores: Tensor) -> Tensor:
    """Give probabilities that are 0 or 1 in float32."""
    return (1e4 * scores).softmax(1)


def detector(scores: Tensor) -> Tensor:
    """Give probabilities at a temperature of 1e-3, and reject below .9."""
    sure = (1e3 * scores).softmax(1)
    return torch.cat([sure, torch.full_like(sure[:, :1], 0.9)], 1)


def _sign_detector(material: Material) -> Classifier:
    made = SignDetector(material.plain(), 0.0)
    clean = made.rough(material.train.to_float()[:2000])
    made.limit = float(clean.quantile(0.98))
    return Classifier(made, CLASSES, rejects=True)


def _wrapped(wrap: Callable[[nn.Module], nn.Module], material: Material) -> Classifier:
    return Classifier(wrap(material.plain()), CLASSES)


def _kwta(material: Material) -> Classifier:
    return Classifier(material.fitted(material.network(activation=KWinnersTakeAll)), CLASSES)


def _sparse(material: Material) -> Classifier:
    network = material.plain()
    assert isinstance(network, nn.Sequential)
    parts = [(nn.Sequential(one, Sparse()) if isinstance(one, nn.ReLU) else one) for one in network]
    return Classifier(nn.Sequential(*parts), CLASSES)


def _of_the_batch(material: Material) -> Classifier:
    return Classifier(material.fitted(OfTheBatch(material.network())), CLASSES)


BROKEN: Final[Mapping[str, Callable[[Material], Classifier]]] = {
    "kWTA activations": _kwta,
    "quantised input": partial(_wrapped, partial(Before, quantised)),
    "sparse activations": _sparse,
    "saturated softmax": partial(_wrapped, partial(After, saturated)),
    "randomised input": partial(_wrapped, partial(Before, noisy)),
    "detached gradient": partial(_wrapped, Detached),
    "batch statistics": _of_the_batch,
    "reseeding": partial(_wrapped, partial(Before, reseeded)),
    "call counter": partial(_wrapped, Counting),
    "compression": partial(_wrapped, partial(Before, compressed)),
    "checkerboard": partial(_wrapped, Checkerboard),
    "sign detector": _sign_detector,
    "temperature-scaled detector": lambda material: Classifier(
        After(detector, material.plain()), CLASSES, rejects=True
    ),
}
"""The broken models, by name."""


# Honest


def _adversarial(material: Material, box: int | None = None) -> Classifier:
    """Train on images that are attacked everywhere, or outside a centred box of such a side."""
    around = None if box is None else masks.outside(masks.centre_box((28, 28), box, box))
    attack = PGD(steps=5, random_start=True)
    made = AdversarialTraining(material.plain(), CLASSES, attack, f"linf:{EPS}", mask=around)
    return made.fit(*material.images(), epochs=max(1, material.epochs // 3), batch_size=64)


def _background(material: Material) -> Classifier:
    both = synthetic_backgrounds(material.train, len(material.train) // 20, material.seed)
    others = both.images[both.labels >= CLASSES]
    made = BackgroundClass(material.network(CLASSES + 1), num_classes=CLASSES)
    return made.fit(*material.images(), others, epochs=material.epochs, batch_size=64)


def _neural(material: Material, deep: bool = False) -> Classifier:
    images, labels = material.images()
    options = {"C": 10.0, "false_rejection_rate": 0.05}
    some = slice(0, 1400)
    if deep:
        layers = ["2", "5"]
        wide = DeepNeuralRejection(material.plain(), CLASSES, layers, **options)  # type: ignore[arg-type]
        return wide.fit(images[some], labels[some])
    single = NeuralRejection(material.plain(), CLASSES, "5", **options)  # type: ignore[arg-type]
    return single.fit(images[some], labels[some])


def _blurred(material: Material) -> Classifier:
    made = GaussianBlur(material.network(), CLASSES, sigma=1.0)
    return made.fit(*material.images(), epochs=material.epochs, batch_size=64)


def _median(material: Material) -> Classifier:
    made = MedianBlur(material.network(), CLASSES, size=3)
    return made.fit(*material.images(), epochs=material.epochs, batch_size=64)


def _threshold(network: nn.Module, material: Material) -> Classifier:
    images, labels = material.images()
    made = ConfidenceThreshold(network, CLASSES)
    return made.fit(images[:1400], labels[:1400], false_rejection_rate=0.05)


def _nested(material: Material) -> Classifier:
    return EitherRejects(_threshold(material.plain(), material), _neural(material))


def _certified(material: Material) -> Classifier:
    """Train on interval bounds (Gowal et al. 2018), with half of the weight, to half of EPS."""
    network = material.network()
    images, labels = material.train.to_float(), material.train.labels
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    generator = torch.Generator().manual_seed(material.seed)
    for epoch in range(material.epochs):
        reach = EPS / 2 * min(1.0, 2 * epoch / material.epochs)
        for rows in torch.randperm(len(images), generator=generator).split(64):  # type: ignore[no-untyped-call]
            optimizer.zero_grad()
            low, high = interval(network, images[rows], reach)
            own = nn.functional.one_hot(labels[rows], CLASSES).bool()
            worst = nn.functional.cross_entropy(torch.where(own, low, high), labels[rows])
            clean = nn.functional.cross_entropy(network(images[rows]), labels[rows])
            torch.autograd.backward(0.5 * clean + 0.5 * worst)
            optimizer.step()
    return Classifier(network.eval(), CLASSES)


def interval(network: nn.Sequential, images: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Bound the scores of all images within eps in Linf."""
    low, high = (images - eps).clamp(0, 1), (images + eps).clamp(0, 1)
    for layer in network:
        if not isinstance(layer, nn.Conv2d | nn.Linear):
            low, high = layer(low), layer(high)
            continue
        middle, reach = layer((low + high) / 2), (high - low) / 2
        weight = layer.weight.abs()
        if isinstance(layer, nn.Linear):
            reach = nn.functional.linear(reach, weight)
        else:
            reach = nn.functional.conv2d(reach, weight, None, layer.stride, layer.padding)
        low, high = middle - reach, middle + reach
    return low, high


HONEST: Final[Mapping[str, Callable[[Material], Classifier]]] = {
    "plain": lambda material: Classifier(material.plain(), CLASSES),
    "adversarially trained": _adversarial,
    "background class": _background,
    "neural rejection": _neural,
    "deep neural rejection": partial(_neural, deep=True),
    "Gaussian blur": _blurred,
    "median blur": _median,
    "nested": _nested,
    "confidence threshold": lambda material: _threshold(material.plain(), material),
    "certified-trained": _certified,
}
"""The honest models, by name."""


FURTHER: Final[Mapping[str, Callable[[Material], Classifier]]] = {
    "localized adversarial training": partial(_adversarial, box=20)
}
"""The defence of demur that the honest models lack. It is not one of the ten of the tests."""


def embedded(seed: int = 0) -> Material:
    """Give the embedded digits."""
    return Material(data.load("digits"), seed)
