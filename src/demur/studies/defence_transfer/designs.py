"""Defences as parts that fit into one model, and which pairs of them do."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Final, Literal

Machines = Literal["single", "deep"]


@dataclass(frozen=True)
class Design:
    """What a model is made of, from the images inwards.

    Parameters
    ----------
    median, gaussian : bool, default False
        Filters before the network.
    attacked : {"", "everywhere", "around"}, default ""
        Where the training images are attacked: around is outside a centred box.
    background : bool, default False
        Whether backgrounds are a further class of the network, which rejects.
    machines : tuple of {"single", "deep"}, default ()
        Neural rejections on the layers of the network: on one, or on several.
    """

    median: bool = False
    gaussian: bool = False
    attacked: Literal["", "everywhere", "around"] = ""
    background: bool = False
    machines: tuple[Machines, ...] = ()

    @property
    def network(self) -> "Design":
        """The design without machines."""
        return replace(self, machines=())

    def nested(self, other: "Design") -> "Design | None":
        """Give the design that has the parts of both, or None where both train on attacked images:
        a training has one region that is attacked.

        Examples
        --------
        >>> Design(gaussian=True).nested(Design(background=True))
        Design(median=False, gaussian=True, attacked='', background=True, machines=())
        """
        if self.attacked and other.attacked:
            return None
        return Design(
            self.median or other.median,
            self.gaussian or other.gaussian,
            self.attacked or other.attacked,
            self.background or other.background,
            (*self.machines, *other.machines),
        )


PLAIN: Final = "no defence"
BASELINE: Final = "confidence threshold"

DEFENCES: Final[Mapping[str, Design]] = {
    "median blur": Design(median=True),
    "Gaussian blur": Design(gaussian=True),
    "adversarial training": Design(attacked="everywhere"),
    "localized adversarial training": Design(attacked="around"),
    "background class": Design(background=True),
    "deep neural rejection": Design(machines=("deep",)),
    "neural rejection": Design(machines=("single",)),
}
"""The defences of the four papers, and adversarial training; the outermost first."""


@dataclass(frozen=True)
class Pair:
    """Two defences in one model.

    Parameters
    ----------
    first, second : str
        Names of `DEFENCES`.
    design : Design
    """

    first: str
    second: str
    design: Design

    @property
    def name(self) -> str:
        """What tables call it."""
        return f"{self.first} + {self.second}"


def pairs_of(names: Iterable[str]) -> list[Pair]:
    """Give all pairs of these defences that fit into one model, in the order of `DEFENCES`.

    Examples
    --------
    >>> [one.name for one in pairs_of(["background class", "Gaussian blur"])]
    ['Gaussian blur + background class']
    """
    chosen = set(names)
    found = []
    for first, second in combinations([name for name in DEFENCES if name in chosen], 2):
        design = DEFENCES[first].nested(DEFENCES[second])
        if design is not None:
            found.append(Pair(first, second, design))
    return found
