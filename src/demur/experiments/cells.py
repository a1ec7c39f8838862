"""What an experiment runs in: its ledger, its device, its seed, and the account of what each cell cost."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from demur.evaluation import Cell, Ledger
from demur.evaluation.ledger import Computed
from demur.experiments.results import CellCost
from demur.hardware import has_fast_bfloat16
from demur.progress import Job

CELLS = 1  # to be raised when a change of the code changes what a cell comes to: those of before are then computed anew
LIBRARIES = ("demur", "torch", "torchvision", "scikit-learn", "lightning", "numpy")


def versions() -> dict[str, str]:
    """Versions of the libraries that can change a figure."""
    return {name: version(name) for name in LIBRARIES}


BLIND = 0.01
"""The share of zero gradients from which it is worth a warning."""


def blind(cells: Mapping[str, Cell]) -> list[str]:
    """Warn of the attacks, by what is said of each, that were without a gradient to follow (R14, R20)."""
    lines = []
    for what, cell in cells.items():
        flat, backwards = cell.values.get("flat", 0), cell.values.get("backwards", 0)
        if flat > BLIND * max(1, backwards):
            lines.append(
                f"{what}: {100 * flat / backwards:.0f} % of the attack's gradients were zero, and what it did not find says little."
            )
    return lines


@dataclass
class Run:
    """One run of an experiment."""

    ledger: Ledger
    device: str
    seed: int
    progress: Job
    costs: list[CellCost] = field(default_factory=list)

    def cell(self, name: str, config: Mapping[str, Any], compute: Callable[[Path], Computed], work: float) -> Cell:
        """Give the cell of that configuration, computed or remembered. `config` must name all that the result depends on.

        `work` is its share of the units that the experiment announced. A compute's values may hold `forwards` and `backwards`.
        """
        self.progress.advance(0, name)
        precision = "bfloat16" if has_fast_bfloat16(torch.device(self.device)) else "float32"
        made_by = {"cells": CELLS, "versions": versions(), "device": self.device, "precision": precision}
        cell = self.ledger.cell({**made_by, **config}, compute)
        values = cell.values
        self.costs.append(CellCost(name, round(cell.seconds, 3), values.get("forwards", 0), values.get("backwards", 0)))
        self.progress.advance(work, name)
        return cell
