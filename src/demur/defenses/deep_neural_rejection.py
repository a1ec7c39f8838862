"""Deep neural rejection: RBF machines on several inner layers of a network (Sotgiu et al. 2020).

As in the rejection paper, sec. 2.4.2. Network, machines and reject score are one differentiable
classifier. The reject score is a constant threshold.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Self, get_args

import torch
from torch import Tensor, nn

from demur.classifier import check_counts, check_labels, device_of
from demur.data import to_float
from demur.defenses.base import Defense
from demur.defenses.rbf_fitting import check_validation, fit_rbf_svm, search_rbf_svm, set_aside
from demur.defenses.rbf_svm import OneVsRestRBFSVM
from demur.defenses.rejecting_network import (
    RejectingNetwork,
    Scores,
    check_network,
    machines_from,
    one_for_each,
)
from demur.errors import DemurError, unknown
from demur.metrics.rejection import quantile_threshold
from demur.networks.features import FeatureExtractor
from demur.progress import job


class DeepNeuralRejection(Defense):
    """A classifier on several inner layers of a network. It rejects if its best score is low.

    Each layer has one machine for each class. Combining machines are fitted on the out-of-fold
    scores of the layers (Sotgiu et al. 2020; the rejection paper, sec. 2.4.2, does not say on
    what). They decide instead of the last layer of the network.

    Parameters
    ----------
    network : nn.Module
        A trained network; takes images (N, C, H, W) in [0, 1]. It is not trained further.
    num_classes : int
        Number of classes K.
    layers : sequence of str
        Module paths, as in `network.named_modules()`. The paper uses its layers 5, 7 and 8, after
        the rectifiers.
    C, gamma : float or sequence of float, default .1 and .01
        Penalty and kernel width of the machines: one for all layers, or one for each layer. The
        defaults are the paper's. The gamma "scale" is 1 / (features * their variance).
    combiner_C, combiner_gamma : float, default .1 and .01
        The same for the combining machines.
    threshold : float, default .9
        The reject score, in the unit of `scores`. The default is the paper's, for probabilities.
    false_rejection_rate : float in [0, 1), optional
        If given, `fit` sets the threshold instead: the largest one that rejects at most this share
        of the validation images.
    scores : {"probability", "decision"}, default "probability"
        Platt's probabilities, normalised over the classes, or decision values.
    folds : int, default 5
        Folds of the cross-validation for out-of-fold scores and for the sigmoids.
    seed : int, default 0
    max_features : int, optional
        Larger outputs of a layer are averaged over windows, see `networks.features.pooled`.

    Attributes
    ----------
    machines_ : list of OneVsRestRBFSVM
        The machines of the layers.
    combiner_ : OneVsRestRBFSVM or None
        The combining machines.
    gammas_ : list of float
        Kernel widths of `machines_` and `combiner_`.
    false_rejection_rate_ : float or None
        Share of the validation images that is rejected; None without validation images.

    Examples
    --------
    >>> from demur import data
    >>> from demur.defenses import DeepNeuralRejection
    >>> from torch import nn
    >>> train, test = data.load("digits", "train"), data.load("digits", "test")
    >>> network = nn.Sequential(nn.AvgPool2d(4), nn.Flatten())
    >>> defense = DeepNeuralRejection(network, 10, ["0", "1"], C=10.0, threshold=0.5)
    >>> defense.fit(train.images[:300], train.labels[:300]).predict(test.to_float()[:4]).shape
    torch.Size([4])
    """

    places: ClassVar[Mapping[str, str]] = {"network": "module.extractor.network"}
    combined: ClassVar[bool] = True
    false_rejection_rate_: float | None = None

    def __init__(
        self,
        network: nn.Module,
        num_classes: int,
        layers: Sequence[str],
        *,
        C: float | Sequence[float] = 0.1,
        gamma: float | Sequence[float] | Literal["scale"] = 0.01,
        combiner_C: float = 0.1,
        combiner_gamma: float | Literal["scale"] = 0.01,
        threshold: float = 0.9,
        false_rejection_rate: float | None = None,
        scores: Scores = "probability",
        folds: int = 5,
        seed: int = 0,
        max_features: int | None = None,
    ) -> None:
        if scores not in get_args(Scores):
            raise unknown("kind of scores", scores, get_args(Scores))
        if isinstance(layers, str) or not layers:
            raise DemurError("layers must be a list of at least one module path.")
        if false_rejection_rate is not None and not 0 <= false_rejection_rate < 1:
            raise DemurError(f"false_rejection_rate must be in [0, 1), not {false_rejection_rate}.")
        check_counts(2, folds=folds)
        extractor = FeatureExtractor(network, layers, max_features)
        module = RejectingNetwork(extractor, scores, threshold)
        super().__init__(module, num_classes, rejects=True, fitted=False)
        self.layers = tuple(layers)
        self.C = one_for_each(C, len(layers), "C")
        self.gamma = one_for_each(gamma, len(layers), "gamma")
        self.combiner_C = float(combiner_C)
        self.combiner_gamma = one_for_each(combiner_gamma, 1, "gamma")[0]
        self.false_rejection_rate = false_rejection_rate
        self.folds = folds
        self.seed = seed
        self._given_threshold = float(threshold)

    @property
    def threshold(self) -> float:
        """The reject score of every image, in the unit of the scores, rounded to float32."""
        return float(self._rejecting.threshold)

    def set_threshold(self, value: float) -> None:
        """Change the threshold, in the unit of the scores; see `Classifier.set_threshold`."""
        self._check_fitted()
        super().set_threshold(value)

    def _acceptance(self, scores: Tensor) -> Tensor:
        return scores[:, : self.num_classes].amax(1).double()

    def _move_threshold(self, value: float) -> None:
        self._rejecting.threshold.fill_(value)

    @property
    def _rejecting(self) -> RejectingNetwork:
        assert isinstance(self.module, RejectingNetwork)
        return self.module

    @property
    def machines_(self) -> list[OneVsRestRBFSVM]:
        """The machines of the layers."""
        return self._rejecting.each()

    @property
    def combiner_(self) -> OneVsRestRBFSVM | None:
        """The combining machines."""
        return self._rejecting.combiner

    @property
    def gammas_(self) -> list[float]:
        """The kernel widths of the layers' machines and of the combining machines."""
        return [machine.gamma for machine in self._rejecting.everyone()]

    def search(
        self, images: Tensor, labels: Tensor, *, Cs: Sequence[float], gammas: Sequence[float]
    ) -> Self:
        """Choose C and gamma of each layer by cross-validated accuracy. Call `fit` afterwards.

        The combining machines keep their values.

        Parameters
        ----------
        images, labels
            As for `fit`. A few hundred of each class are enough.
        Cs, gammas : sequence of float
            Every pair is tried.

        Returns
        -------
        self
        """
        check_labels(labels, len(images), self.num_classes)
        device = device_of(self, images.device)
        options: dict[str, Any] = {"folds": self.folds, "seed": self.seed}
        best = []
        with job("search of C and gamma", len(self.layers)) as progress:
            outputs = self._rejecting.features(self.layers, images, device)
            for layer, features in zip(self.layers, outputs, strict=True):
                found = search_rbf_svm(
                    features, labels, self.num_classes, Cs=Cs, gammas=gammas, **options
                )
                best.append(found)
                progress.advance(1, f"layer {layer}, accuracy {found[2][found[:2]]:.1%}")
        self.C = [found[0] for found in best]
        self.gamma = [found[1] for found in best]
        return self

    def fit(
        self, images: Tensor, labels: Tensor, validation: tuple[Tensor, Tensor] | None = None
    ) -> Self:
        """Fit the machines and set the threshold.

        Parameters
        ----------
        images : Tensor of shape (n, C, H, W), uint8 or float in [0, 1]
            Best are images that the network was not trained on; about 1,000 of each class are
            enough. Memory grows as 8 n^2 bytes.
        labels : Tensor of shape (n,), integers in 0..num_classes-1
        validation : (Tensor, Tensor), optional
            Images and labels that only the threshold is set on. Without them, and with a false
            rejection rate, a tenth of the images is set aside; no machine sees it (R17).

        Returns
        -------
        self

        Raises
        ------
        DemurError
            If a label is out of range, a class has fewer than `folds` images, or the validation
            images have another shape. The defence is then unchanged.
        """
        check_labels(labels, len(images), self.num_classes)
        if validation is not None:
            check_validation(validation, images, self.num_classes)
        elif self.false_rejection_rate is not None:
            kept, aside = set_aside(labels, self.seed)
            validation = (images[aside], labels[aside])
            images, labels = images[kept], labels[kept]
        rejecting = self._rejecting
        device = device_of(self, images.device)
        options: dict[str, Any] = {"folds": self.folds, "seed": self.seed}
        machines = []
        outside = []
        with job("machines", len(self.layers) + self.combined) as progress:
            outputs = rejecting.features(self.layers, images, device)
            settings = zip(self.layers, self.C, self.gamma, strict=True)
            for features, (layer, C, gamma) in zip(outputs, settings, strict=True):
                machine, values = fit_rbf_svm(
                    features, labels, self.num_classes, C=C, gamma=gamma, **options
                )
                machines.append(machine.to(device))
                outside.append(rejecting.scores_of(machine, values.to(device)))
                progress.advance(1, f"layer {layer}")
            if self.combined:
                combiner, _ = fit_rbf_svm(
                    torch.cat(outside, 1).cpu(),
                    labels,
                    self.num_classes,
                    C=self.combiner_C,
                    gamma=self.combiner_gamma,
                    **options,
                )
                machines.append(combiner.to(device))
                progress.advance(1, "combiner")
        with self._fitting(), rejecting.unchanged_by_errors():
            rejecting.install(machines, self.combined)
            self._fit_threshold(validation)
        return self

    def _fit_threshold(self, validation: tuple[Tensor, Tensor] | None) -> None:
        best = None
        if validation is not None:
            best = self.scores(to_float(validation[0]))[:, : self.num_classes].amax(1)
        threshold = self._given_threshold
        if self.false_rejection_rate is not None and best is not None:
            threshold = quantile_threshold(best, self.false_rejection_rate)
        self._move_threshold(threshold)
        rate = None
        if best is not None:
            rejected = best < self._rejecting.threshold.to(best)
            rate = float(rejected.float().mean())
        self.false_rejection_rate_ = rate

    def _probabilities(self, scores: Tensor) -> Tensor:
        return scores if self._rejecting.kind == "probability" else scores.softmax(1)

    def restore(self, tensors: Mapping[str, Tensor], gammas: Sequence[float]) -> Self:
        """Take the state of a fitted defence with the same network, layers and scores.

        Parameters
        ----------
        tensors : dict of Tensor
            The `state_dict()` of the fitted defence.
        gammas : sequence of float
            Its `gammas_`.

        Returns
        -------
        self

        Raises
        ------
        DemurError
            If the state does not fit. The defence is then unchanged.
        """
        machines = machines_from(tensors, gammas, len(self.layers), self.num_classes, self.combined)
        check_network(self._rejecting, tensors)
        device = device_of(self, torch.device("cpu"))
        self._rejecting.install([one.to(device) for one in machines], self.combined)
        self.load_state_dict(tensors)
        self.fitted_ = True
        return self

    def hyperparameters(self) -> dict[str, Any]:
        """Give the parameters of the constructor besides `network` and `num_classes`, as JSON."""
        return {
            "layers": list(self.layers),
            "C": self.C,
            "gamma": self.gamma,
            "combiner_C": self.combiner_C,
            "combiner_gamma": self.combiner_gamma,
            **self._common(),
        }

    def _common(self) -> dict[str, Any]:
        return {
            "threshold": self._given_threshold,
            "false_rejection_rate": self.false_rejection_rate,
            "scores": self._rejecting.kind,
            "folds": self.folds,
            "seed": self.seed,
            "max_features": self._rejecting.extractor.max_features,
        }

    def learned(self) -> dict[str, Any]:
        """Give the gammas and the false rejection rate, as JSON."""
        return {"gammas": self.gammas_, "false_rejection_rate": self.false_rejection_rate_}

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
        gammas = learned.get("gammas")
        machines = machines_from(tensors, gammas, len(defense.layers), num_classes, cls.combined)
        defense._rejecting.install(machines, cls.combined)
        defense.false_rejection_rate_ = learned.get("false_rejection_rate")
        defense.fitted_ = True
        return defense
