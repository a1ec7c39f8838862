"""The figures of corrupted images as tables: a line for each kind, a column for each severity."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from demur.evaluation.audit_other import CorruptionRow

ORDER: Final = ("wrong", "correct", "rejected")
MEAN: Final = "mean of all kinds"
SEVERITY: Final = (
    "A higher severity need not be harder: the severities of ImageNet-C were set by eye for each "
    "kind, and a model may depend on something else than what a person sees."
)


@dataclass(frozen=True)
class Cell:
    """A share in [0, 1], with its 95 % interval over images where there is one."""

    share: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Line:
    """A kind of corruption: a cell for each severity, None where there is none, and their mean."""

    name: str
    cells: tuple[Cell | None, ...]
    mean: float

    @property
    def shares(self) -> list[float | None]:
        """The share in each cell, and the mean."""
        return [*(None if one is None else one.share for one in self.cells), self.mean]


@dataclass(frozen=True)
class CorruptionTable:
    """The shares of one outcome.

    Parameters
    ----------
    outcome : str
    severities : tuple of int
    lines : tuple of Line
        The kinds in their order; the last line has the means over the kinds.
    n : int
        Images of each cell; the smallest number, if they differ.
    """

    outcome: str
    severities: tuple[int, ...]
    lines: tuple[Line, ...]
    n: int


def corruption_tables(rows: Sequence[CorruptionRow]) -> list[CorruptionTable]:
    """Arrange the rows of results.json: a table for each outcome that occurs, wrong answers first.

    Parameters
    ----------
    rows : sequence of CorruptionRow

    Returns
    -------
    list of CorruptionTable
        Empty without rows.
    """
    return [
        _table(rows, outcome)
        for outcome in ORDER
        if rows and (outcome != "rejected" or any(row.rejected for row in rows))
    ]


def _table(rows: Sequence[CorruptionRow], outcome: str) -> CorruptionTable:
    severities = tuple(sorted({row.severity for row in rows}))
    kinds = list(dict.fromkeys(row.family for row in rows))
    known = {(row.family, row.severity): _cell(row, outcome) for row in rows}
    lines = [
        _line(kind, [known.get((kind, severity)) for severity in severities]) for kind in kinds
    ]
    columns = zip(*(line.cells for line in lines), strict=True)
    lines.append(_line(MEAN, [_mean_of(column) for column in columns]))
    return CorruptionTable(outcome, severities, tuple(lines), min(row.n for row in rows))


def _cell(row: CorruptionRow, outcome: str) -> Cell:
    if outcome == "wrong":
        return Cell(row.wrong, row.wrong_low, row.wrong_high)
    return Cell(getattr(row, outcome))


def _line(name: str, cells: Sequence[Cell | None]) -> Line:
    mean = _mean_of(cells)
    return Line(name, tuple(cells), mean.share)


def _mean_of(cells: Sequence[Cell | None]) -> Cell:
    """Average the shares. Kinds and severities share their images, so there is no interval."""
    shares = [one.share for one in cells if one is not None]
    return Cell(sum(shares) / len(shares))
