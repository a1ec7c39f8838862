"""The run of an experiment: its store, its device, its seed, and the cost of each cell."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from demur.attacks import AttackResult
from demur.evaluation import NodeResult, Store
from demur.evaluation.keys import versions
from demur.evaluation.results import CellCost
from demur.evaluation.store import Computed
from demur.hardware import has_fast_bfloat16
from demur.progress import Job

CELLS = 2  # Raise it when a change of the code changes a result: older cells are then recomputed.
BLIND = 0.01
"""The share of zero gradients from which it is worth a warning."""


def blind(cells: Mapping[str, NodeResult]) -> list[str]:
    """Warn of the attacks, by what is said of each, that were without a gradient to follow (R14, R20)."""
    lines = []
    for what, cell in cells.items():
        zero = cell.values.get("zero_gradients", 0)
        backwards = cell.values.get("backwards", 0)
        if zero > BLIND * max(1, backwards):
            lines.append(
                f"{what}: {100 * zero / backwards:.0f} % of the attack's gradients were zero, and what it did not find says little."
            )
    return lines


def passes(result: AttackResult) -> dict[str, int]:
    """Sum the passes of an attack, and its zero gradients, over all images."""
    return {
        "forwards": int(result.forwards.sum()),
        "backwards": int(result.backwards.sum()),
        "zero_gradients": int(result.zero_gradients.sum()),
    }


@dataclass
class Run:
    """One run of an experiment."""

    store: Store
    device: str
    seed: int
    progress: Job
    costs: list[CellCost] = field(default_factory=list)

    def cell(
        self, name: str, config: Mapping[str, Any], compute: Callable[[Path], Computed], work: float
    ) -> NodeResult:
        """Give the cell of that configuration, computed or remembered. `config` must name all that the result depends on.

        `work` is its share of the units that the experiment announced. A compute's values may hold `forwards` and `backwards`.
        """
        self.progress.advance(0, name)
        precision = "bfloat16" if has_fast_bfloat16(torch.device(self.device)) else "float32"
        made_by = {
            "cells": CELLS,
            "versions": versions(),
            "device": self.device,
            "precision": precision,
        }
        cell = self.store.cell({**made_by, **config}, compute)
        values = cell.values
        self.costs.append(
            CellCost(
                name, round(cell.seconds, 3), values.get("forwards", 0), values.get("backwards", 0)
            )
        )
        self.progress.advance(work, name)
        return cell
