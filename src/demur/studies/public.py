"""Public networks, trained on ImageNet: as nodes, and tuned to other classes."""

from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.transforms.v2 import functional

from demur.attacks.base import Attack
from demur.attacks.result import AttackResult
from demur.classifier import Classifier
from demur.defenses import GaussianBlur
from demur.evaluation.code import code_fingerprint
from demur.evaluation.nodes import Load, Train
from demur.evaluation.scoring import Row, TrainingInputs
from demur.evaluation.store import NodeResult
from demur.files import digest, file_digest
from demur.loading.bundles import restored
from demur.networks import CLASSES, imagenet_network
from demur.training import fit


class Resized(nn.Module):
    """Bring images to the size of a network; with `stored`, after rounding them to 8 bits."""

    def __init__(self, size: int, stored: bool) -> None:
        super().__init__()
        self.size = size
        self.stored = stored

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, h, w) to (N, 3, size, size)."""
        given = (images * 255).round() / 255 if self.stored else images
        resized = functional.resize(given, [self.size, self.size], antialias=self.stored)
        return torch.as_tensor(resized).clamp(0, 1)


@dataclass(frozen=True)
class Public:
    """A network for ImageNet. It brings images to `size`; stored ones to its own size."""

    network: str
    file: Path
    size: int | None = None
    stored: bool = False

    def __call__(self) -> Classifier:
        """Load it."""
        network = imagenet_network(self.network, self.file)
        size = self.size or network.size
        before = [Resized(size, self.stored)] if self.size or self.stored else []
        return Classifier(nn.Sequential(*before, network), len(CLASSES))

    def sizes(self) -> tuple[int, int]:
        """Give the pixels that a photograph is resized to, and cropped to."""
        network = imagenet_network(self.network, self.file)
        return network.resize, network.size

    def node(self, name: str) -> Load:
        """Give a node of this name."""
        settings = (self.network, str(self.size), str(self.stored))
        said = digest(file_digest(self.file), code_fingerprint([Public]), *settings)
        return Load(self, said, name=name)


@dataclass(frozen=True, repr=False)
class FromOwnAnswer(Attack):
    """An attack away from the answer of the attacked classifier, which may have other classes."""

    attack: Attack

    def __call__(
        self, classifier: Classifier, images: Tensor, labels: Tensor, threat: Any, **options: Any
    ) -> AttackResult:
        """Attack; see `Attack.__call__`."""
        return self.attack(classifier, images, classifier.predict(images), threat, **options)


def describe_network(classifier: Classifier, attacked: Tensor, targets: Tensor) -> list[Row]:
    """Count layers and weights, and measure the confidence in the targets (N,) in 8 bits."""
    layers = sum(isinstance(one, nn.Conv2d | nn.Linear) for one in classifier.modules())
    weights = sum(weight.numel() for weight in classifier.parameters())
    stored = (attacked * 255).round() / 255
    sure = classifier.scores(stored, 25).softmax(1).gather(1, targets[:, None])
    return [
        Row("layers", layers),
        Row("weights (millions)", weights / 1e6),
        Row("confidence in the target", float(sure.mean()), len(targets)),
    ]


def new_head(network: nn.Module, classes: int, seed: int) -> tuple[nn.Module, nn.Module]:
    """Put a new last layer into a copy of a network; give the copy and the layer.

    The last layer is a dense one, or the last convolution where there is none (SqueezeNet).
    """
    copy = deepcopy(network)
    ends = [
        (name, layer)
        for name, layer in copy.named_modules()
        if len(CLASSES) in (getattr(layer, "out_features", 0), getattr(layer, "out_channels", 0))
    ]
    name, old = ends[-1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if isinstance(old, nn.Conv2d):
            head: nn.Module = nn.Conv2d(old.in_channels, classes, 1)
        else:
            head = nn.Linear(int(old.in_features), classes)
    copy.set_submodule(name, head)
    return copy, head


@dataclass(frozen=True)
class Tuning:
    """Tune a public network to other classes (sec. 4): all layers, or the last one."""

    all_layers: bool
    sigma: float | None
    epochs: int
    batch_size: int
    learning_rate: float

    def train(self, given: TrainingInputs) -> Classifier:
        """Tune; see `demur.evaluation.scoring.Recipe`."""
        assert given.base is not None
        classes = given.data.num_classes
        inner, head = new_head(given.base.module, classes, given.seed)
        last = {id(weight) for weight in head.parameters()}
        whole = Classifier(inner, classes)
        if self.sigma is not None:
            whole = GaussianBlur(inner, classes, self.sigma)

        def optimizer(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
            chosen = [one for one in parameters if self.all_layers or id(one) in last]
            return torch.optim.SGD(chosen, lr=self.learning_rate, momentum=0.9)

        options = given.options(self.epochs, self.batch_size)
        fit(whole.module, given.data.images, given.data.labels, optimizer=optimizer, **options)
        return whole


@dataclass(frozen=True, eq=False)
class Tuned(Train):
    """A model that `Tuning` makes: its network has the layers of the public one."""

    def model(self, result: NodeResult | None) -> Classifier:
        """Build the model with the stored weights."""
        assert result is not None
        assert self.base is not None
        layers, _ = new_head(self.base.model(None).module, self.data.num_classes, self.seed)
        return restored(result.values, result.tensors, layers)
