"""Adversarial training, on attacked batches or on a data set with successful attacks added.

Madry et al. 2018 attack every batch. Rothberg et al. 2019 attack only the pixels of a mask. The
rejection paper, sec. 3.4, adds successful attacks to the training set and trains further.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from demur.attacks import AnyError, Attack
from demur.classifier import Outcome, check_labels, outcomes
from demur.data import to_float
from demur.defenses.attacked_batches import AttackedBatches, LostMask, Mask, MaskedAttack
from demur.defenses.base import Defense
from demur.errors import DemurError
from demur.threat import ThreatModel, as_threat
from demur.training import BatchTransform, fit


class AdversarialTraining(Defense):
    """A classifier whose network is trained on attacked images.

    Parameters
    ----------
    network : nn.Module
        A network with num_classes outputs, or one more for rejection.
    num_classes : int
        Number of classes K.
    attack : Attack
        How to attack. Training always maximises the cross-entropy.
    threat : ThreatModel or str
        Norm and eps, for example "linf:8/255". Its goal is replaced by `AnyError()`.
    adversarial_fraction : float in (0, 1], default 1
        Fraction of each batch that is attacked. 1 replaces the batch (Madry et al. 2018).
    mask : Tensor or callable, optional
        Where the attack may act: one mask for all images, or a function of (images, labels) that
        gives one for each of them. None means everywhere, or the mask of the threat.
    mask_after_attack : bool, default False
        Attack everywhere, then put back the pixels outside the mask, as algorithm 1 of the
        localized paper is written. Otherwise every step of the attack keeps to the mask, as in its
        sec. 3.
    prefit : bool, default False
        Whether the network is trained already.

    Attributes
    ----------
    added_ : int
        Number of attacked images that `augment_and_finetune` added.

    Examples
    --------
    >>> from demur import data, networks
    >>> from demur.attacks import PGD
    >>> from demur.defenses import AdversarialTraining
    >>> train, test = data.load("digits", "train"), data.load("digits", "test")
    >>> defense = AdversarialTraining(networks.dnr_cnn(10), 10, PGD(steps=2), "linf:0.1")
    >>> defense = defense.fit(train.images[:32], train.labels[:32], epochs=1, batch_size=16)
    >>> defense.predict(test.to_float()[:2]).shape
    torch.Size([2])
    """

    mask_tensor: Tensor | None
    _remedy: ClassVar[str] = ", or say prefit=True if the network is trained already"
    added_: int = 0

    def __init__(
        self,
        network: nn.Module,
        num_classes: int,
        attack: Attack,
        threat: ThreatModel | str,
        *,
        adversarial_fraction: float = 1.0,
        mask: Mask | None = None,
        mask_after_attack: bool = False,
        prefit: bool = False,
    ) -> None:
        if not isinstance(attack, Attack):
            raise DemurError(f"attack must be an attack such as PGD(steps=10), not {attack!r}.")
        threat = as_threat(threat)
        if isinstance(threat.eps, Tensor):
            raise DemurError("the threat of a training needs one eps for all images.")
        if threat.mask is not None and mask is not None:
            raise DemurError("give a mask, or a threat with a mask, but not both.")
        if not 0 < adversarial_fraction <= 1:
            raise DemurError(f"adversarial_fraction must be in (0, 1], not {adversarial_fraction}.")
        mask = threat.mask if mask is None else mask
        if mask_after_attack and mask is None:
            raise DemurError("mask_after_attack needs a mask.")
        super().__init__(network, num_classes, fitted=prefit)
        self.register_buffer("mask_tensor", None)
        self.mask = mask
        self.attack = attack
        self.threat = replace(threat, goal=AnyError(), mask=None)
        self.adversarial_fraction = adversarial_fraction
        self.mask_after_attack = mask_after_attack

    @property
    def mask(self) -> Mask | None:
        """Where the attack may act. A tensor is part of `state_dict()`, a function is not."""
        return self._mask_function if self.mask_tensor is None else self.mask_tensor

    @mask.setter
    def mask(self, mask: Mask | None) -> None:
        self.mask_tensor = mask.detach().clone() if isinstance(mask, Tensor) else None
        self._mask_function = None if isinstance(mask, Tensor) else mask

    def fit(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        transform: BatchTransform | None = None,
        seed: int = 0,
        **options: Any,
    ) -> Self:
        """Train on batches that are attacked at the current weights.

        During the attack, the network is in evaluation mode. Its batch statistics are those of the
        images that it is trained on.

        Parameters
        ----------
        images : Tensor of shape (N, C, H, W), uint8 or float in [0, 1]
        labels : Tensor of shape (N,), integers in 0..num_classes-1
        transform : callable, optional
            Changes each batch before the attack, for example `training.CropAndFlip()`.
        seed, options
            Of `training.fit`: epochs, batch_size, device, optimizer, checkpoint, ...

        Returns
        -------
        self
        """
        check_labels(labels, len(images), self.num_classes)
        mask = self.mask
        if isinstance(mask, Tensor) and mask.ndim == images.ndim and len(mask) > 1:
            raise DemurError(
                "training draws its batches at random, so a mask for each image does not fit them: "
                "give a callable, mask(images, labels)."
            )
        batches = AttackedBatches(
            self, self._attacker(), self.adversarial_fraction, seed, transform
        )
        with self._fitting():
            self.history_ = fit(
                self.module, images, labels, transform=batches, seed=seed, **options
            )
        return self

    def augment_and_finetune(
        self,
        images: Tensor,
        labels: Tensor,
        attacked: Tensor | None = None,
        *,
        seed: int = 0,
        **options: Any,
    ) -> Self:
        """Attack the trained network, add the successes to the images, and train further.

        The two steps of the rejection paper, sec. 3.4 and 4.3. The added images have their true
        labels. Attack the result again for an evaluation: the added images say nothing about it.

        Parameters
        ----------
        images, labels
            As for `fit`: what the network was trained on.
        attacked : Tensor of shape (M,), int64, optional
            Indices of the images to attack; all if None.
        seed, options
            As for `fit`.

        Returns
        -------
        self

        Raises
        ------
        DemurError
            If the network is not trained, or no attack succeeds.
        """
        self._check_fitted()
        check_labels(labels, len(images), self.num_classes)
        index = torch.arange(len(images)) if attacked is None else attacked
        clean = to_float(images[index])
        true = labels[index]
        found = self._attacker().succeed(self, clean, true, seed)
        # A success without a change is in the training set already.
        changed = (found != clean).flatten(1).any(1)
        broken = outcomes(self, found, true).to(changed.device) != Outcome.CORRECT
        added = broken & changed
        if not bool(added.any()):
            raise DemurError(
                f"no attack on the {len(index)} images succeeds, so there is nothing to add: "
                "use a larger eps or a stronger attack."
            )
        self.added_ = int(added.sum())
        together = torch.cat([to_float(images), found[added]])
        classes = torch.cat([labels, true[added.to(labels.device)]])
        self.history_ = fit(self.module, together, classes, seed=seed, **options)
        return self

    def hyperparameters(self) -> dict[str, Any]:
        """Give the parameters as JSON. "mask" is "tensor", "callable" or None.

        A mask that is a tensor is in `state_dict()`. A callable mask cannot be stored: set the
        attribute `mask` of the loaded defence before it is trained further.
        """
        kind = "tensor" if isinstance(self.mask, Tensor) else "callable"
        return {
            "attack": self.attack.to_dict(),
            "threat": str(self.threat),
            "adversarial_fraction": self.adversarial_fraction,
            "mask": None if self.mask is None else kind,
            "mask_after_attack": self.mask_after_attack,
        }

    def learned(self) -> dict[str, Any]:
        """Give the number of added images, as JSON."""
        return {"added": self.added_}

    @classmethod
    def rebuild(
        cls,
        networks: Mapping[str, Any],
        num_classes: int,
        hyperparameters: Mapping[str, Any],
        learned: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
    ) -> Self:
        """Make a fitted defence from a bundle; see `Defense.rebuild`."""
        parameters = dict(hyperparameters)
        parameters["attack"] = Attack.from_dict(parameters["attack"])
        if kind := parameters["mask"]:
            parameters["mask"] = tensors["mask_tensor"] if kind == "tensor" else LostMask()
        parameters["prefit"] = True
        defense = super().rebuild(networks, num_classes, parameters, learned, tensors)
        defense.added_ = int(learned["added"])
        return defense

    def _attacker(self) -> "MaskedAttack":
        return MaskedAttack(self.attack, self.threat, self.mask, self.mask_after_attack)


class LocalizedAdversarialTraining(AdversarialTraining):
    """A classifier that is trained on images whose background is attacked.

    Rothberg et al. 2019, algorithm 1. The network learns not to rely on the pixels of the mask. The
    input may also be a vector of features; then the mask names features.

    Parameters
    ----------
    network, num_classes, attack, threat, adversarial_fraction, mask_after_attack, prefit
        As for `AdversarialTraining`.
    mask : Tensor or callable
        Where the attack may act, for example `masks.outside(masks.centre_box((28, 28), 12, 12))` or
        `lambda images, labels: masks.outside(masks.foreground(images, dilation=1))`. A mask of 0
        everywhere is training without an attack.

    Examples
    --------
    >>> from demur import data, masks, networks
    >>> from demur.attacks import PGD
    >>> from demur.defenses import LocalizedAdversarialTraining
    >>> train, test = data.load("digits", "train"), data.load("digits", "test")
    >>> around = masks.outside(masks.centre_box((28, 28), 14, 14))
    >>> defense = LocalizedAdversarialTraining(
    ...     networks.dnr_cnn(10), 10, PGD(steps=2), "linf:0.3", mask=around
    ... )
    >>> defense = defense.fit(train.images[:32], train.labels[:32], epochs=1, batch_size=16)
    >>> defense.predict(test.to_float()[:2]).shape
    torch.Size([2])
    """

    def __init__(
        self,
        network: nn.Module,
        num_classes: int,
        attack: Attack,
        threat: ThreatModel | str,
        *,
        mask: Mask,
        adversarial_fraction: float = 1.0,
        mask_after_attack: bool = False,
        prefit: bool = False,
    ) -> None:
        given: object = mask
        if given is None and as_threat(threat).mask is None:
            raise DemurError("localized training needs a mask; AdversarialTraining needs none.")
        super().__init__(
            network,
            num_classes,
            attack,
            threat,
            adversarial_fraction=adversarial_fraction,
            mask=mask,
            mask_after_attack=mask_after_attack,
            prefit=prefit,
        )
