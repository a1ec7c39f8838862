"""Measured costs of nodes, from which the time left is estimated."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Final

from demur.evaluation.nodes import Node
from demur.files import digest

UNKNOWN: Final = 0.01
"""Seconds for each image of a node of which nothing is known."""


class Costs:
    """Seconds for each image, by kind of node. The file `costs.jsonl` of a store grows by a line
    for each computed task.

    Examples
    --------
    >>> Costs(Path("does-not-exist")).known
    {}
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / "costs.jsonl"
        self.known: dict[str, float] = {}
        try:
            lines = self._path.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            lines = []
        for line in lines:
            try:
                kind, seconds = json.loads(line)
                self.known[str(kind)] = float(seconds)
            except (ValueError, TypeError):
                continue  # a line that was cut short costs an estimate, and no result

    def estimate(
        self, node: Node, images: int, expected: Callable[[Node], float] | None = None
    ) -> float:
        """Estimate the seconds for some images of a node, from an earlier node of its kind, or from
        what is `expected` for one image.
        """
        each = self.known.get(_kind(node))
        if each is None:
            each = UNKNOWN if expected is None else expected(node)
        return images * each

    def add(self, node: Node, images: int, seconds: float) -> None:
        """Remember what a task cost."""
        each = seconds / max(1, images)
        self.known[_kind(node)] = each
        line = json.dumps([_kind(node), each]) + "\n"
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(line)
        except OSError:
            return  # the estimates of later runs are worth no error


def _kind(node: Node) -> str:
    return digest(node.kind_of_cost())[:16]
