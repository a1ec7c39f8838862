"""How the models of the comparison are made."""

from dataclasses import dataclass

import torch

from demur import masks, seeds
from demur.attacks.base import Attack
from demur.classifier import Classifier
from demur.data import synthetic_backgrounds
from demur.defenses import AdversarialTraining, DeepNeuralRejection, EitherRejects
from demur.evaluation.scoring import TrainingInputs
from demur.studies.recipes import SmallNetwork
from demur.threat import ThreatModel


@dataclass(frozen=True)
class AttackedTraining:
    """Train a network on attacked images (a recipe).

    Parameters
    ----------
    plain : SmallNetwork
        The network, its filter, its backgrounds and its training. Backgrounds are attacked too, as
        images of one further class.
    attack : Attack
    threat : ThreatModel
    box : int, optional
        Side of a centred box that the attack leaves alone, in pixels: localized adversarial
        training. Without it the attack may change the whole image.
    """

    plain: SmallNetwork
    attack: Attack
    threat: ThreatModel
    box: int | None = None

    def train(self, given: TrainingInputs) -> Classifier:
        """Train; see `demur.evaluation.scoring.Recipe`."""
        data = given.data
        classes = data.num_classes
        whole = self.plain.untrained(data, given.seed)
        around = None
        if self.box is not None:
            height, width = data.images.shape[2:]
            around = masks.outside(masks.centre_box((height, width), self.box, self.box))
        made = self.plain.backgrounds
        if made:
            data = synthetic_backgrounds(data, made, seeds.derive(given.seed, "made"))
        defense = AdversarialTraining(
            whole.module, classes + (made > 0), self.attack, self.threat, mask=around
        )
        options = given.options(self.plain.epochs, self.plain.batch_size)
        defense.fit(data.images, data.labels.clamp(max=classes), **options)
        return whole


@dataclass(frozen=True)
class Machines:
    """Fit deep neural rejection on inner layers of the base model.

    Parameters
    ----------
    layers : tuple of str
        Of the network of the base model.
    per_class : int
        Images of each class that the machines learn from.
    C : float
    false_rejection_rate : float
    combined : bool, default False
        Whether the base model, which rejects too, stays: the result rejects where either does.
    """

    layers: tuple[str, ...]
    per_class: int
    C: float
    false_rejection_rate: float
    combined: bool = False

    def train(self, given: TrainingInputs) -> Classifier:
        """Fit; see `demur.evaluation.scoring.Recipe`."""
        base = given.base
        validation = given.validation
        assert base is not None
        assert validation is not None
        deep = DeepNeuralRejection(
            base if self.combined else base.module,
            given.data.num_classes,
            list(self.layers),
            C=self.C,
            combiner_C=self.C,
            false_rejection_rate=self.false_rejection_rate,
            seed=given.seed,
        ).to(torch.device(given.device))
        train = given.data.balanced(self.per_class, given.seed)
        deep.fit(train.images, train.labels, (validation.images, validation.labels))
        return EitherRejects(deep, base) if self.combined else deep
