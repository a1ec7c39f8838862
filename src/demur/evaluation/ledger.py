"""The ledger: what each cell of an experiment came to, under a hash of what it was asked.

A cell is a pure function of its configuration (settings, data, model, seed), so a result that is there need not be computed
again, whoever computed it and when. Each lies in a file of its own, written whole or not at all.
"""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from demur.files import canonical_json, digest, replacing
from demur.progress import message

Computed = tuple[Mapping[str, Any], Mapping[str, Tensor]]


@dataclass(frozen=True)
class Cell:
    """A result: JSON-able values, tensors, and the seconds that it took when it was computed (after a kill: since then)."""

    key: str
    values: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    seconds: float


class Ledger:
    """The cells in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def cell(self, config: Mapping[str, Any], compute: Callable[[Path], Computed]) -> Cell:
        """Give the result for this configuration: from its file if that is there and sound, else computed and kept.

        `compute` gets a path where it may keep a checkpoint of its own while it works.
        A file that is corrupted, or holds another configuration's result, is computed anew, with a warning.
        """
        key = digest(canonical_json(config))
        path = self.folder / f"{key}.safetensors"
        if path.exists():
            if cell := _load(path, key):
                return cell
            message(f"warning: ledger cell {path.name} is corrupted or foreign; it is computed again.")
        start = time.monotonic()
        values, tensors = compute(self.folder / f"{key}.checkpoint")
        cell = Cell(key, values, {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, time.monotonic() - start)
        _save(path, cell, config)
        return cell


def _seal(key: str, values: str, seconds: str, tensors: Mapping[str, Tensor]) -> str:
    """A hash over all that a cell holds, to know it by when it is read."""
    parts = [part for name in sorted(tensors) for part in (name, str(tensors[name].dtype), str(tuple(tensors[name].shape)))]
    return digest(key, values, seconds, *parts, *(tensors[name].numpy().tobytes() for name in sorted(tensors)))


def _save(path: Path, cell: Cell, config: Mapping[str, Any]) -> None:
    values, seconds = canonical_json(cell.values), repr(cell.seconds)
    about = {
        "key": cell.key,
        "config": canonical_json(config),
        "values": values,
        "seconds": seconds,
        "seal": _seal(cell.key, values, seconds, cell.tensors),
    }
    with replacing(path) as partial:
        save_file(dict(cell.tensors), partial, metadata=about)


def _load(path: Path, key: str) -> Cell | None:
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        if about["key"] != key or about["seal"] != _seal(key, about["values"], about["seconds"], tensors):
            return None
        return Cell(key, json.loads(about["values"]), tensors, float(about["seconds"]))
    except (SafetensorError, OSError, KeyError, ValueError, TypeError, RecursionError):
        return None
