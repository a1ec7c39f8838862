"""Files of weights: what is in them, and whether a network takes it."""

import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from demur.data.messages import printable
from demur.errors import DemurError
from demur.networks import weights
from demur.untrusted import check_regular, user_path

CONTAINERS = ("state_dict", "model_state_dict", "model")
"""Keys under which training programs save a state dict."""
PREFIXES = ("module.", "model.", "_orig_mod.")
"""What DataParallel, Lightning and torch.compile put in front of each name."""


@dataclass(frozen=True)
class WeightsFile:
    """Weights of a file.

    Parameters
    ----------
    path : Path
    state : dict of str to Tensor
    about : dict of str to str
        The metadata of a safetensors file.
    notes : tuple of str
    """

    path: Path
    state: dict[str, Tensor]
    about: Mapping[str, str]
    notes: tuple[str, ...] = ()


def read_weights(path: Path, allow_pickle: bool) -> WeightsFile:
    """Read weights from a .safetensors file, or from a file that `torch.save` wrote.

    Raises
    ------
    DemurError
        If there is no such file, it is damaged, it contains something else, or it needs code to be
        run while `allow_pickle` is false.
    """
    path = user_path(path)
    if path.suffix == ".safetensors":
        state, about = weights.read(path)
        return WeightsFile(path, state, about)
    if allow_pickle:
        check_regular(path)
    else:
        weights.check_file(path)
    state, notes = _named(_unpickled(path, allow_pickle), path)
    return WeightsFile(path, state, {}, notes)


def is_torchscript(path: Path) -> bool:
    """Whether a file is a TorchScript archive."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _unpickled(path: Path, allow_pickle: bool) -> Any:
    try:
        if allow_pickle:
            # The user trusts this file, and has said so.
            return torch.load(path, map_location="cpu", weights_only=False)
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise DemurError(f"there is no file {printable(path)}.") from error
    except Exception as error:  # an unpickler raises whatever rubbish leads to
        text = str(error)
        if isinstance(error, pickle.UnpicklingError) and "Unsupported" in text:
            found = re.search(r"GLOBAL (\S+)", text)
            needs = f" ({printable(found[1], 60)})" if found else ""
            raise DemurError(
                f"{printable(path)} contains more than tensors{needs}, so reading it could run "
                "code in it: save the state dict alone, or, if you trust the file, give "
                "allow_pickle=True (--allow-pickle)."
            ) from error
        reason = printable(error, 120) or type(error).__name__
        raise DemurError(f"{printable(path)} is not a whole file of weights ({reason}).") from error


def _named(found: Any, path: Path) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Find the state dict in what a file contains."""
    notes: tuple[str, ...] = ()
    if isinstance(found, dict):
        key = next(
            (key for key in CONTAINERS if isinstance(found.get(key), dict | nn.Module)), None
        )
        if key is not None:
            notes = (f"The weights are those under the key {key!r} of {path.name}.",)
            found = found[key]
    if isinstance(found, nn.Module):
        notes = (*notes, f"{path.name} contains a whole module; its state dict is used.")
        found = found.state_dict()
    mapping = isinstance(found, dict) and bool(found)
    if not mapping or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in found.items()
    ):
        raise DemurError(
            f"{printable(path)} is not a state dict: it must map names to tensors, alone or under "
            f"one of the keys {', '.join(CONTAINERS)}."
        )
    return dict(found), notes


def without_prefix(file: WeightsFile, wanted: Mapping[str, Tensor]) -> WeightsFile:
    """Take a prefix off that all names of a file have, and no name that the network wants has."""
    state = file.state
    notes = list(file.notes)
    while prefix := next((one for one in PREFIXES if _is_prefix(one, state, wanted)), None):
        state = {name.removeprefix(prefix): value for name, value in state.items()}
        notes.append(f"All names in {file.path.name} begin with {prefix!r}; it is left out.")
    return WeightsFile(file.path, state, file.about, tuple(notes))


def _is_prefix(prefix: str, state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> bool:
    everywhere = all(name.startswith(prefix) for name in state)
    return everywhere and not any(name.startswith(prefix) for name in wanted)


def load_strictly(network: nn.Module, file: WeightsFile, label: str) -> tuple[str, ...]:
    """Load the weights of a file into a network, whose names and shapes must be the same.

    Returns
    -------
    tuple of str
        Notes: the precision of the weights, where it is not that of the network.

    Raises
    ------
    DemurError
        If they are not. The message counts the differences and names the first three.
    """
    wanted = network.state_dict()
    # Weights from before torch 0.4.1 have no such counters, and evaluation does not use them.
    counters = {name: wanted[name] for name in wanted if name.endswith("num_batches_tracked")}
    state = OrderedDict({**counters, **file.state})
    missing = [name for name in wanted if name not in state]
    unexpected = [name for name in state if name not in wanted]
    others = [
        f"{printable(name, 60)} {tuple(value.shape)} instead of {tuple(wanted[name].shape)}"
        for name, value in state.items()
        if name in wanted and value.shape != wanted[name].shape
    ]
    faults = [
        f"{len(names)} {what} ({', '.join(printable(one, 120) for one in names[:3])})"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("misshaped", others))
        if names
    ]
    if faults:
        raise DemurError(
            f"{printable(file.path)} does not have the weights of {label}: {', '.join(faults)}."
        )
    # Names and shapes are those of this version: no module may convert them from an older one.
    vars(state)["_metadata"] = getattr(wanted, "_metadata", None)
    network.load_state_dict(state)
    given = {value.dtype for value in file.state.values() if value.is_floating_point()}
    kinds = sorted(str(kind).removeprefix("torch.") for kind in given - {torch.float32})
    if not kinds:
        return ()
    return (f"The weights are {', '.join(kinds)}; demur computes in float32.",)
