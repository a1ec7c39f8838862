"""The paper's attack on photographs (sec. 2): which network is hardest to deceive, and what its pictures do to the others."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional

from demur import seeds
from demur.attacks import NormalizedGradient, Target
from demur.classifier import Classifier
from demur.data import ImageSet, to_float
from demur.evaluation import NodeResult
from demur.evaluation.store import Computed
from demur.experiments.cells import Run, passes
from demur.experiments.smoothing.filters import others
from demur.experiments.smoothing.profile import TargetedPhotographs
from demur.files import file_digest
from demur.networks import CLASSES, ImageNetNetwork, imagenet_network
from demur.studies.album import Album, at_size
from demur.threat import ThreatModel

BATCH = 25
SHOWN = 8
LAYERS = (torch.nn.Conv2d, torch.nn.Linear)


@dataclass(frozen=True)
class NetworkFound:
    """What the attack on one network came to, and the answers of every network on its pictures, by name."""

    name: str
    layers: int
    weights: int
    attacked: NodeResult
    answers: dict[str, NodeResult]


def carry_out_photographs(
    settings: TargetedPhotographs, album: Album, run: Run
) -> list[NetworkFound]:
    """Attack every network towards random classes, the same for all, and show all pictures to all networks."""
    targets = _targets(album, run.seed)
    networks = {
        name: imagenet_network(name, path).to(run.device) for name, path in album.networks.items()
    }
    found = []
    for name, network in networks.items():
        about = {
            "network": name,
            "album": album.fingerprint,
            "weights": file_digest(album.networks[name]),
        }
        attacked = _attacked_cell(
            settings,
            about,
            network,
            at_size(album.photos, network.resize, network.size),
            targets,
            run,
        )
        answers = {
            other: _answers_cell(attacked, other, its, album, run)
            for other, its in networks.items()
        }
        layers = sum(isinstance(layer, LAYERS) for layer in network.modules())
        found.append(
            NetworkFound(
                name,
                layers,
                sum(weight.numel() for weight in network.parameters()),
                attacked,
                answers,
            )
        )
    return found


def work(settings: TargetedPhotographs, album: Album) -> float:
    """Units of work, about one image of a small data set trained on once; photographs are some hundred times as large."""
    return 100.0 * len(album.networks) * len(album.photos) * 30


def _targets(album: Album, seed: int) -> Tensor:
    """A class (N,) for each photograph that is not its own, drawn by the pixels of its file: whatever a network's size is."""
    keys = [key for photo in album.photos for key in seeds.image_keys(to_float(photo.pixels[None]))]
    return others(
        keys, torch.tensor([photo.label or 0 for photo in album.photos]), len(CLASSES), seed
    )


def _attacked_cell(
    settings: TargetedPhotographs,
    about: Mapping[str, Any],
    network: ImageNetNetwork,
    images: ImageSet,
    targets: Tensor,
    run: Run,
) -> NodeResult:
    """The targeted attack. success, distance, steps, targets (N,), confidence and before (N,) of the target, images (N, 3, H, W) as 8 bits
    store them, and stored: whether these still reach it.
    """

    def compute(_: Path) -> Computed:
        classifier, clean, labels = (
            Classifier(network, len(CLASSES)).eval(),
            images.to_float(),
            images.labels,
        )
        attack = NormalizedGradient(step_size=settings.step_size, steps=settings.steps)
        parts = []
        spent = Counter[str]()
        for rows in torch.split(torch.arange(len(clean)), BATCH):
            threat = ThreatModel("l2", goal=Target(targets[rows]))
            result = attack(classifier, clean[rows], labels[rows], threat)
            sent = (result.candidates * 255).round().to(torch.uint8)
            sure = classifier.scores(to_float(sent)).softmax(1)
            own = targets[rows][:, None]
            confidence = {
                "confidence": sure.gather(1, own)[:, 0],
                "before": classifier.scores(clean[rows]).softmax(1).gather(1, own)[:, 0],
            }
            stored = sure.argmax(1) == targets[rows]
            parts.append(
                {
                    "success": result.success,
                    "distance": result.distance,
                    "steps": result.backwards,
                    "stored": stored,
                    "images": sent,
                    **confidence,
                }
            )
            spent.update(passes(result))
        together = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        return spent, {**together, "targets": targets}

    asked = {"step_size": settings.step_size, "steps": settings.steps, "seed": run.seed}
    return run.cell(
        f"photographs: {about['network']}",
        {"cell": "targeted photographs", **about, **asked},
        compute,
        100.0 * len(images) * 30,
    )


def _answers_cell(
    attacked: NodeResult, name: str, network: ImageNetNetwork, album: Album, run: Run
) -> NodeResult:
    """What another network answers on those pictures, brought to its size, and on the photographs themselves. attacked, clean: (N,)."""

    def compute(_: Path) -> Computed:
        classifier = Classifier(network, len(CLASSES)).eval()
        clean = at_size(album.photos, network.resize, network.size)
        sent = resized(to_float(attacked.tensors["images"]), network.size)
        return {}, {
            "attacked": classifier.predict(sent, BATCH),
            "clean": classifier.predict(clean.to_float(), BATCH),
            "labels": clean.labels,
        }

    config = {
        "cell": "transferred photographs",
        "sent": attacked.key,
        "to": name,
        "weights": file_digest(album.networks[name]),
    }
    return run.cell(f"photographs shown to {name}", config, compute, 0)


def resized(images: Tensor, size: int) -> Tensor:
    """Images (N, C, h, w) brought to (N, C, size, size)."""
    if images.shape[-1] == size:
        return images
    return torch.as_tensor(functional.resize(images, [size, size], antialias=True)).clamp(0, 1)
