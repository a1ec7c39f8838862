"""One photograph, attacked towards a class: what `demur attack` does."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from demur.attacks import NormalizedGradient, Target, sizes
from demur.classifier import Classifier
from demur.data import Photo, fitted, read_photo, to_float
from demur.errors import DemurError
from demur.networks import CLASSES, class_number, imagenet_network
from demur.threat import ThreatModel

MORE_SURE = (0.0, 0.5, 1.0, 2.0, 4.0)
"""By how much the target must win, tried in turn. Rounding to 8 bits takes some of it away."""


@dataclass(frozen=True)
class PhotoAttack:
    """The result of an attack on a photograph. Pictures are uint8 (3, H, W), as files hold them.

    Attributes
    ----------
    photo : Photo
        The photograph of the file.
    classifier : Classifier
        The network.
    original, attacked : Tensor of shape (3, H, W), uint8
    before : tuple of (str, float)
        The answer and its probability.
    target : tuple of (str, float, float)
        The name of the target, and its probability before and after the attack.
    success : bool
        Whether the network answers with the target on the stored picture.
    steps : int
        Steps of the attack.
    l2, linf : float
        Size of the change of the stored picture, on pixels in [0, 1].
    """

    photo: Photo
    classifier: Classifier
    original: Tensor
    attacked: Tensor
    before: tuple[str, float]
    target: tuple[str, float, float]
    success: bool
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
    """Attack a photograph by normalized gradients towards a class.

    The smoothing paper describes the attack in section 2. The result is what a PNG file keeps.

    Parameters
    ----------
    path : Path
        The photograph. It is resized by its shorter side and cropped to the network's size.
    network : str
        A name of `networks.ARCHITECTURES`.
    target : str or int
        A class by number, WordNet id or name.
    weights, data_root : Path, optional
        As in `networks.imagenet_network`.
    step_size : float, default 0.1
        Euclidean length of a step.
    steps : int, default 1000
        Largest number of steps.
    device : torch.device, optional

    Returns
    -------
    PhotoAttack

    Raises
    ------
    DemurError
        For a photograph, a class or weights that are missing or do not fit, and where the network
        already answers with the target.
    """
    wanted, photo = class_number(target), read_photo(path)
    module = imagenet_network(network, weights, data_root)
    original = fitted(photo, module.resize, module.size).pixels
    classifier = Classifier(module, len(CLASSES)).to(device or torch.device("cpu")).eval()
    clean = to_float(original[None])
    scores = classifier.scores(clean)
    answer = int(scores.argmax())
    if answer == wanted:
        raise DemurError(
            f"{path} is already classified as {CLASSES[wanted]!r}: choose another target."
        )
    label = torch.tensor([answer])
    threat = ThreatModel("l2", goal=Target(wanted))
    for confidence in MORE_SURE:
        attack = NormalizedGradient(step_size=step_size, steps=steps, confidence=confidence)
        result = attack(classifier, clean, label, threat)
        attacked = (result.candidates * 255).round().to(torch.uint8)
        after = classifier.scores(to_float(attacked))
        if int(after.argmax()) == wanted or not bool(result.success):
            break
    moved = sizes(clean, to_float(attacked))
    sure, now = scores.softmax(1)[0], after.softmax(1)[0]
    return PhotoAttack(
        photo,
        classifier,
        original,
        attacked[0],
        answer_on(classifier, clean),
        (CLASSES[wanted], float(sure[wanted]), float(now[wanted])),
        int(now.argmax()) == wanted,
        int(result.backwards),
        float(moved["l2"]),
        float(moved["linf"]),
    )


def answer_on(classifier: Classifier, images: Tensor) -> tuple[str, float]:
    """The name and the probability of the answer on one image (1, 3, H, W)."""
    sure = classifier.scores(images).softmax(1)[0]
    return CLASSES[int(sure.argmax())], float(sure.max())
