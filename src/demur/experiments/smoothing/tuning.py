"""Transfer learning behind the filter, which the paper's conclusion asks for, against the attacker of its introduction."""

from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from demur import data, seeds
from demur.attacks import PGD, AnyError
from demur.classifier import Classifier, outcomes
from demur.data import ImageSet, SourceStatus
from demur.defenses import GaussianBlur
from demur.errors import DemurError
from demur.evaluation import NodeResult
from demur.evaluation.store import Computed
from demur.experiments.cells import Run, passes
from demur.experiments.smoothing.filters import NONE
from demur.experiments.smoothing.profile import TuningProfile
from demur.files import digest, file_digest
from demur.networks import CLASSES, ImageNetNetwork, imagenet_network, weights
from demur.studies.material import first_at_hand, load_splits
from demur.threat import ThreatModel
from demur.training import fit

ALL, LAST = "all layers", "last layer"
PUBLIC, WHITE = "attacked on the public network", "attacked on the tuned network, whole"


CONFIDENCE = 5.0
"""The margin of the images that are sent from the public network, in units of its scores."""


@dataclass(frozen=True)
class TuningMaterial:
    """The images, and the file with the public network's weights."""

    train: ImageSet
    test: ImageSet
    file: Path

    @property
    def fingerprint(self) -> str:
        """A digest of them."""
        return digest(self.train.fingerprint, self.test.fingerprint, file_digest(self.file))


@dataclass(frozen=True)
class Tuned:
    """What came of one way to tune: outcomes of clean images, and of those attacked."""

    layers: str
    filter: str
    clean: NodeResult
    attacked: dict[str, NodeResult]


class _Scaled(nn.Module):
    """Small images enlarged to the size that the network is used at: part of the classifier, so attacks act on the small image."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, h, w) to (N, 3, size, size)."""
        return nn.functional.interpolate(
            images, (self.size, self.size), mode="bilinear", align_corners=False
        )


def gather(
    settings: TuningProfile | None, data_root: Path | None, seed: int
) -> TuningMaterial | None:
    """Find the images and the network; None where the profile wants none, or the network's weights are not at hand.

    Raises: DemurError for images that do not fit.
    """
    if settings is None or (file := weights.find(settings.network, data_root)) is None:
        return None
    known: dict[str, SourceStatus] = {
        status.name: status for status in data.list_datasets(data_root)
    }
    train, test = load_splits(
        first_at_hand(settings.data, known), data_root, seeds.derive(seed, "test")
    )
    if train.images.shape[1] != 3:
        raise DemurError(
            f"a network for photographs sees colours; the images of {train.name} are grey."
        )
    if settings.images > len(test) or (settings.train_images or 0) > len(train):
        raise DemurError(
            f"tuning.images and tuning.train_images ask for more than the {len(test)} and {len(train)} images of {train.name}."
        )
    if settings.train_images is not None:
        train = train.sample(settings.train_images, seeds.derive(seed, "tuning"))
    return TuningMaterial(train, test.sample(settings.images, seeds.derive(seed, "tuned")), file)


def carry_out_tuning(settings: TuningProfile, material: TuningMaterial, run: Run) -> list[Tuned]:
    """Tune all layers and the last one, with and without the filter, and attack each by way of the public network, and whole."""
    public = imagenet_network(settings.network, material.file)
    sent = _public_cell(settings, material, public, run)
    found = []
    for layers in (ALL, LAST):
        for name in (NONE, f"Gaussian, sigma {settings.sigma:g}"):
            classifier, key = _tuned(settings, material, public, layers, name, run)
            found.append(_attacked(settings, material, classifier, key, sent, layers, name, run))
    return found


def work(settings: TuningProfile, material: TuningMaterial) -> float:
    """Units of work, about one image of a small data set trained on once."""
    return (
        4
        * 60.0
        * (settings.size / 96) ** 2
        * (len(material.train) * settings.epochs + len(material.test) * settings.steps)
    )


def _public(network: ImageNetNetwork, size: int) -> Classifier:
    """The public network on small images, with its own 1,000 classes."""
    return Classifier(nn.Sequential(_Scaled(size), network), len(CLASSES)).eval()


def _last(network: nn.Module) -> tuple[str, nn.Module]:
    """The module that gives the classes' scores: the last dense layer, or the last convolution where there is none (SqueezeNet)."""
    layers = [
        (name, layer)
        for name, layer in network.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d)
    ]
    wide = [
        (name, layer)
        for name, layer in layers
        if len(CLASSES) in (getattr(layer, "out_features", 0), getattr(layer, "out_channels", 0))
    ]
    if not wide:
        raise DemurError("the network has no layer with an output for each of ImageNet's classes.")
    return wide[-1]


def new_head(network: ImageNetNetwork, classes: int, seed: int) -> nn.Module:
    """Put a new last layer for `classes` classes in a copy of the network; gives the copy."""
    copy = deepcopy(network)
    name, old = _last(copy)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if isinstance(old, nn.Linear):
            head: nn.Module = nn.Linear(old.in_features, classes)
        else:
            assert isinstance(old, nn.Conv2d)
            head = nn.Conv2d(old.in_channels, classes, 1)
    parent, _, attribute = name.rpartition(".")
    setattr(copy.get_submodule(parent), attribute, head)
    return copy


def _tuned(
    settings: TuningProfile,
    material: TuningMaterial,
    public: ImageNetNetwork,
    layers: str,
    name: str,
    run: Run,
) -> tuple[Classifier, str]:
    classes = material.train.num_classes
    network = new_head(public, classes, run.seed)
    head = {id(weight) for weight in _head(network, classes).parameters()}
    inner = nn.Sequential(_Scaled(settings.size), network)
    whole = (
        Classifier(inner, classes) if name == NONE else GaussianBlur(inner, classes, settings.sigma)
    )

    def optimizer(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        chosen = [weight for weight in parameters if layers == ALL or id(weight) in head]
        return torch.optim.SGD(chosen, lr=settings.learning_rate, momentum=0.9)

    def compute(checkpoint: Path) -> Computed:
        options: dict[str, Any] = {
            "epochs": settings.epochs,
            "batch_size": settings.batch_size,
            "seed": run.seed,
            "device": run.device,
        }
        history = fit(
            whole.module,
            material.train.images,
            material.train.labels,
            optimizer=optimizer,
            checkpoint=checkpoint,
            **options,
        )
        return {"accuracy": history[-1].accuracy}, dict(network.cpu().state_dict())

    shared = settings.model_dump(
        include={"network", "size", "sigma", "epochs", "batch_size", "learning_rate"}
    )
    config = {
        "cell": "tuned",
        "layers": layers,
        "filter": name,
        "data": material.fingerprint,
        "settings": shared,
        "seed": run.seed,
    }
    cell = run.cell(f"tune {layers}, {name}", config, compute, work(settings, material) / 5)
    network.load_state_dict(dict(cell.tensors))
    whole.to(
        memory_format=torch.contiguous_format
    )  # training leaves another layout in memory, which rounds otherwise
    return whole.to(run.device).eval(), cell.key


def _head(network: nn.Module, classes: int) -> nn.Module:
    layers = [layer for layer in network.modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    return next(
        layer
        for layer in reversed(layers)
        if classes in (getattr(layer, "out_features", 0), getattr(layer, "out_channels", 0))
    )


def _public_cell(
    settings: TuningProfile, material: TuningMaterial, public: ImageNetNetwork, run: Run
) -> NodeResult:
    """Images attacked on the public network, away from its own answer. sent: (N, C, H, W)."""

    def compute(_: Path) -> Computed:
        classifier, clean = _public(public, settings.size).to(run.device), material.test.to_float()
        called = classifier.predict(clean)
        attack = PGD(steps=settings.steps, loss="cross_entropy", confidence=CONFIDENCE)
        threat = ThreatModel("linf", settings.eps, AnyError())
        result = attack(classifier, clean, called, threat, batch_size=50)
        return passes(result), {"sent": result.candidates}

    asked = {"eps": settings.eps, "steps": settings.steps, "size": settings.size}
    config = {"cell": "public", "data": material.fingerprint, **asked, "seed": run.seed}
    return run.cell(f"{PUBLIC}: {settings.network}", config, compute, work(settings, material) / 10)


def _attacked(
    settings: TuningProfile,
    material: TuningMaterial,
    classifier: Classifier,
    key: str,
    sent: NodeResult,
    layers: str,
    name: str,
    run: Run,
) -> Tuned:
    images, labels = material.test.to_float(), material.test.labels
    asked = {
        "model": key,
        "data": material.test.fingerprint,
        "eps": settings.eps,
        "steps": settings.steps,
        "seed": run.seed,
    }

    def clean(_: Path) -> Computed:
        return {}, {"outcomes": outcomes(classifier, images, labels)}

    def transferred(_: Path) -> Computed:
        return {}, {"outcomes": outcomes(classifier, sent.tensors["sent"], labels)}

    def white(_: Path) -> Computed:
        attack = PGD(steps=settings.steps)
        threat = ThreatModel("linf", settings.eps)
        result = attack(classifier, images, labels, threat, batch_size=50)
        return passes(result), {"outcomes": outcomes(classifier, result.candidates, labels)}

    cells = {
        PUBLIC: run.cell(
            f"{layers}, {name}: {PUBLIC}",
            {"cell": "tuned, public", "sent": sent.key, **asked},
            transferred,
            0,
        ),
        WHITE: run.cell(
            f"{layers}, {name}: {WHITE}",
            {"cell": "tuned, whole", **asked},
            white,
            work(settings, material) / 40,
        ),
    }
    return Tuned(
        layers,
        name,
        run.cell(f"{layers}, {name}: clean", {"cell": "tuned, clean", **asked}, clean, 0),
        cells,
    )
