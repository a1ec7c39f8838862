"""Neural rejection and deep neural rejection: RBF machines on a network's inner layers, which decline where none is sure.

Melis et al. 2017 (one layer) and Sotgiu et al. 2020 (several layers, and a machine that combines them), as in the rejection paper,
sec. 2.4. The whole, network, machines and all, is one differentiable classifier whose reject score is a constant threshold.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, Self, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from demur.classifier import Classifier, check_labels, device_of, evaluating
from demur.data import as_floats
from demur.defenses.rbf_svm import RBFMachines, fit_rbf_svm, search_rbf_svm
from demur.errors import DemurError, unknown
from demur.files import replacing
from demur.hardware import tuned

Scores = Literal["probability", "decision"]
"""What the machines say: Platt's probabilities normalised over classes, or decision values."""

VALIDATION = 0.1  # share of the images that a threshold is set on, where none are given for it


class Taps(nn.Module):
    """A network that gives the outputs of inner layers, each flattened to (N, features), in the order of `layers`.

    A layer that is called several times gives its last output. Raises: DemurError for a layer that is not there, or not reached.
    """

    def __init__(self, network: nn.Module, layers: Sequence[str]) -> None:
        super().__init__()
        modules = dict(network.named_modules())
        for name in layers:
            if not name or name not in modules:
                raise unknown("layer", name, [known for known in modules if known])
        self.network, self.layers = network, tuple(layers)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Features of images (N, C, H, W) at each layer."""
        seen: dict[str, Tensor] = {}
        modules = dict(self.network.named_modules())

        def keep(name: str) -> object:
            # A copy: the next layer may well work in place.
            return lambda module, given, output: seen.__setitem__(name, output.flatten(1).clone())

        handles = [modules[name].register_forward_hook(keep(name)) for name in self.layers]
        try:
            self.network(images)
        finally:
            for handle in handles:
                handle.remove()
        missing = [name for name in self.layers if name not in seen]
        if missing:
            raise DemurError(f"the network's layer {missing[0]!r} is not reached on the way from images to scores.")
        return [seen[name] for name in self.layers]


class Rejecting(nn.Module):
    """Taps, a machine for each, perhaps one that combines them, and the threshold: images (N, C, H, W) -> scores (N, K + 1)."""

    threshold: Tensor

    def __init__(self, taps: Taps, machines: Sequence[RBFMachines], combiner: RBFMachines | None, scores: Scores) -> None:
        super().__init__()
        self.taps, self.machines, self.combiner, self.kind = taps, nn.ModuleList(machines), combiner, scores
        self.register_buffer("threshold", torch.zeros(()))

    def each(self) -> list[RBFMachines]:
        """The machines of the layers."""
        return [machine for machine in self.machines if isinstance(machine, RBFMachines)]

    def said(self, machine: RBFMachines, values: Tensor) -> Tensor:
        """Scores (N, K) of a machine's decision values."""
        return machine.probabilities(values) if self.kind == "probability" else values

    def forward(self, images: Tensor) -> Tensor:
        """Scores of the classes, and the threshold as the reject score."""
        said = [self.said(machine, machine(features)) for machine, features in zip(self.each(), self.taps(images), strict=True)]
        scores = said[0] if self.combiner is None else self.said(self.combiner, self.combiner(torch.cat(said, 1)))
        return torch.cat([scores, self.threshold.to(scores).expand(len(scores), 1)], 1)


class DeepNeuralRejection(Classifier):
    """A classifier that reads several inner layers of a network, and declines where its best score is below a threshold.

    Each layer has its machines; their scores out of fold are what the combining machines are fitted on (Sotgiu et al. 2020;
    the rejection paper, sec. 2.4.2, does not say). It decides instead of the network's last layer.

    Args:
        network: any trained torch network, images (N, C, H, W) in [0, 1]; it is not trained further.
        num_classes: K.
        layers: module paths, as `network.named_modules()` has them; the paper's are its layers 5, 7 and 8 after their rectifiers.
        C, gamma: of the machines, one for all layers or one each. The paper's are .1 and .01.
        combiner_C, combiner_gamma: of the machines that combine.
        threshold: the reject score in the unit of `scores`: the paper's .9 on probabilities.
        false_rejection_rate: if given, the threshold is instead the largest that declines at most this share of validation images.
        scores: what the machines say, to the combiner and at last.
        folds: of the cross-validation that gives scores out of fold, and the sigmoids.

    Attributes:
        threshold_: the threshold in use. false_rejection_: what share of the validation images it declines; None without.
    """

    threshold_: float
    false_rejection_: float | None = None
    combined = True

    def __init__(
        self,
        network: nn.Module,
        num_classes: int,
        layers: Sequence[str],
        *,
        C: float | Sequence[float] = 0.1,
        gamma: float | Sequence[float] = 0.01,
        combiner_C: float = 0.1,
        combiner_gamma: float = 0.01,
        threshold: float = 0.9,
        false_rejection_rate: float | None = None,
        scores: Scores = "probability",
        folds: int = 5,
        seed: int = 0,
    ) -> None:
        if scores not in get_args(Scores):
            raise unknown("kind of scores", scores, get_args(Scores))
        if isinstance(layers, str) or not layers:
            raise DemurError("layers must be a list of at least one module path.")
        if false_rejection_rate is not None and not 0 <= false_rejection_rate < 1:
            raise DemurError(f"a false rejection rate lies in [0, 1), not at {false_rejection_rate}.")
        super().__init__(Rejecting(Taps(network, layers), [], None, scores), num_classes)
        self.C, self.gamma = _each(C, len(layers), "C"), _each(gamma, len(layers), "gamma")
        self.combiner_C, self.combiner_gamma, self.folds, self.seed = combiner_C, combiner_gamma, folds, seed
        self.threshold, self.false_rejection_rate = threshold, false_rejection_rate

    def forward(self, images: Tensor) -> Tensor:
        """Scores (N, K + 1), the last of them the threshold. Raises: DemurError before `fit`."""
        if not len(self.rejecting.machines):
            raise DemurError(f"{type(self).__name__} has no machines yet: call fit(images, labels) first.")
        return super().forward(images)

    @property
    def rejecting(self) -> Rejecting:
        """What gives the scores."""
        assert isinstance(self.module, Rejecting)
        return self.module

    def search(self, images: Tensor, labels: Tensor, *, Cs: Sequence[float], gammas: Sequence[float]) -> Self:
        """Choose C and gamma of each layer's machines by cross-validated accuracy; those that combine keep theirs. Then `fit`.

        Args:
            images, labels: as for `fit`; a few hundred of each class do.
            Cs, gammas: what is tried, every pair of them.
        """
        check_labels(labels, len(images), self.num_classes)
        device, C, gamma = device_of(self, images.device), [], []
        for name in self.rejecting.taps.layers:
            features = _features(Taps(self.rejecting.taps.network, [name]), images, device)
            best = search_rbf_svm(features, labels, self.num_classes, Cs=list(Cs), gammas=list(gammas), folds=self.folds, seed=self.seed)
            C.append(best[0])
            gamma.append(best[1])
        self.C, self.gamma = C, gamma
        return self

    def fit(self, images: Tensor, labels: Tensor, validation: tuple[Tensor, Tensor] | None = None) -> Self:
        """Fit the machines on images that the network had best not been trained on, and set the threshold.

        Args:
            images: (n, C, H, W) uint8, or float in [0, 1]; about 1,000 of each class do. Memory grows as 8 n^2 bytes.
            labels: (n,) in 0..num_classes-1.
            validation: images and labels for the threshold alone; if there are none and a false rejection rate is asked for,
                a tenth of the images is set aside for it, and no machine sees them (R17).

        Raises: DemurError for labels out of range, or a class with fewer than `folds` images.
        """
        check_labels(labels, len(images), self.num_classes)
        if self.false_rejection_rate is not None and validation is None:
            rows = range(len(images))
            kept, aside = train_test_split(rows, test_size=VALIDATION, stratify=labels.tolist(), random_state=self.seed)
            validation, images, labels = (images[aside], labels[aside]), images[kept], labels[kept]
        rejecting, machines, outside = self.rejecting, [], []
        device = device_of(self, images.device)
        options = {"folds": self.folds, "seed": self.seed}
        # A layer at a time: the features of one are what takes memory.
        for name, C, gamma in zip(rejecting.taps.layers, self.C, self.gamma, strict=True):
            features = _features(Taps(rejecting.taps.network, [name]), images, device)
            machine, values = fit_rbf_svm(features, labels, self.num_classes, C=C, gamma=gamma, **options)
            machines.append(machine.to(device))
            outside.append(rejecting.said(machine, values.to(device)))
        rejecting.machines, rejecting.combiner = nn.ModuleList(machines), None
        if self.combined:
            together = torch.cat(outside, 1).cpu()
            combiner, _ = fit_rbf_svm(together, labels, self.num_classes, C=self.combiner_C, gamma=self.combiner_gamma, **options)
            rejecting.combiner = combiner.to(device)
        self._set_threshold(validation)
        return self

    def _set_threshold(self, validation: tuple[Tensor, Tensor] | None) -> None:
        best = None if validation is None else self.scores(as_floats(validation[0]))[:, : self.num_classes].amax(1)
        rate = self.false_rejection_rate
        self.threshold_ = self.threshold if rate is None or best is None else quantile_threshold(best, rate)
        self.rejecting.threshold.fill_(self.threshold_)
        self.false_rejection_ = None if best is None else float((best < self.rejecting.threshold.to(best)).float().mean())

    @property
    def gammas(self) -> list[float]:
        """The kernels' gammas: the layers' and the combiner's."""
        combiner = self.rejecting.combiner
        return [machine.gamma for machine in self.rejecting.each() + ([] if combiner is None else [combiner])]

    def save(self, path: Path | str) -> None:
        """Write network, machines and threshold as safetensors."""
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        gammas = ",".join(map(repr, self.gammas))
        with replacing(Path(path)) as partial:
            save_file(tensors, partial, {"gammas": gammas, "layers": ",".join(self.rejecting.taps.layers), "kind": self.rejecting.kind})

    def load(self, path: Path | str) -> Self:
        """Read what `save` wrote into an object made with the same network, layers and scores. Raises: DemurError if it does not fit."""
        wanted = ",".join(self.rejecting.taps.layers)
        try:
            with safe_open(path, "pt") as file:
                said = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        except (OSError, SafetensorError) as error:
            raise DemurError(f"{path} cannot be read as safetensors: {error}") from error
        if said.get("layers") != wanted or said.get("kind") != self.rejecting.kind:
            raise DemurError(f"{path} holds {said.get('kind')} machines of layers {said.get('layers')}, which are not those asked for.")
        try:
            return self.restore(tensors, [float(text) for text in said["gammas"].split(",")])
        except DemurError as error:
            raise DemurError(f"{path} does not fit: {error}") from error

    def restore(self, tensors: Mapping[str, Tensor], gammas: Sequence[float]) -> Self:
        """Take the state of a fitted one: its `state_dict()` and the `gammas` of its machines. Raises: DemurError if it does not fit."""
        rejecting = self.rejecting
        names = [f"module.machines.{place}." for place in range(len(rejecting.taps.layers))]
        names += ["module.combiner."] if self.combined else []
        if len(names) != len(gammas):
            raise DemurError(f"there are {len(gammas)} sets of machines; {len(names)} are wanted.")
        parts = ("support", "centre", "weights", "intercepts", "platt")
        try:
            machines = [
                RBFMachines(*(tensors[name + part] for part in parts), gamma=gamma) for name, gamma in zip(names, gammas, strict=True)
            ]
            rejecting.machines = nn.ModuleList(machines[: len(rejecting.taps.layers)])
            rejecting.combiner = machines[-1] if self.combined else None
            self.load_state_dict(tensors)
        except (KeyError, RuntimeError) as error:
            raise DemurError(f"the state is not this network's: {error}") from error
        self.threshold_ = float(rejecting.threshold)
        return self


class NeuralRejection(DeepNeuralRejection):
    """A classifier that reads one inner layer of a network, and declines where its best score is below a threshold (Melis et al. 2017).

    Args:
        layer: a module path; the paper's is the last but one, after its rectifier. The others are as in `DeepNeuralRejection`.
    """

    combined = False

    def __init__(
        self,
        network: nn.Module,
        num_classes: int,
        layer: str,
        *,
        C: float = 0.1,
        gamma: float = 0.01,
        threshold: float = 0.9,
        false_rejection_rate: float | None = None,
        scores: Scores = "probability",
        folds: int = 5,
        seed: int = 0,
    ) -> None:
        options = {"threshold": threshold, "false_rejection_rate": false_rejection_rate, "scores": scores}
        super().__init__(network, num_classes, [layer], C=C, gamma=gamma, folds=folds, seed=seed, **options)  # type: ignore[arg-type]


def quantile_threshold(best: Tensor, rate: float) -> float:
    """The largest threshold below which at most `rate` of the best scores (n,) lie: the floor(rate n)-th smallest, from 0.

    A score equal to the threshold is accepted, so ties are never declined in excess (R17).
    """
    ordered = best.sort().values
    return float(ordered[min(len(ordered) - 1, int(rate * len(ordered) + 1e-9))])


@torch.no_grad()
def _features(taps: Taps, images: Tensor, device: torch.device, batch_size: int = 512) -> Tensor:
    """Features (n, D) of the one layer of `taps`, on the CPU, as the network gives them when it decides."""
    with evaluating(taps), tuned(), torch.autocast(device.type, enabled=False):
        return torch.cat([taps(as_floats(batch.to(device)))[0].cpu() for batch in torch.split(images, batch_size)])


def _each(value: float | Sequence[float], count: int, name: str) -> list[float]:
    values = [value] * count if isinstance(value, (int, float)) else list(value)
    if len(values) != count:
        raise DemurError(f"{name} must be one number, or one for each of the {count} layers; got {len(values)}.")
    return values
