"""Adversarial training: on attacked batches all along, everywhere or in a region, or, as the rejection paper has it, once more with what
broke the network.
"""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from demur import seeds
from demur.attacks import NEVER, AnyError, AttackResult, Goal
from demur.attacks.regions import check_region
from demur.classifier import Classifier, Outcome, check_labels, outcomes
from demur.data import as_floats
from demur.errors import DemurError
from demur.networks import Epoch, fit
from demur.progress import Silent, reporting

Region = Tensor | Callable[[Tensor, Tensor], Tensor]
"""A region for all images, or what makes one of a batch: (images, labels) -> (n, 1, H, W)."""


class AdversarialTraining(Classifier):
    """A classifier whose network is trained on what an attack makes of its images.

    Args:
        module: the network, with num_classes outputs, or one more where it can reject.
        num_classes: K.
        attack: with all but classifier, images, labels, goal and seed filled in: `partial(attacks.pgd, norm="l2", eps=1.5, steps=10)`.
        share: of each batch that is attacked; the rest stays clean. 1 replaces whole batches (Madry et al. 2018).
        region: where the attack may act, anywhere if None.
        posthoc: attack everywhere, and put back afterwards what lies outside the region, as algorithm 1 of the localized paper is
            written. Otherwise the attack keeps to the region in every step, as its sec. 3 has it.

    Attributes:
        history_: list of Epoch, after `fit` or `retrain`. added_: how many attacked images `retrain` trained on.
    """

    history_: list[Epoch]
    added_: int = 0

    def __init__(
        self,
        module: nn.Module,
        num_classes: int,
        attack: Callable[..., AttackResult],
        *,
        share: float = 1.0,
        region: Region | None = None,
        posthoc: bool = False,
    ) -> None:
        if not 0 < share <= 1:
            raise DemurError(f"the share of each batch that is attacked lies in (0, 1], not at {share}.")
        if posthoc and region is None:
            raise DemurError("what is put back afterwards lies outside a region: name one.")
        super().__init__(module, num_classes)
        self.attack, self.share, self.region, self.posthoc = attack, share, region, posthoc

    def fit(self, images: Tensor, labels: Tensor, *, seed: int = 0, **options: Any) -> Self:
        """Train on batches that are attacked as the network stands, to the largest cross-entropy that the attack finds.

        While it is attacked the network is in evaluation mode, so that its batch statistics are those of what it is trained on.

        Args:
            images: (N, C, H, W), uint8 or float in [0, 1]. labels: (N,) in 0..num_classes-1.
            seed, options: as for `networks.fit`: epochs, batch_size, device, optimizer, checkpoint, ...
        """
        check_labels(labels, len(images), self.num_classes)

        def attacked(network: nn.Module, batch: Tensor, true: Tensor, step: int) -> tuple[Tensor, Tensor]:
            count = max(1, round(self.share * len(batch)))  # the batch is in random order
            goal = AnyError("cross_entropy", confidence=NEVER)
            with reporting(Silent()):
                attempts = self._attacked(batch[:count], true[:count], goal, seeds.derive(seed, "attack", step))
            return torch.cat([attempts, batch[count:]]), true

        self.history_ = fit(self.module, images, labels, transform=attacked, seed=seed, **options)
        return self

    def _attacked(self, images: Tensor, labels: Tensor, goal: Goal, seed: int) -> Tensor:
        """What the attack makes of images (n, C, H, W), inside the region."""
        region = self.region(images, labels) if callable(self.region) else self.region
        if not self.posthoc or region is None:
            options = {} if region is None else {"region": region}
            return self.attack(self, images, labels, goal=goal, seed=seed, **options).attempts
        attempts = self.attack(self, images, labels, goal=goal, seed=seed).attempts
        where = check_region(region, images)
        assert where is not None
        if not bool(((where == 0) | (where == 1)).all()):
            raise DemurError("what lies outside a region can be put back afterwards only if the region is of 0 and 1.")
        return torch.where(where > 0, attempts, images)

    def retrain(self, images: Tensor, labels: Tensor, attacked: Tensor | None = None, *, seed: int = 0, **options: Any) -> Self:
        """Attack a network that is trained already, and train it further on all images and on those that were broken.

        The two steps of the rejection paper, sec. 3.4 and 4.3: only successful examples are added, with their true labels.
        Attack the result anew: what broke the network before says nothing of it now.

        Args:
            images, labels: as for `fit`; what the network was trained on.
            attacked: indices (M,) of the images to attack; all if None.
            seed, options: as for `networks.fit`.

        Raises: DemurError if no image is broken, which leaves nothing to learn.
        """
        check_labels(labels, len(images), self.num_classes)
        index = torch.arange(len(images)) if attacked is None else attacked
        clean, true = as_floats(images[index]), labels[index]
        sent = self._attacked(clean, true, AnyError("cross_entropy"), seed)
        changed = (sent != clean).flatten(1).any(1)  # an image that is misclassified as it is, is there already
        broken = (outcomes(self, sent, true).to(changed.device) != Outcome.CORRECT) & changed
        if not bool(broken.any()):
            raise DemurError(f"none of the {len(index)} attacked images is broken: there is nothing to retrain on. Allow the attack more.")
        self.added_ = int(broken.sum())
        together = torch.cat([as_floats(images), sent[broken]])
        true = torch.cat([labels, true[broken.to(labels.device)]])
        self.history_ = fit(self.module, together, true, seed=seed, **options)
        return self


class LocalizedAdversarialTraining(AdversarialTraining):
    """A classifier whose network is trained on images that are attacked where their object is not (Rothberg et al. 2019, algorithm 1).

    It learns not to rely on what lies in the region. Any input will do: of a vector of features, the region names those not to rely on.

    Args:
        region: where the attack may act: `regions.outside(regions.centre_box((28, 28), 12, 12))`, or what makes one of each batch:
            `lambda images, labels: regions.outside(regions.foreground(images, dilation=1))`. A region of 0 everywhere is plain training.
        The others are as in `AdversarialTraining`.
    """

    def __init__(
        self,
        module: nn.Module,
        num_classes: int,
        attack: Callable[..., AttackResult],
        *,
        region: Region,
        share: float = 1.0,
        posthoc: bool = False,
    ) -> None:
        super().__init__(module, num_classes, attack, share=share, region=region, posthoc=posthoc)
