"""What torchvision's and timm's models share: building, weights from a file, the classifier."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from demur.classifier import Classifier, Preprocess
from demur.data.messages import printable
from demur.errors import DemurError
from demur.loading.preprocessing import chosen
from demur.loading.request import ModelRequest
from demur.loading.state_dicts import WeightsFile, load_strictly, without_prefix
from demur.loading.wrapping import classifier_of
from demur.networks.libraries import OWN

OPTIONS = (
    *("checkpoint", "num_classes", "reject_column", "model_kwargs", "preprocess", "allow_pickle"),
)
"""The options of `load_model` that these sources take."""


@dataclass(frozen=True)
class Blueprint:
    """How a library builds one of its networks, without weights.

    Parameters
    ----------
    label : str
        The network's source, for messages.
    build : callable
        Gives a network with a number of columns.
    columns : int
        The columns that the library's own weights have.
    head : callable
        Names the tensor of a network whose rows are the columns, or gives None.
    """

    label: str
    build: Callable[[int], nn.Module]
    columns: int
    head: Callable[[nn.Module], str | None]


def check_kwargs(request: ModelRequest) -> None:
    """Raise DemurError for model_kwargs that demur sets itself."""
    taken = [name for name in request.model_kwargs if name in OWN]
    if taken:
        raise DemurError(
            f"model_kwargs cannot set {taken[0]}: use the options num_classes and checkpoint."
        )


def built(label: str, builder: Callable[..., Any], **options: Any) -> nn.Module:
    """Call a library's builder. Weights that it draws are the same each time."""
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            network: nn.Module = builder(**options)
    except OSError:
        raise  # a download, which the caller explains
    except Exception as error:  # arguments of the user can fail anywhere in a constructor
        raise DemurError(
            f"{label} cannot be built: {type(error).__name__}: {printable(error).rstrip('.')}."
        ) from error
    return network


def loaded(
    plan: Blueprint, file: WeightsFile, request: ModelRequest
) -> tuple[nn.Module, tuple[str, ...]]:
    """Build a network with as many columns as its weights have, load them, and give notes."""
    _check_architecture(plan.label, file)
    wanted = None
    if request.num_classes is not None:
        wanted = request.num_classes + (request.reject_column is not None)
    network = plan.build(wanted or plan.columns)
    file = without_prefix(file, network.state_dict())
    if wanted is None:
        weights = file.state.get(plan.head(network) or "")
        if weights is not None and weights.ndim and len(weights) not in (0, plan.columns):
            network = plan.build(len(weights))
    notes = load_strictly(network, file, plan.label)
    return network, (*file.notes, *notes)


def _check_architecture(label: str, file: WeightsFile) -> None:
    """Raise DemurError if the metadata of a file name another architecture."""
    own = label.partition(":")[2].partition(".")[0]
    said = file.about.get("architecture", own)
    if said != own:
        raise DemurError(
            f"{printable(file.path)} has the weights of {printable(said, 60)}, not of {own}."
        )


def check_columns(request: ModelRequest, columns: int, label: str) -> None:
    """Raise DemurError if downloaded weights have another number of classes than was given."""
    classes = columns - (request.reject_column is not None)
    if request.num_classes not in (None, classes):
        raise DemurError(
            f"the weights of {label} have {classes} classes, not {request.num_classes}: give "
            "weights with as many as checkpoint=FILE (--checkpoint FILE)."
        )


def finished(
    network: nn.Module, base: Preprocess, names: Sequence[str] | None, request: ModelRequest
) -> Classifier:
    """Make the classifier. Names that are not of its classes are left out."""
    classifier = classifier_of(
        network,
        request.num_classes,
        chosen(request.preprocess, base),
        None,
        rejects=request.reject_column is not None,
        reject_column=request.reject_column,
    )
    if names is not None and len(names) == classifier.num_classes:
        classifier.class_names = tuple(names)
    return classifier


def not_downloaded(label: str, file: str, url: str, error: BaseException | None) -> DemurError:
    """Make the error for weights that could not be downloaded."""
    return DemurError(
        f"cannot download the weights of {label}, {file} from {url}: "
        f"{printable(error, 120).rstrip('.')}. Get this file on a machine with a connection, and "
        "give it as checkpoint=FILE (--checkpoint FILE)."
    )
