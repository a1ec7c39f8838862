"""The attack on the background of photographs, against networks for ImageNet (sec. 3, Tables 1 and 2)."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from demur import attacks, masks
from demur.classifier import Classifier
from demur.data import Box, ImageSet, fitted, to_float
from demur.evaluation import NodeResult
from demur.evaluation.store import Computed
from demur.experiments.cells import Run, passes
from demur.experiments.localized_training.profile import AttackedPhotographs
from demur.experiments.localized_training.sets import (
    AROUND,
    EVERYWHERE,
    OBJECT,
    RANDOM,
    REGIONS,
    paper_attack,
    threat_of,
)
from demur.files import file_digest
from demur.networks import CLASSES, imagenet_network
from demur.studies.album import Album, at_size

STEP_SHARE = 0.1
BATCH = 25


@dataclass(frozen=True)
class NetworkFound:
    """What was found on one network: the photographs as they are, and attacked by (eps, region)."""

    name: str
    clean: NodeResult
    attacked: dict[tuple[float, str], NodeResult]


def carry_out_photographs(
    settings: AttackedPhotographs, album: Album, run: Run
) -> list[NetworkFound]:
    """Attack every network at each eps around the objects, and at the largest eps also in the other regions."""
    found = []
    for name, path in album.networks.items():
        network = imagenet_network(name, path)
        classifier = Classifier(network, len(CLASSES)).to(run.device).eval()
        images = at_size(album.photos, network.resize, network.size)
        boxes = [fitted(photo, network.resize, network.size).boxes for photo in album.photos]
        about = {"network": name, "album": album.fingerprint, "weights": file_digest(path)}
        clean, attacked = _clean_cell(about, classifier, images, run), {}
        for eps in settings.eps:
            for region in REGIONS if eps == settings.eps[-1] else (AROUND,):
                attacked[eps, region] = _attacked_cell(
                    settings, about, classifier, images, boxes, eps, region, run
                )
        found.append(NetworkFound(name, clean, attacked))
    return found


def work(settings: AttackedPhotographs, album: Album) -> float:
    """Units of work, about one image of a small data set trained on once: a network for photographs takes some 100 times as much."""
    return (
        100.0
        * len(album.networks)
        * len(album.photos)
        * settings.steps
        * (len(settings.eps) + len(REGIONS) - 1)
    )


def object_mask(
    classifier: Classifier, images: Tensor, labels: Tensor, boxes: Sequence[tuple[Box, ...]]
) -> Tensor:
    """Make a mask (N, 1, H, W) of the objects: their boxes, or, without a box, where the network itself sees the class."""
    inside = masks.inside_boxes((images.shape[-2], images.shape[-1]), boxes)
    without = torch.tensor([not own for own in boxes])
    if bool(without.any()):
        inside[without] = masks.class_activation(classifier, images[without], labels[without])
    return inside


def _mask(region: str, inside: Tensor, images: Tensor, seed: int) -> Tensor | None:
    around = masks.outside(inside)
    return {
        EVERYWHERE: None,
        AROUND: around,
        OBJECT: inside,
        RANDOM: masks.same_area(around, images, seed),
    }[region]


@torch.no_grad()
def _answers(classifier: Classifier, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Of each image (uint8) the probability of its class, how many classes score higher, and the class that scores highest."""
    scores = torch.cat([classifier.scores(to_float(batch)) for batch in torch.split(images, BATCH)])
    own = scores.gather(1, labels[:, None])
    return {
        "confidence": scores.softmax(1).gather(1, labels[:, None])[:, 0],
        "rank": (scores > own).sum(1),
        "guess": scores.argmax(1),
    }


def _clean_cell(
    about: Mapping[str, Any], classifier: Classifier, images: ImageSet, run: Run
) -> NodeResult:
    def compute(_: Path) -> Computed:
        return {}, _answers(classifier, images.images, images.labels)

    return run.cell(
        f"photographs: {about['network']}", {"cell": "photographs", **about}, compute, 0
    )


def _attacked_cell(
    settings: AttackedPhotographs,
    about: Mapping[str, Any],
    classifier: Classifier,
    images: ImageSet,
    boxes: Sequence[tuple[Box, ...]],
    eps: float,
    region: str,
    run: Run,
) -> NodeResult:
    """Photographs attacked in a region, rounded to 8 bits, and what the network makes of these: as files would hold them."""

    def compute(_: Path) -> Computed:
        clean, labels = images.to_float(), images.labels
        inside = object_mask(classifier, clean, labels, boxes)
        attack = paper_attack(settings.steps, STEP_SHARE * eps)
        stored = []
        spent = Counter[str]()
        for rows in torch.split(torch.arange(len(clean)), BATCH):
            threat = threat_of(eps, _mask(region, inside[rows], clean[rows], run.seed))
            result = attack(classifier, clean[rows], labels[rows], threat, seed=run.seed)
            stored.append(attacks.quantize_towards(result.candidates, clean[rows]))
            spent.update(passes(result))
        sent = torch.cat(stored)
        altered = (sent != images.images).any(1).double().mean((1, 2))
        return spent, {
            **_answers(classifier, sent, labels),
            "altered": altered,
            "images": sent[: settings.listed],
        }

    asked = {
        "eps": eps,
        "region": region,
        "steps": settings.steps,
        "listed": settings.listed,
        "seed": run.seed,
    }
    config = {"cell": "attacked photographs, 2", **about, **asked}
    return run.cell(
        f"photographs: {about['network']}, {region}, {255 * eps:g}/255",
        config,
        compute,
        100.0 * len(images) * settings.steps,
    )
