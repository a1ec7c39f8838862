"""A study: nodes to compute, and what is shown of them."""

from collections.abc import Callable
from dataclasses import dataclass

import polars as pl

from demur.evaluation.nodes import Node
from demur.evaluation.on_images import Evaluate
from demur.evaluation.results import Data
from demur.evaluation.tables import TableSpec


@dataclass(frozen=True)
class Study:
    """A plan with its tables and pictures.

    Parameters
    ----------
    nodes : tuple of Node
        What is computed.
    tables : tuple of TableSpec
    gallery : tuple of Evaluate
        Nodes whose images are shown.
    pictures : int
        Largest number of pictures.
    data : Data
        The images that were used.
    taken : str
        A sentence on the data, for the user.
    summary : callable
        Makes sentences from the records.
    """

    nodes: tuple[Node, ...]
    tables: tuple[TableSpec, ...]
    gallery: tuple[Evaluate, ...]
    pictures: int
    data: Data
    taken: str
    summary: Callable[[pl.DataFrame], list[str]]
