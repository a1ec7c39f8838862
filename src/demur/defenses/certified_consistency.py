"""Rejection of answers that are not proven to be constant around the image."""

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Self, get_args

import torch
from torch import Tensor, nn

from demur.classifier import Classifier, check_counts, check_labels, device_of, evaluating
from demur.data import to_float
from demur.defenses.base import Defense
from demur.defenses.confidence_threshold import check_rate
from demur.defenses.consistency_checks import Check, Consistent, check_delta
from demur.defenses.smoothing_check import GRADIENT_DRAWS, Expected, SmoothedConsistent
from demur.errors import DemurError, unknown
from demur.hardware import tuned
from demur.progress import job

BATCH_SIZE = 256
HALVINGS = 14
"""Of the cube root of delta: a network that was not trained for proofs has a delta below 1e-4."""


class CertifiedConsistency(Defense):
    """A classifier that answers as its network, and rejects where the answer is not proven constant
    within delta: in Linf, or by randomized smoothing in L2.

    With c the best class, m is a lower bound of min_k (s_c - s_k) over all images within delta in
    [0, 1]. The reject score is s_c - m: an image is rejected if m < 0. So an image on which the
    network is certified at r is never wrong and accepted at eps = r + delta (docs/certificates.md).

    Parameters
    ----------
    network : nn.Module
        A trained network or classifier without a reject column, from images (N, C, H, W) in [0, 1]
        to scores (N, num_classes). For a useful delta it is trained for certificates, see
        `demur.training.certified_fit`.
    num_classes : int
        Number of classes K.
    delta : float in [0, 1], optional
        Radius of the check, in the unit of pixels. Of "smoothing": a Euclidean length.
    check : {"ibp", "crown-ibp", "pgd", "smoothing"}, default "ibp"
        - "ibp": intervals. Deterministic and differentiable, and in exported graphs.
        - "crown-ibp": linear functions over these intervals. Slower, often tighter.
        - "pgd": an attack, so nothing is proven: *unproven*. Chen et al. 2023; on MNIST, delta .1,
          20 steps of .01 from the image itself.
        - "smoothing": the answer is that of the smoothed classifier, accepted if the lower bound of
          its radius is above delta (Cohen et al. 2019). It holds with probability 1 - alpha for
          each image. The network is trained with noise, see `training.SmoothingLoss`. An attacker
          that tries many images finds one in 1 / alpha whose draws mislead.
    false_rejection_rate : float in [0, 1), optional
        Instead of delta: `fit` finds the largest delta at which at most this share of the correct
        images is rejected.
    steps : int, default 20
        Steps of "pgd".
    step_size : float, optional
        Length of the steps of "pgd". Default: a tenth of delta.
    sigma : float, default 0.25
        Deviation of the noise of "smoothing".
    draws : int, default 1000
        Noisy copies of each image at prediction. 10,000 certify at most 3.2 sigma at alpha .001.
    alpha : float, default 0.001
    seed : int, default 0
        Of the noise, beside the content of the image.

    Attributes
    ----------
    delta : float or None
        None before `fit`, if it was not given.
    proven : bool
        Whether the check proves something: not for "pgd".
    false_rejection_rate_ : float or None
        The share of the correct images of `fit` that is rejected.

    Raises
    ------
    DemurError
        If not exactly one of `delta` and `false_rejection_rate` is given, a value is out of range,
        or the network rejects.
    UnsupportedLayerError
        At the first scores, if a layer of the network has no bounds.

    Notes
    -----
    m is rounded downwards, by 2^-19 of the sum of the sizes of its terms (about 16 roundings of
    float32). `threshold` and `set_threshold` are delta.

    Examples
    --------
    >>> import torch
    >>> from demur.defenses import CertifiedConsistency
    >>> images = torch.tensor([[[[0.1, 0.9]]], [[[0.4, 0.6]]]])
    >>> CertifiedConsistency(torch.nn.Flatten(), 2, delta=0.2).predict(images)
    tensor([ 1, -1])
    >>> found = CertifiedConsistency(torch.nn.Flatten(), 2, false_rejection_rate=0.5)
    >>> round(found.fit(images, torch.tensor([1, 1])).delta, 2)  # half of the difference .8
    0.4
    """

    places: ClassVar[Mapping[str, str]] = {"network": "module.network"}
    _remedy: ClassVar[str] = " on held-out images, or give delta"
    false_rejection_rate_: float | None = None

    def __init__(
        self,
        network: nn.Module,
        num_classes: int,
        delta: float | None = None,
        check: Check = "ibp",
        *,
        false_rejection_rate: float | None = None,
        steps: int = 20,
        step_size: float | None = None,
        sigma: float = 0.25,
        draws: int = 1000,
        alpha: float = 0.001,
        seed: int = 0,
    ) -> None:
        if check not in get_args(Check):
            raise unknown("check", str(check), get_args(Check))
        if (delta is None) == (false_rejection_rate is None):
            raise DemurError("give delta or a false rejection rate, one of the two.")
        if false_rejection_rate is not None:
            check_rate(false_rejection_rate)
        check_counts(steps=steps, draws=draws)
        if isinstance(network, Classifier) and network._columns.value:
            raise DemurError(
                f"{type(network).__name__} rejects already: CertifiedConsistency takes a network "
                "without a reject column."
            )
        self._largest = math.inf if check == "smoothing" else 1.0
        start = 0.0 if delta is None else check_delta(delta, self._largest)
        module: Consistent | SmoothedConsistent
        if check == "smoothing":
            module = SmoothedConsistent(network, num_classes, start, sigma, draws, alpha, seed)
        else:
            module = Consistent(network, num_classes, start, check, steps, step_size)
        super().__init__(module, num_classes, rejects=True, fitted=delta is not None)
        self.check = check
        self.false_rejection_rate = false_rejection_rate
        self._given_delta = None if delta is None else start
        self._options = {"steps": steps, "step_size": step_size}
        self._options |= {"sigma": sigma, "draws": draws, "alpha": alpha, "seed": seed}

    @property
    def _consistent(self) -> Consistent | SmoothedConsistent:
        assert isinstance(self.module, Consistent | SmoothedConsistent)
        return self.module

    @property
    def delta(self) -> float | None:
        """The radius of the check."""
        return self._consistent.delta if self.fitted_ else None

    @property
    def proven(self) -> bool:
        """Whether the check proves something."""
        return self.check != "pgd"

    @property
    def threshold(self) -> float:
        """Delta: the radius within which an accepted answer is proven to be constant."""
        self._check_fitted()
        return self._consistent.delta

    def set_threshold(self, value: float) -> None:
        """Change delta. Larger values reject more images.

        Raises
        ------
        DemurError
            If the value is not in [0, 1].
        """
        self._check_fitted()
        self._consistent.delta = check_delta(value, self._largest)

    def _acceptance_of(self, images: Tensor, scores: Tensor) -> Tensor:
        """Give, for images (N, ...) in [0, 1], the largest delta at which each is accepted."""
        return self.radii(images)

    def _accept_from(self, value: float) -> None:
        self._consistent.delta = min(self._largest, max(0.0, value))

    @torch.no_grad()
    def radii(self, images: Tensor, batch_size: int = BATCH_SIZE) -> Tensor:
        """Find the largest delta at which each image is accepted, by bisection.

        Parameters
        ----------
        images : Tensor of shape (n, C, H, W), float in [0, 1]
        batch_size : int, default 256

        Returns
        -------
        Tensor of shape (n,), float64
            Each image is accepted at its value, which is a float32. -1 where it is rejected at 0,
            too. The cube roots are right to 2^-14: .1 to 4e-5, and .001 to 2e-6.
        """
        device = device_of(self, images.device)
        with evaluating(self), tuned(), torch.autocast(device.type, enabled=False):
            parts = torch.split(images, batch_size)
            return torch.cat([self._radii(part.to(device)).cpu() for part in parts])

    def _radii(self, images: Tensor) -> Tensor:
        if isinstance(self._consistent, SmoothedConsistent):
            # An image is accepted if its radius is above delta.
            return self._consistent.smoothed(images, "predict")[1] * (1 - 2.0**-23)
        zero = torch.zeros(len(images), dtype=torch.float64, device=images.device)
        answered = self._accepted(images, zero)
        low = torch.where(self._accepted(images, zero + 1), 1.0, zero)
        high = zero + 1
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            accepted = self._accepted(images, _delta_of(middle))
            low = torch.where(accepted, middle, low)
            high = torch.where(accepted, high, middle)
        return torch.where(answered, _delta_of(low), -1.0)

    def _accepted(self, images: Tensor, delta: Tensor) -> Tensor:
        assert isinstance(self._consistent, Consistent)
        return self._consistent.room(images, delta.to(images.dtype))[1] >= 0

    def fit(self, images: Tensor, labels: Tensor, batch_size: int = BATCH_SIZE) -> Self:
        """Find delta on held-out images, if a false rejection rate was given, and measure the rate.

        Parameters
        ----------
        images : Tensor of shape (n, C, H, W), uint8 or float in [0, 1]
            Images that the network was not trained on (R17).
        labels : Tensor of shape (n,), integers in 0..num_classes-1
        batch_size : int, default 256

        Returns
        -------
        self

        Raises
        ------
        DemurError
            If no image is correct, or the rate cannot be reached. The defence is then unchanged.
        """
        check_labels(labels, len(images), self.num_classes)
        with self._fitting(), job("delta", 1) as progress:
            parts = [to_float(part) for part in torch.split(images, batch_size)]
            answers = torch.cat([self.scores(part)[:, : self.num_classes] for part in parts])
            right = answers.argmax(1) == labels.to(answers.device)
            if not bool(right.any()):
                raise DemurError("the network is wrong on all images: there is no delta to find.")
            radii = torch.cat([self.radii(part) for part in parts])[right.cpu()]
            delta = self._consistent.delta
            if self.false_rejection_rate is not None:
                order = radii.sort().values
                delta = float(order[int(self.false_rejection_rate * len(order) + 1e-9)])
                if delta < 0:
                    raise DemurError(
                        f"{100 * float((radii < 0).double().mean()):.3g} % of the correct images "
                        "are rejected at delta 0, too: the rate cannot be reached."
                    )
            progress.advance(1)
        self._consistent.delta = delta
        self.false_rejection_rate_ = float((radii < delta).double().mean())
        return self

    def surrogate(self, draws: int = GRADIENT_DRAWS, common: bool = True) -> Classifier:
        """Make a differentiable stand-in for the check "smoothing", for attacks: the expectation
        over a few draws decides.

        Transfer an attack on it, see `attacks.Transfer`: the defence itself then scores each image
        with all its draws. `keep_maximizing` finds images that do not depend on the few draws.

        Parameters
        ----------
        draws : int, default 64
        common : bool, default True
            Whether all images have the same noise at every step. False: noise by their content, so
            that each step has other draws.

        Returns
        -------
        Classifier

        Raises
        ------
        DemurError
            For another check: attacks differentiate through it themselves.

        Examples
        --------
        >>> import torch
        >>> from demur.attacks import PGD, Transfer
        >>> images, labels = torch.tensor([[[[0.2, 0.8]]]]), torch.tensor([1])
        >>> model = CertifiedConsistency(torch.nn.Flatten(), 2, 0.1, "smoothing", draws=100)
        >>> attack = Transfer(PGD(steps=5, keep_maximizing=True))
        >>> attack(model, images, labels, "l2:0.1", surrogate=model.surrogate(8)).success
        tensor([False])
        """
        check_counts(draws=draws)
        module = self._consistent
        if not isinstance(module, SmoothedConsistent):
            raise DemurError(f"only the check smoothing has a surrogate, not {self.check}.")
        return Classifier(Expected(module, draws, common), self.num_classes)

    def _probabilities(self, scores: Tensor) -> Tensor:
        inner = self.network
        if (
            isinstance(inner, Classifier)
            and self.check != "smoothing"
            and inner.num_classes == self.num_classes
        ):
            return inner._probabilities(scores)
        return scores.softmax(1)

    def hyperparameters(self) -> dict[str, Any]:
        """Give the parameters of the constructor besides `network` and `num_classes`, as JSON."""
        return {
            "delta": self._given_delta,
            "check": self.check,
            "false_rejection_rate": self.false_rejection_rate,
            **self._options,
        }

    def learned(self) -> dict[str, Any]:
        """Give delta and the false rejection rate, as JSON."""
        return {
            "delta": self._consistent.delta,
            "false_rejection_rate": self.false_rejection_rate_,
        }

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
        defense = super().rebuild(networks, num_classes, hyperparameters, learned, tensors)
        defense._consistent.delta = check_delta(learned.get("delta"), defense._largest)
        defense.false_rejection_rate_ = learned.get("false_rejection_rate")
        defense.fitted_ = True
        return defense


def _delta_of(root: Tensor) -> Tensor:
    """Give the cube as a float32, which is what the check reads."""
    return root.pow(3).float().double()
