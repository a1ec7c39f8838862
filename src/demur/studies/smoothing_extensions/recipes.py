"""Training with a term that separates the embeddings of classes."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from demur.attacks.base import Attack
from demur.classifier import Classifier
from demur.defenses import AdversarialTraining
from demur.errors import DemurError
from demur.evaluation.scoring import TrainingInputs
from demur.studies.recipes import SmallNetwork
from demur.threat import ThreatModel
from demur.training import fit

HALF = 0.5
"""Share of the images of a batch that are attacked."""


@dataclass(frozen=True)
class SeparatingLoss:
    """Cross-entropy, and a supervised contrastive term on the embedding: a loss for `fit`.

    The embedding is what the last dense layer of the network gets, divided by its length. The term
    draws images of a class together and pushes other images away (Khosla et al. 2020, "Supervised
    contrastive learning", eq. 2). Deviation: it is added to the cross-entropy in one training, in
    place of a training of its own, and there are no two views of each image.

    Parameters
    ----------
    weight : float
        Of the term.
    temperature : float
        Of its similarities.

    Examples
    --------
    >>> loss = SeparatingLoss(weight=0.5, temperature=0.1)
    >>> network = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> value, scores = loss(network, torch.rand(6, 1, 2, 2), torch.tensor([0, 1] * 3), 0.0)
    >>> scores.shape
    torch.Size([6, 2])
    """

    weight: float
    temperature: float

    def __call__(
        self, network: nn.Module, images: Tensor, labels: Tensor, epoch: float
    ) -> tuple[Tensor, Tensor]:
        """Compute the loss and the scores of a batch; see `demur.training.fit`."""
        seen: list[Tensor] = []
        dense = [one for one in network.modules() if isinstance(one, nn.Linear)]
        if not dense:
            raise DemurError("the separating loss needs a network with a dense layer.")
        hook = dense[-1].register_forward_pre_hook(lambda _, given: seen.append(given[0]))
        try:
            scores = network(images)
        finally:
            hook.remove()
        term = contrastive(seen[-1].flatten(1), labels, self.temperature)
        return nn.functional.cross_entropy(scores, labels) + self.weight * term, scores


def contrastive(embedding: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Compute the supervised contrastive loss of embeddings (n, D); 0 where no class comes twice.

    Examples
    --------
    >>> labels = torch.tensor([0, 0, 1, 1])
    >>> apart = torch.tensor([[1.0, 0], [1, 0], [-1, 0], [-1, 0]])
    >>> mixed = labels[[0, 2, 1, 3]]
    >>> [round(float(contrastive(apart, one, 0.1))) for one in (labels, mixed)]
    [0, 20]
    """
    unit = nn.functional.normalize(embedding.float(), dim=1)
    similar = unit @ unit.T / temperature
    itself = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    same = (labels[:, None] == labels[None, :]) & ~itself
    logs = similar - similar.masked_fill(itself, -torch.inf).logsumexp(1, keepdim=True)
    anchors = same.any(1)
    if not bool(anchors.any()):
        return embedding.sum() * 0
    mean = (logs * same).sum(1)[anchors] / same.sum(1)[anchors]
    return -mean.mean()


@dataclass(frozen=True)
class Separated:
    """Train a network behind a filter with the separating term (a recipe).

    Parameters
    ----------
    plain : SmallNetwork
        The network, its filter and its training without the term.
    loss : SeparatingLoss, optional
        Without it, the cross-entropy alone.
    attack : Attack, optional
        Half of each batch is attacked, within `threat`.
    threat : ThreatModel, optional
    """

    plain: SmallNetwork
    loss: SeparatingLoss | None
    attack: Attack | None = None
    threat: ThreatModel | None = None

    def train(self, given: TrainingInputs) -> Classifier:
        """Train; see `demur.evaluation.scoring.Recipe`."""
        data = given.data
        whole = self.plain.untrained(data, given.seed)
        options: dict[str, Any] = given.options(self.plain.epochs, self.plain.batch_size)
        options["loss"] = self.loss
        if self.attack is None or self.threat is None:
            fit(whole.module, data.images, data.labels, **options)
            return whole
        defense = AdversarialTraining(
            whole.module, data.num_classes, self.attack, self.threat, adversarial_fraction=HALF
        )
        defense.fit(data.images, data.labels, **options)
        return whole
