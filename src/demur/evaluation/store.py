"""A store of the results of nodes, by a hash of their configuration.

A node is a pure function of its configuration (settings, data, model, seed), so a stored result
replaces its computation. Each result is one file, written completely or not at all.
"""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from demur.files import canonical_json, digest
from demur.progress import message
from demur.writing import replacing

Computed = tuple[Mapping[str, Any], Mapping[str, Tensor]]
"""What a node computes: values that JSON can hold, and tensors."""


@dataclass(frozen=True)
class NodeResult:
    """Result of a node.

    Parameters
    ----------
    key : str
        Hash of the configuration.
    values : mapping of str to object
        Values that JSON can hold.
    tensors : mapping of str to Tensor
        Tensors on the CPU.
    seconds : float
        Time of the computation; after an interruption, since the last start.
    """

    key: str
    values: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    seconds: float


class Store:
    """A folder of results.

    Each result has a seal, which is verified on reading. The seal guards against damage, not
    against malice: a person who can write into the folder can also write a valid seal.

    Parameters
    ----------
    folder : Path
        The folder. It is created with the first result.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     store = Store(Path(folder))
    ...     first = store.cell({"a": 1}, lambda _: ({"sum": 3}, {}))
    ...     store.cell({"a": 1}, lambda _: ({"sum": 4}, {})).values
    {'sum': 3}
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def read(self, key: str) -> NodeResult | None:
        """Return the stored result of a key, or None if there is none.

        A file that is damaged, or holds the result of another key, counts as missing, with a
        warning.
        """
        path = self.path(key)
        if not path.exists():
            return None
        result = _load(path, key)
        if result is None:
            message(
                f"warning: the stored result {path.name} is damaged or belongs to another "
                "configuration; it is computed again."
            )
        return result

    def write(self, result: NodeResult, config: Mapping[str, Any]) -> None:
        """Store a result, completely or not at all; `config` tells readers what it belongs to."""
        _save(self.path(result.key), result, config)

    def path(self, key: str) -> Path:
        """Give the file of a key."""
        return self.folder / f"{key}.safetensors"

    def newest(self, prefix: str, suffix: str) -> str | None:
        """Return the newest stored key that begins and ends like this, or None."""
        found = self.folder.glob(f"{prefix}-*{suffix}.safetensors")
        path = max(found, key=lambda one: one.stat().st_mtime, default=None)
        return path.name.removesuffix(".safetensors") if path else None

    def cell(self, config: Mapping[str, Any], compute: Callable[[Path], Computed]) -> NodeResult:
        """Return the stored result of a configuration, or compute and store it.

        Parameters
        ----------
        config : mapping of str to object
            All that the result depends on, in values that JSON can hold.
        compute : callable
            Computes the result. Its argument is the path of a checkpoint of its own.

        Returns
        -------
        NodeResult
            The result.
        """
        key = digest(canonical_json(config))
        if result := self.read(key):
            return result
        start = time.monotonic()
        values, tensors = compute(self.folder / f"{key}.checkpoint")
        result = computed(key, (values, tensors), time.monotonic() - start)
        self.write(result, config)
        return result


def computed(key: str, found: Computed, seconds: float) -> NodeResult:
    """Make the result of a node from what it computed."""
    values, tensors = found
    # Fresh values have the types of stored ones: JSON has no tuples and no integers as keys.
    values = json.loads(canonical_json(values))
    return NodeResult(key, values, _with_own_memory(tensors), seconds)


def _with_own_memory(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors to the CPU; of those that share memory, each gets its own: files need that."""
    on_cpu: dict[str, Tensor] = {}
    taken: set[int] = set()
    for name, tensor in tensors.items():
        own = tensor.detach().cpu().contiguous()
        place = own.untyped_storage().data_ptr()
        if place in taken or own.untyped_storage().nbytes() > own.nbytes:
            own = own.clone()
        taken.add(own.untyped_storage().data_ptr())
        on_cpu[name] = own
    return on_cpu


def _seal(key: str, about: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """Hash the whole content of a result, to verify it on reading."""
    names = sorted(tensors)
    kinds = [
        part
        for name in names
        for part in (name, str(tensors[name].dtype), str(tuple(tensors[name].shape)))
    ]
    # As bytes: numpy has no bfloat16.
    content = (tensors[name].reshape(-1).view(torch.uint8).numpy().tobytes() for name in names)
    texts = (about["config"], about["values"], about["seconds"])
    return digest(key, *texts, *kinds, *content)


def _save(path: Path, result: NodeResult, config: Mapping[str, Any]) -> None:
    about = {
        "key": result.key,
        "config": canonical_json(config),
        "values": canonical_json(result.values),
        "seconds": repr(result.seconds),
    }
    about["seal"] = _seal(result.key, about, result.tensors)
    with replacing(path) as partial:
        save_file(dict(result.tensors), partial, metadata=about)


def _load(path: Path, key: str) -> NodeResult | None:
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            names = list(file.keys())
            tensors = {name: file.get_tensor(name) for name in names}
        seal = _seal(key, about, tensors)
        if about["key"] != key or about["seal"] != seal:
            return None
        return NodeResult(key, json.loads(about["values"]), tensors, float(about["seconds"]))
    except (SafetensorError, OSError, KeyError, ValueError, TypeError, RecursionError):
        return None
