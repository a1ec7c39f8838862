"""Bundles: a classifier in a folder, as `config.json` and `weights.safetensors`.

`demur.load_model` reads them. Neither file can run code.
"""

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

import demur
from demur.classifier import Classifier, check_classifier
from demur.defenses.descriptions import IMAGES, about, described, hashes_to_tensor
from demur.errors import DemurError
from demur.files import file_digest
from demur.writing import replacing, writing

SCHEMA: Final = 2
CONFIG: Final = "config.json"
WEIGHTS: Final = "weights.safetensors"


def save_classifier(classifier: Classifier, folder: Path | str) -> None:
    """Write a defence, or a plain `Classifier`, into a folder.

    Each file is written completely or not at all. The config contains the digest of the weights: if
    a process is killed after the first file of two, `load_model` refuses the folder.

    Parameters
    ----------
    classifier : Classifier
        A fitted defence, or a `Classifier`. Networks that `demur.networks` builds, and those that
        `load_model` took from timm and torchvision, are described in the config. `load_model` needs
        other networks as an argument. Class names, preprocessing and provenance are kept.
    folder : path
        Created if it does not exist.

    Raises
    ------
    DemurError
        If the classifier cannot be stored, or the folder cannot be written. Nothing is left behind.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> from demur import Classifier, networks
    >>> from demur.loading import save_model
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_model(Classifier(networks.dnr_cnn(10), 10), folder)
    ...     sorted(path.name for path in Path(folder).iterdir())
    ['config.json', 'weights.safetensors']
    """
    folder = Path(folder)
    description, tensors = state_of(classifier)
    config = {
        "schema": SCHEMA,
        "demur": demur.__version__,
        **description,
        **about(classifier),
    }
    if classifier.provenance is not None:
        tensors[IMAGES] = hashes_to_tensor(classifier.provenance.images)
    with writing(folder):
        new = not folder.exists()
    try:
        with replacing(folder / WEIGHTS) as weights, replacing(folder / CONFIG) as text:
            save_file(tensors, weights)
            config["sha256"] = file_digest(weights)
            text.write_text(_as_json(config), encoding="utf-8")
    except SafetensorError as error:
        raise DemurError(f"cannot write {folder / WEIGHTS}: {error}") from error
    finally:
        if new:
            with suppress(OSError):
                folder.rmdir()  # it is empty after an error only


def state_of(classifier: Classifier) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Give what a bundle holds of a classifier: a description as JSON, and contiguous weights.

    Raises
    ------
    DemurError
        If the classifier cannot be stored.
    """
    check_classifier(classifier)
    description = described(classifier)
    if description is None:
        raise DemurError(
            f"{type(classifier).__name__} cannot be saved: only Classifier and the defences can."
        )
    state = _state(classifier)
    layouts = [name for name, tensor in state.items() if _is_channels_last(tensor)]
    description = {**description, "channels_last": layouts}
    _as_json(description)
    return description, {name: _copied(tensor) for name, tensor in state.items()}


def _state(module: nn.Module) -> dict[str, Tensor]:
    state = dict(module.state_dict())
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise DemurError(f"the state {name!r} is no tensor, so the model cannot be saved.")
    return state


def _copied(tensor: Tensor) -> Tensor:
    """A copy with memory of its own: safetensors refuses tensors that share memory."""
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)


def _is_channels_last(tensor: Tensor) -> bool:
    """Whether the weights of a convolution are stored channels last, as training leaves them.

    The order in memory decides which kernels run, and so the last bits of the scores.
    """
    if tensor.ndim != 4:
        return False
    empty = torch.empty(tensor.shape, device="meta")
    last = empty.clone(memory_format=torch.channels_last)
    return tensor.stride() == last.stride() != empty.stride()


def _as_json(config: Mapping[str, Any]) -> str:
    try:
        return json.dumps(config, indent=1, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise DemurError(f"the parameters cannot be saved as JSON: {error}.") from error
