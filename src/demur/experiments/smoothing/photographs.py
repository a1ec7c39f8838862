"""The paper's attack on photographs (sec. 2): which network is hardest to deceive, and what its pictures do to the others."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional

from demur import attacks, seeds
from demur.attacks import Target
from demur.classifier import Classifier
from demur.data import ImageSet, as_floats
from demur.evaluation import Cell
from demur.evaluation.ledger import Computed
from demur.experiments.album import Album, at_size
from demur.experiments.cells import Run
from demur.experiments.smoothing.filters import others, passes
from demur.experiments.smoothing.profile import TargetedPhotographs
from demur.files import file_digest
from demur.networks import CLASSES, ImageNetNetwork, imagenet_network

BATCH = 25
SHOWN = 8
LAYERS = (torch.nn.Conv2d, torch.nn.Linear)


@dataclass(frozen=True)
class NetworkFound:
    """What the attack on one network came to, and the answers of every network on its pictures, by name."""

    name: str
    layers: int
    weights: int
    attacked: Cell
    answers: dict[str, Cell]


def carry_out_photographs(settings: TargetedPhotographs, album: Album, run: Run) -> list[NetworkFound]:
    """Attack every network towards random classes, the same for all, and show all pictures to all networks."""
    targets = _targets(album, run.seed)
    networks = {name: imagenet_network(name, path).to(run.device) for name, path in album.networks.items()}
    found = []
    for name, network in networks.items():
        about = {"network": name, "album": album.fingerprint, "weights": file_digest(album.networks[name])}
        attacked = _attacked_cell(settings, about, network, at_size(album.photos, network.resize, network.size), targets, run)
        answers = {other: _answers_cell(attacked, other, its, album, run) for other, its in networks.items()}
        layers = sum(isinstance(layer, LAYERS) for layer in network.modules())
        found.append(NetworkFound(name, layers, sum(weight.numel() for weight in network.parameters()), attacked, answers))
    return found


def work(settings: TargetedPhotographs, album: Album) -> float:
    """Units of work, about one image of a small data set trained on once; photographs are some hundred times as large."""
    return 100.0 * len(album.networks) * len(album.photos) * 30


def _targets(album: Album, seed: int) -> Tensor:
    """A class (N,) for each photograph that is not its own, drawn by the pixels of its file: whatever a network's size is."""
    keys = [key for photo in album.photos for key in seeds.image_keys(as_floats(photo.pixels[None]))]
    return others(keys, torch.tensor([photo.label or 0 for photo in album.photos]), len(CLASSES), seed)


def _attacked_cell(
    settings: TargetedPhotographs, about: Mapping[str, Any], network: ImageNetNetwork, images: ImageSet, targets: Tensor, run: Run
) -> Cell:
    """The targeted attack. found, distance, steps, targets (N,), confidence and before (N,) of the target, images (N, 3, H, W) as 8 bits
    store them, and stored: whether these still reach it.
    """

    def compute(_: Path) -> Computed:
        classifier, clean, labels = Classifier(network, len(CLASSES)).eval(), images.floats(), images.labels
        parts, spent = [], dict.fromkeys(("forwards", "backwards", "flat"), 0)
        for rows in torch.split(torch.arange(len(clean)), BATCH):
            goal = Target(targets[rows])
            result = attacks.normalized_gradient(
                classifier, clean[rows], labels[rows], goal=goal, step_size=settings.step_size, steps=settings.steps
            )
            sent = (result.attempts * 255).round().to(torch.uint8)
            sure = classifier.scores(as_floats(sent)).softmax(1)
            own = targets[rows][:, None]
            confidence = {"confidence": sure.gather(1, own)[:, 0], "before": classifier.scores(clean[rows]).softmax(1).gather(1, own)[:, 0]}
            stored = sure.argmax(1) == targets[rows]
            parts.append(
                {
                    "found": result.found,
                    "distance": result.distance,
                    "steps": result.backwards,
                    "stored": stored,
                    "images": sent,
                    **confidence,
                }
            )
            spent = {kind: spent[kind] + count for kind, count in passes(result).items()}
        together = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        return spent, {**together, "targets": targets}

    asked = {"step_size": settings.step_size, "steps": settings.steps, "seed": run.seed}
    return run.cell(
        f"photographs: {about['network']}", {"cell": "targeted photographs", **about, **asked}, compute, 100.0 * len(images) * 30
    )


def _answers_cell(attacked: Cell, name: str, network: ImageNetNetwork, album: Album, run: Run) -> Cell:
    """What another network answers on those pictures, brought to its size, and on the photographs themselves. attacked, clean: (N,)."""

    def compute(_: Path) -> Computed:
        classifier = Classifier(network, len(CLASSES)).eval()
        clean = at_size(album.photos, network.resize, network.size)
        sent = resized(as_floats(attacked.tensors["images"]), network.size)
        return {}, {"attacked": classifier.predict(sent, BATCH), "clean": classifier.predict(clean.floats(), BATCH), "labels": clean.labels}

    config = {"cell": "transferred photographs", "sent": attacked.key, "to": name, "weights": file_digest(album.networks[name])}
    return run.cell(f"photographs shown to {name}", config, compute, 0)


def resized(images: Tensor, size: int) -> Tensor:
    """Images (N, C, h, w) brought to (N, C, size, size)."""
    if images.shape[-1] == size:
        return images
    return torch.as_tensor(functional.resize(images, [size, size], antialias=True)).clamp(0, 1)
