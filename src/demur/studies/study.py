"""A study: nodes to compute, and what is shown of them."""

from collections.abc import Callable
from dataclasses import dataclass, field

from demur.evaluation.nodes import Node
from demur.evaluation.on_images import Evaluate
from demur.evaluation.plan import Outputs
from demur.evaluation.results import Curve, Data, Table


@dataclass(frozen=True)
class Shown:
    """What a report shows.

    Parameters
    ----------
    tables : list of Table
    curves : list of Curve
    summary : list of str
        Sentences for the user.
    warnings : list of str
        Beside those that `demur.evaluation.checks` finds in the records.
    """

    tables: list[Table]
    curves: list[Curve] = field(default_factory=list)
    summary: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Study:
    """A plan with its tables and pictures.

    Parameters
    ----------
    nodes : tuple of Node
        What is computed.
    data : Data
        The images that were used.
    taken : str
        A sentence on the data, for the user.
    show : callable
        Makes tables, curves and sentences from the results of `nodes`.
    gallery : tuple of Evaluate
        Nodes whose images are shown.
    pictures : int
        Largest number of pictures.
    then : callable, optional
        Makes the study itself from the results of `nodes`, where what is computed depends on them:
        a selection, a calibration. Without it, the study is complete.
    """

    nodes: tuple[Node, ...]
    data: Data
    taken: str
    show: Callable[[Outputs], Shown]
    gallery: tuple[Evaluate, ...] = ()
    pictures: int = 0
    then: "Callable[[Outputs], Study] | None" = None
