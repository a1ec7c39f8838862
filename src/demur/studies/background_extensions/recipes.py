"""How the models of this study are made, and images that belong to no key class."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from demur import seeds
from demur.attacks.base import Attack
from demur.classifier import Classifier, Outcome, outcomes
from demur.data import ImageSet, morph, patch_shuffle, photo_patches
from demur.defenses import BackgroundClass
from demur.evaluation.scoring import TrainingInputs
from demur.networks import background_class_network
from demur.studies.background_class.recipes import Split
from demur.threat import ThreatModel
from demur.training import fit

OTHERS: Final = "other classes"
MORPHS: Final[Mapping[str, float]] = {"morph 30 %": 0.3, "morph 50 %": 0.5, "morph 70 %": 0.7}
MADE: Final = (*MORPHS, "patch shuffle", "photo crops")
"""Kinds of background that are made (sec. VII.B and VII.C)."""
KINDS: Final = (OTHERS, *MADE)


@dataclass(frozen=True)
class Growth:
    """Attacked images as background: what is trained on, round after round.

    Parameters
    ----------
    rounds, images, epochs : int
    attack : Attack
    threat : ThreatModel
    """

    rounds: int
    images: int
    epochs: int
    attack: Attack
    threat: ThreatModel


@dataclass(frozen=True)
class Extended:
    """Train the paper's network, at some width, with some kinds of background (a recipe).

    Parameters
    ----------
    split : Split
        Which images are learned from.
    epochs, batch_size, width : int
    kinds : tuple of str, default ()
        Of `KINDS`. Without any, the model has no background class.
    made : int, default 0
        Images of each kind that is made.
    growth : Growth, optional
        After the training, training images are attacked. Those that the model accepts as a wrong
        class become background, and the training goes on with all background so far.
    """

    split: Split
    epochs: int
    batch_size: int
    width: int = 32
    kinds: tuple[str, ...] = ()
    made: int = 0
    growth: Growth | None = None

    def train(self, given: TrainingInputs) -> Classifier:
        """Train; see `demur.evaluation.scoring.Recipe`."""
        keys, _, others, _ = self.split.parts(given.data)
        classes = keys.num_classes
        channels, size, _ = keys.image_shape
        network = background_class_network(
            classes + bool(self.kinds),
            channels=channels,
            size=size,
            seed=seeds.derive(given.seed, "weights", bool(self.kinds)),
            width=self.width,
        )
        options = given.options(self.epochs, self.batch_size)
        if not self.kinds:
            fit(network, keys.images, keys.labels, **options)
            return Classifier(network, classes)
        own = seeds.derive(given.seed, "made")
        parts = [
            others if kind == OTHERS else made(kind, keys, self.made, own) for kind in self.kinds
        ]
        background = torch.cat(parts)
        defense = BackgroundClass(network, classes)
        defense.fit(keys.images, keys.labels, background, **options)
        if self.growth is None:
            return defense
        return self._grown(defense, keys, background, self.growth, given)

    def _grown(
        self,
        defense: BackgroundClass,
        keys: ImageSet,
        background: Tensor,
        growth: Growth,
        given: TrainingInputs,
    ) -> Classifier:
        """Go on with attacked images. A round is short: it is not resumed, but computed again."""
        for number in range(1, growth.rounds + 1):
            seed = seeds.derive(given.seed, "round", number)
            chosen = keys.sample(growth.images, seed)
            defense.to(torch.device(given.device)).eval()
            clean = chosen.to_float()
            result = growth.attack(defense, clean, chosen.labels, growth.threat, seed=seed)
            sent = (255 * result.candidates).round().clamp(0, 255).to(torch.uint8).cpu()
            wrong = outcomes(defense, sent.float() / 255, chosen.labels) == Outcome.WRONG
            found = sent[wrong.cpu()]
            background = torch.cat([background, found])
            given.notes[f"round {number}: accepted errors"] = float(len(found))
            options: dict[str, Any] = {"epochs": growth.epochs, "batch_size": self.batch_size}
            defense.fit(
                keys.images, keys.labels, background, seed=seed, device=given.device, **options
            )
        return defense


def made(kind: str, images: ImageSet, count: int, seed: int) -> Tensor:
    """Make images (count, C, H, W), uint8, of a kind of `MADE`."""
    channels, size, _ = images.image_shape
    own = seeds.derive(seed, kind)
    if kind in MORPHS:
        return morph(images, count, MORPHS[kind], own)
    if kind == "patch shuffle":
        return patch_shuffle(images.images, count, seed=own)
    return photo_patches(count, size, channels, own)
