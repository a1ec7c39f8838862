"""One photograph, attacked towards a class: what `demur attack` does."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from demur import attacks
from demur.attacks import Target, sizes
from demur.classifier import Classifier
from demur.data import Photo, as_floats, fitted, read_photo
from demur.errors import DemurError
from demur.networks import CLASSES, class_number, imagenet_network

MORE_SURE = (0.0, 0.5, 1.0, 2.0, 4.0)
"""By how much the target must win: rounding to 8 bits takes some of it away, and the stored picture is what counts."""


@dataclass(frozen=True)
class PhotoAttack:
    """What came of it. Pictures are uint8 (3, H, W), as files hold them; `found` is the answer on the stored one.

    Attributes:
        photo: as it is in its file. classifier: the network. before: the answer and its probability. target: its name and the probabilities
            before and after. steps: of the attack. l2, linf: how far the stored picture is, in pixel values in [0, 1].
    """

    photo: Photo
    classifier: Classifier
    original: Tensor
    attacked: Tensor
    before: tuple[str, float]
    target: tuple[str, float, float]
    found: bool
    steps: int
    l2: float
    linf: float


def attack_photograph(
    path: Path,
    network: str,
    target: str | int,
    *,
    weights: Path | None = None,
    data_root: Path | None = None,
    step_size: float = 0.1,
    steps: int = 1000,
    device: torch.device | None = None,
) -> PhotoAttack:
    """Attack a photograph by normalized gradients towards a class (smoothing paper, sec. 2), and look at what a PNG file keeps of it.

    Args:
        path: of the photograph, brought to the network's size: shorter side, then the middle.
        network: a name of `networks.ARCHITECTURES`.
        target: a class by number, WordNet id or name.
        weights, data_root: as in `networks.imagenet_network`.
        step_size, steps: Euclidean length of a step, and how many at most.

    Raises: DemurError for a photograph, a class or weights that are not there or do not fit, and where the target is the answer already.
    """
    wanted, module = class_number(target), imagenet_network(network, weights, data_root)
    photo = read_photo(path)
    original = fitted(photo, module.resize, module.size).pixels
    classifier = Classifier(module, len(CLASSES)).to(device or torch.device("cpu")).eval()
    clean = as_floats(original[None])
    scores = classifier.scores(clean)
    answer = int(scores.argmax())
    if answer == wanted:
        raise DemurError(f"{path} is taken for {CLASSES[wanted]!r} as it is: choose another target.")
    label, spent = torch.tensor([answer]), 0
    for confidence in MORE_SURE:
        goal = Target(wanted, confidence=confidence)
        result = attacks.normalized_gradient(classifier, clean, label, goal=goal, step_size=step_size, steps=steps)
        spent = int(result.backwards)
        attacked = (result.attempts * 255).round().to(torch.uint8)
        after = classifier.scores(as_floats(attacked))
        if int(after.argmax()) == wanted or not bool(result.found):
            break
    moved = sizes(clean, as_floats(attacked))
    sure, now = scores.softmax(1)[0], after.softmax(1)[0]
    return PhotoAttack(
        photo,
        classifier,
        original,
        attacked[0],
        answer_on(classifier, clean),
        (CLASSES[wanted], float(sure[wanted]), float(now[wanted])),
        int(now.argmax()) == wanted,
        spent,
        float(moved["l2"]),
        float(moved["linf"]),
    )


def answer_on(classifier: Classifier, images: Tensor) -> tuple[str, float]:
    """The name and the probability of the answer on one image (1, 3, H, W)."""
    sure = classifier.scores(images).softmax(1)[0]
    return CLASSES[int(sure.argmax())], float(sure.max())
