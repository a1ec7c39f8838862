"""The module inside neural rejection: inner layers, their machines, and a constant reject score."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from demur.classifier import evaluating
from demur.data import to_float
from demur.defenses.rbf_svm import PARTS, OneVsRestRBFSVM
from demur.errors import DemurError
from demur.hardware import tuned
from demur.networks.features import FeatureExtractor

Scores = Literal["probability", "decision"]
"""What machines give: Platt's probabilities, normalised over the classes, or decision values."""

BATCH_SIZE = 64
"""Images of a pass. The activations of a ResNet-18 at 224 pixels then take about 0.5 GB."""


class RejectingNetwork(nn.Module):
    """Maps images (N, C, H, W) to scores (N, K + 1).

    Parameters
    ----------
    extractor : FeatureExtractor
        Gives the features of the layers.
    scores : {"probability", "decision"}

    Attributes
    ----------
    machines : nn.ModuleList of OneVsRestRBFSVM
        One for each layer; empty before fitting.
    combiner : OneVsRestRBFSVM or None
        Reads the scores of all machines. Without one, there is a single layer.
    threshold : Tensor of shape ()
        The reject score of every image.
    """

    threshold: Tensor

    def __init__(self, extractor: FeatureExtractor, scores: Scores, threshold: float) -> None:
        super().__init__()
        self.extractor = extractor
        self.machines = nn.ModuleList()
        self.combiner: OneVsRestRBFSVM | None = None
        self.kind = scores
        self.register_buffer("threshold", torch.tensor(float(threshold)))

    def each(self) -> list[OneVsRestRBFSVM]:
        """Give the machines of the layers."""
        return [machine for machine in self.machines if isinstance(machine, OneVsRestRBFSVM)]

    def everyone(self) -> list[OneVsRestRBFSVM]:
        """Give the machines of the layers, then the combiner if there is one."""
        return self.each() if self.combiner is None else [*self.each(), self.combiner]

    def install(self, machines: Sequence[OneVsRestRBFSVM], combined: bool) -> None:
        """Take machines in the order of `everyone`."""
        self.machines = nn.ModuleList(machines[:-1] if combined else machines)
        self.combiner = machines[-1] if combined else None

    @contextmanager
    def unchanged_by_errors(self) -> Iterator[None]:
        """Inside, machines and threshold may change. After an error they are those from before."""
        machines = self.machines
        combiner = self.combiner
        threshold = self.threshold.clone()
        try:
            yield
        except BaseException:
            self.machines = machines
            self.combiner = combiner
            self.threshold.copy_(threshold)
            raise

    def scores_of(self, machine: OneVsRestRBFSVM, values: Tensor) -> Tensor:
        """Turn the decision values (N, K) of a machine into its scores (N, K)."""
        return machine.probabilities(values) if self.kind == "probability" else values

    def forward(self, images: Tensor) -> Tensor:
        """Compute the scores of the classes, and the threshold as the reject score."""
        by_layer = [
            self.scores_of(machine, machine(features))
            for machine, features in zip(self.each(), self.extractor(images), strict=True)
        ]
        scores = by_layer[0]
        if self.combiner is not None:
            scores = self.scores_of(self.combiner, self.combiner(torch.cat(by_layer, 1)))
        return torch.cat([scores, self.threshold.to(scores).expand(scores.shape[0], 1)], 1)

    @torch.no_grad()
    def features(
        self, layers: Sequence[str], images: Tensor, device: torch.device
    ) -> Iterator[Tensor]:
        """Compute the features (n, D) of each layer on the CPU, as at prediction.

        If `max_features` bounds their size, one pass over the images gives those of all layers.
        Else there is a pass for each layer: its features take most of the memory.
        """
        largest = self.extractor.max_features
        together = [layers] if largest is not None else [[layer] for layer in layers]
        for some in together:
            extractor = FeatureExtractor(self.extractor.network, some, largest)
            with evaluating(extractor), tuned(), torch.autocast(device.type, enabled=False):
                batches = [
                    [one.cpu() for one in extractor(to_float(batch.to(device)))]
                    for batch in torch.split(images, BATCH_SIZE)
                ]
            yield from (torch.cat(parts) for parts in zip(*batches, strict=True))


def one_for_each(value: float | str | Sequence[float], count: int, name: str) -> list[Any]:
    """Give one number for each layer, or "scale" for each; see `DeepNeuralRejection`."""
    if value == "scale" and name == "gamma":
        return ["scale"] * count
    values: list[Any] = [value] * count if isinstance(value, (int, float)) else list(value)
    if len(values) != count:
        raise DemurError(
            f"{name} must be one number, or one for each of the {count} layers; got {len(values)}."
        )
    return [one if one == "scale" else float(one) for one in values]


def check_network(rejecting: "RejectingNetwork", tensors: Mapping[str, Tensor]) -> None:
    """Raise DemurError if a `state_dict` of a defence is of another network."""
    own = {
        f"module.extractor.{name}": tensor.shape
        for name, tensor in rejecting.extractor.state_dict().items()
    }
    own["module.threshold"] = torch.Size([])
    given = {
        name: tensor.shape
        for name, tensor in tensors.items()
        if not name.startswith(("module.machines.", "module.combiner."))
    }
    if own != given:
        wrong = sorted(own.items() ^ given.items())[0][0]
        raise DemurError(f"the state is of another network: {wrong!r} does not fit.")


def machines_from(
    tensors: Mapping[str, Tensor], gammas: object, layers: int, num_classes: int, combined: bool
) -> list[OneVsRestRBFSVM]:
    """Make the machines of a fitted `RejectingNetwork` from its state.

    Parameters
    ----------
    tensors : dict of Tensor
        A `state_dict` of the defence, with names such as "module.machines.0.support".
    gammas : list of float
        Of the machines of the layers, and of the combiner.
    layers : int
        Number of layers.
    num_classes : int
    combined : bool
        Whether there is a combiner.

    Raises
    ------
    DemurError
        If a tensor is missing or has a wrong shape, or the gammas do not fit.
    """
    names = [f"module.machines.{place}." for place in range(layers)]
    names += ["module.combiner."] if combined else []
    if not isinstance(gammas, Sequence) or len(gammas) != len(names):
        raise DemurError(f"the state needs a list of {len(names)} gammas, not {gammas!r}.")
    machines = []
    for name, gamma in zip(names, gammas, strict=True):
        if type(gamma) not in (int, float) or not (gamma > 0 and math.isfinite(gamma)):
            raise DemurError(f"gammas must be positive and finite numbers, not {gamma!r}.")
        missing = [name + part for part in (*PARTS, "squares") if name + part not in tensors]
        if missing:
            raise DemurError(f"the state has no tensor {missing[0]!r}.")
        parts = [tensors[name + part] for part in PARTS]
        _check_machine(name, parts, tensors[name + "squares"], num_classes)
        machines.append(OneVsRestRBFSVM(*parts, gamma=float(gamma)))
    if combined and len(machines[-1].centre) != layers * num_classes:
        raise DemurError(
            f"the combiner of the state takes {len(machines[-1].centre)} scores; "
            f"{layers} layers of {num_classes} classes give {layers * num_classes}."
        )
    return machines


def _check_machine(name: str, parts: list[Tensor], squares: Tensor, num_classes: int) -> None:
    support, centre = parts[:2]
    count = len(support) if support.ndim == 2 else -1
    features = len(centre) if centre.ndim == 1 else -1
    wanted = [
        (count, features),
        (features,),
        (count, num_classes),
        (num_classes,),
        (num_classes, 2),
        (count,),
    ]
    for part, tensor, shape in zip((*PARTS, "squares"), [*parts, squares], wanted, strict=True):
        fits = tensor.dtype == support.dtype and tensor.is_floating_point()
        if tensor.shape != shape or not fits:
            raise DemurError(
                f"{name}{part} of the state has shape {tuple(tensor.shape)} and type "
                f"{tensor.dtype}; the machines of {num_classes} classes need {shape}."
            )
