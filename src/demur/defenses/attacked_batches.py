"""Attacks inside a mask: batch transforms of adversarial training, and what they leave correct."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor, nn

from demur import seeds
from demur.attacks import Attack, AttackResult
from demur.classifier import Classifier, device_of
from demur.data import to_float
from demur.errors import DemurError
from demur.masks import check_mask
from demur.progress import Silent, reporting
from demur.threat import ThreatModel
from demur.training import BatchTransform

AT_ONCE = 64
Mask = Tensor | Callable[[Tensor, Tensor], Tensor]
"""One mask for all images, or a function that makes one of (images, labels): (n, 1, H, W)."""


@dataclass(frozen=True, eq=False)
class MaskedAttack:
    """An attack for training: it maximises the cross-entropy of any error, inside a mask."""

    attack: Attack
    threat: ThreatModel
    mask: Mask | None
    mask_after_attack: bool

    def maximize(self, classifier: Classifier, images: Tensor, labels: Tensor, seed: int) -> Tensor:
        """Give the images of the largest loss."""

        def run(attack: Attack, threat: ThreatModel) -> Tensor:
            maximize = getattr(attack, "maximize", None)
            if maximize is None:
                raise DemurError(f"{attack} cannot train a network: use one attack such as PGD.")
            attacked: Tensor = maximize(classifier, images, labels, threat, seed=seed)
            return attacked

        return self._inside(run, images, labels)

    def succeed(self, classifier: Classifier, images: Tensor, labels: Tensor, seed: int) -> Tensor:
        """Give the first successes, and the images of the largest loss where there is none."""

        def run(attack: Attack, threat: ThreatModel) -> Tensor:
            result: AttackResult = attack(classifier, images, labels, threat, seed=seed)
            return result.candidates

        return self._inside(run, images, labels)

    def _inside(
        self, run: Callable[[Attack, ThreatModel], Tensor], images: Tensor, labels: Tensor
    ) -> Tensor:
        attack = self.attack
        if any(field.name == "loss" for field in fields(attack)):
            attack = replace(attack, **{"loss": "cross_entropy"})
        mask = self.mask
        if mask is not None and not isinstance(mask, Tensor):
            mask = mask(images, labels)
        if not self.mask_after_attack or mask is None:
            return run(attack, replace(self.threat, mask=mask))
        everywhere = check_mask(mask, images)
        assert everywhere is not None
        if not bool(((everywhere == 0) | (everywhere == 1)).all()):
            raise DemurError("mask_after_attack needs a mask of 0 and 1.")
        return torch.where(everywhere > 0, run(attack, self.threat), images)


class AttackedBatches:
    """The batch transform of adversarial training. Checkpoints know its fingerprint.

    `before` changes a batch before the attack.
    """

    def __init__(
        self,
        classifier: Classifier,
        attacker: MaskedAttack,
        fraction: float,
        seed: int,
        before: BatchTransform | None = None,
    ) -> None:
        self.classifier = classifier
        self.attacker = attacker
        self.fraction = fraction
        self.seed = seed
        self.before = before

    def __call__(
        self, network: nn.Module, images: Tensor, labels: Tensor, step: int
    ) -> tuple[Tensor, Tensor]:
        """Attack the first images of a batch. The batch is in random order."""
        if self.before is not None:
            images, labels = self.before(network, images, labels, step)
        count = max(1, round(self.fraction * len(images)))
        seed = seeds.derive(self.seed, "attack", step)
        with reporting(Silent()):
            attacked = self.attacker.maximize(self.classifier, images[:count], labels[:count], seed)
        return torch.cat([attacked, images[count:]]), labels

    def fingerprint(self) -> tuple[object, ...]:
        """Give what the attacked batches depend on, besides the network."""
        return self.attacker, self.fraction, self.seed, self.before


@dataclass(frozen=True, eq=False)
class RobustAccuracy:
    """The share of held-out images that are answered right, both clean and attacked: a measure.

    Parameters
    ----------
    classifier : Classifier
        Around the network that is trained.
    images, labels : Tensor
        uint8 images (n, C, H, W), and labels (n,).
    attacker : MaskedAttack
    seed : int
    """

    classifier: Classifier
    images: Tensor
    labels: Tensor
    attacker: MaskedAttack
    seed: int

    def __call__(self, network: nn.Module) -> float:
        """Attack the network, and measure it."""
        device = device_of(self.classifier, torch.device("cpu"))
        right = 0
        for start in range(0, len(self.images), AT_ONCE):
            images = to_float(self.images[start : start + AT_ONCE].to(device))
            labels = self.labels[start : start + AT_ONCE].to(device)
            with reporting(Silent()):
                attacked = self.attacker.maximize(self.classifier, images, labels, self.seed)
            both = [self.classifier.predict(one) == labels for one in (images, attacked)]
            right += int((both[0] & both[1]).sum())
        return right / len(self.images)

    def fingerprint(self) -> tuple[object, ...]:
        """Give what the measure depends on, besides the network."""
        return self.images, self.labels, self.attacker, self.seed


class LostMask:
    """Stands for a callable mask that a bundle could not hold."""

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        """Raise DemurError."""
        raise DemurError(
            "this model was saved with a callable mask, which a bundle cannot hold: "
            "set model.mask before the training."
        )
