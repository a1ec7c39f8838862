"""Reading of bundles: the folders that `Defense.save` and `save_model` write."""

import copy
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import demur
from demur import networks
from demur.classifier import Classifier
from demur.data.messages import printable
from demur.defenses import Defense
from demur.defenses.descriptions import IMAGES, PLAIN, blank, numbers_of, set_about
from demur.defenses.saving import CONFIG, SCHEMA, WEIGHTS
from demur.errors import DemurError, unknown
from demur.files import file_digest
from demur.networks import weights
from demur.networks.adapted import AdaptedNetwork
from demur.networks.heads import replace_head
from demur.untrusted import decoding, read_json


def load_bundle(folder: Path | str, network: nn.Module | None = None) -> Classifier:
    """Load a classifier that `Defense.save` or `save_model` wrote.

    Nothing in a bundle can run code.

    Parameters
    ----------
    folder : path
        A folder with `config.json` and `weights.safetensors`.
    network : nn.Module, optional
        A network with the architecture of the saved one. It is needed if neither `demur.networks`
        nor timm nor torchvision built the saved network. It is copied, and the copy gets the saved
        weights.

    Returns
    -------
    Classifier
        On the CPU, in evaluation mode, with its class names, preprocessing and provenance.

    Raises
    ------
    DemurError
        If a file is missing, damaged or of another version, or the network does not fit.

    Examples
    --------
    >>> import tempfile, torch
    >>> from demur import Classifier, networks
    >>> from demur.loading import save_model
    >>> classifier, images = Classifier(networks.dnr_cnn(10), 10), torch.rand(2, 1, 28, 28)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_model(classifier, folder)
    ...     torch.equal(load_bundle(folder).scores(images), classifier.scores(images))
    True
    """
    folder = Path(folder)
    config = _config(folder / CONFIG)
    tensors = _tensors(folder / WEIGHTS, config)
    try:
        images = tensors.pop(IMAGES, None)
        classifier = restored(config, tensors, network)
        set_about(classifier, config, images)
        return classifier
    except DemurError as error:
        raise DemurError(f"{folder} cannot be loaded: {error}") from error
    except Exception as error:  # a wrong value in the config can fail anywhere in a constructor
        raise DemurError(
            f"{folder} cannot be loaded: its {CONFIG} and {WEIGHTS} do not fit "
            f"({type(error).__name__}: {printable(error)})."
        ) from error


def restored(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], network: nn.Module | None = None
) -> Classifier:
    """Build the classifier that `state_of` described, in evaluation mode, with these weights."""
    builder = _Builder(network)
    classifier = builder.classifier(config, tensors)
    builder.check_network_used()
    classifier.load_state_dict(dict(tensors), assign=True)
    return classifier.eval()


class _Builder:
    """Builds classifiers and networks from their descriptions."""

    def __init__(self, network: nn.Module | None) -> None:
        self.network = network
        self.used = False

    def classifier(self, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Classifier:
        """Build a classifier without its weights. Names of `tensors` are relative to it."""
        kind = config["kind"]
        num_classes = config["num_classes"]
        if type(num_classes) is not int:
            raise DemurError(f"num_classes is {num_classes!r} instead of an integer.")
        if kind == PLAIN:
            inner = self.module(config["network"], _below(tensors, "module"))
            classifier = Classifier(inner, num_classes)
        elif kind in Defense.kinds:
            cls = Defense.kinds[kind]
            parts = {
                name: self.module(config[name], _below(tensors, path))
                for name, path in cls.places.items()
            }
            parameters = config["parameters"]
            classifier = cls.rebuild(parts, num_classes, parameters, config["fitted"], tensors)
        else:
            raise unknown("kind of model", str(kind), [PLAIN, *Defense.kinds])
        rejects = config["rejects"]
        threshold = config["threshold"]
        if rejects not in (None, True, False) or type(threshold) not in (int, float):
            raise DemurError(f"rejects is {rejects!r} and threshold {threshold!r}.")
        if not math.isfinite(threshold):
            raise DemurError(f"the threshold is {threshold}.")
        if threshold and rejects is not True:
            raise DemurError(f"the threshold is {threshold}, but rejects is {rejects}.")
        classifier._columns.value = rejects
        classifier._threshold = float(threshold)
        return classifier

    def module(self, config: Mapping[str, Any] | None, tensors: Mapping[str, Tensor]) -> nn.Module:
        """Build a classifier or network from its description, or take the given network."""
        if config is None:
            if self.network is None:
                raise DemurError(
                    "demur does not know the architecture of its network: give one of the same "
                    "architecture, load_model(folder, network=...), or the code that makes it, "
                    "--arch py:FILE.py:FACTORY."
                )
            self.used = True
            return _copied(self.network)
        if "kind" in config:
            return self.classifier(config, tensors)
        if "adapted" in config:
            return self._adapted(config, tensors)
        if set(config) == {"head"}:
            network = self.module(None, tensors)
            replace_head(network, config["head"])
            network.changed_head = config["head"]
            return network
        _check_fits(config, tensors)
        return networks.build(config)

    def _adapted(self, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> nn.Module:
        """Build a network behind its normalisation."""
        found = config["adapted"]
        mean = numbers_of(found["mean"], "mean")
        std = numbers_of(found["std"], "std")
        column = found["reject_column"]
        if len(mean) != len(std) or not all(one > 0 for one in std):
            raise DemurError("mean and std of its normalisation do not fit.")
        if column is not None and (type(column) is not int or column < 0):
            raise DemurError(f"the reject column is {str(column)[:20]!r}.")
        network = self.module(config["network"], _below(tensors, "network"))
        return AdaptedNetwork(network, mean, std, column)

    def check_network_used(self) -> None:
        """Raise DemurError if a network was given in vain."""
        if self.network is not None and not self.used:
            raise DemurError("it describes its network: do not give another one.")


def _check_fits(architecture: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Raise DemurError unless a described network has the weights of the file.

    It is built without memory for its weights first: a description may ask for more than there is.
    """
    wanted = {name: one.shape for name, one in blank(architecture).state_dict().items()}
    given = {name: one.shape for name, one in tensors.items()}
    if wanted != given:
        name = min(wanted.keys() ^ given.keys() or {n for n in wanted if wanted[n] != given[n]})
        raise DemurError(f"its {CONFIG} and {WEIGHTS} do not fit: {name[:80]!r}.")


def _copied(network: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(network)
    except (RuntimeError, TypeError) as error:
        raise DemurError(f"the given network cannot be copied: {printable(error)}.") from error


def _below(tensors: Mapping[str, Tensor], path: str) -> dict[str, Tensor]:
    """The tensors of the module at a path, with names relative to it."""
    prefix = path + "."
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }


def _config(path: Path) -> dict[str, Any]:
    """Read the config of a bundle."""
    if not path.is_file():
        raise DemurError(f"{path.parent} is no saved model: it has no file {path.name}.")
    config = read_json(path)
    if not isinstance(config, dict):
        raise DemurError(f"{path} is damaged: it must contain a JSON object.")
    if config.get("schema") != SCHEMA:
        by = f", which demur {str(config['demur'])[:40]} wrote" if "demur" in config else ""
        raise DemurError(
            f"{path} has schema {str(config.get('schema'))[:40]!r}{by}; this version of demur, "
            f"{demur.__version__}, reads schema {SCHEMA}. Save the model again, or use that "
            "version of demur."
        )
    return config


def _tensors(path: Path, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Read the weights of a bundle, in the order in memory that they were saved from."""
    if not path.is_file():
        raise DemurError(f"{path.parent} is no saved model: it has no file {path.name}.")
    with decoding(path, "a file of weights"):
        if file_digest(path) != config.get("sha256"):
            raise DemurError(
                f"{path} is damaged, or belongs to another {CONFIG}: save the model again."
            )
    tensors, _ = weights.read(path)
    layouts = config.get("channels_last")
    if not isinstance(layouts, list):
        raise DemurError(f"{path.with_name(CONFIG)} is damaged: it has no list channels_last.")
    for name in layouts:
        if not isinstance(name, str) or name not in tensors or tensors[name].ndim != 4:
            raise DemurError(f"{path} has no weights {str(name)[:80]!r} of a convolution.")
        tensors[name] = tensors[name].clone(memory_format=torch.channels_last)
    return tensors
