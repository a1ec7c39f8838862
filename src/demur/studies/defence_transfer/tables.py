"""The tables of this study: queries over records."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import polars as pl

from demur.evaluation.plan import Outputs
from demur.evaluation.records import PLACE, worst_case
from demur.evaluation.results import Measurement, Table
from demur.evaluation.shares import FRONT
from demur.evaluation.tables import Case, by_attacker, labelled, lookup, outcome_table
from demur.metrics import clopper_pearson, holm, paired_p_value
from demur.studies.defence_transfer.designs import Pair
from demur.studies.defence_transfer.profile import Profile
from demur.studies.reported import read_texts
from demur.studies.study import Shown

LEVEL = 0.05
MATRIX = "Wrong and accepted: crafted on (row), sent to (column)"
PAIRS = "Pairs, and their halves"


@dataclass(frozen=True)
class Compared:
    """A pair beside its halves, on the same images.

    Parameters
    ----------
    pair : Pair
    wrong : tuple of int
        Images that are wrong and accepted: of the first half, of the second half, of the pair.
    p_value : float
        That the pair is no better than its halves. It is the larger of the p-values of McNemar's
        exact test against each half (one-sided): "better than both" needs both. The choice of the
        better half on the same images then needs no correction (Berger 1982).
    """

    pair: Pair
    wrong: tuple[int, int, int]
    p_value: float

    @property
    def gained(self) -> int:
        """Images of the pair minus images of its better half: below 0, the pair is better."""
        return self.wrong[2] - min(self.wrong[:2])


def show(
    profile: Profile,
    cases: Sequence[Case],
    singles: Sequence[str],
    pairs: Sequence[Pair],
    outputs: Outputs,
) -> Shown:
    """Make all tables, sentences and warnings."""
    texts = read_texts("defence_transfer")
    records = labelled(outputs, cases)
    matrix = transferred(records, singles)
    broken = broken_by_model(records)
    compared = [compare(pair, broken) for pair in pairs]
    adjusted = holm([one.p_value for one in compared])
    values = vars(profile)
    front = outcome_table(FRONT, by_attacker(records), note=texts["front"].format(**values))
    tables = [
        Table(MATRIX, matrix, texts["matrix"].format(**values)),
        Table(PAIRS, _pairs(compared, adjusted, broken, front), texts["pairs"].format(**values)),
        front,
    ]
    return Shown(
        tables,
        summary=[_answer(compared, adjusted, texts), *_largest(matrix, texts)],
        warnings=_masked(records, texts),
    )


def transferred(records: pl.DataFrame, singles: Sequence[str]) -> list[Measurement]:
    """Give the share of wrong and accepted images for each model that they were crafted on, and
    each that they were sent to: the worst of all attacks for each image.

    Parameters
    ----------
    records : polars.DataFrame
        With the column "crafted": the name of a model, or "" for clean images.
    singles : sequence of str
        The models of the matrix.
    """
    chosen = records.filter(pl.col("crafted").is_in(singles), pl.col("model").is_in(singles))
    worst = worst_case(chosen, ["crafted", "model"])
    parts = worst.partition_by("crafted", "model", as_dict=True)
    return [
        _share(row, column, parts[row, column]["outcome"] == "wrong")
        for row in singles
        for column in singles
    ]


def broken_by_model(records: pl.DataFrame) -> dict[str, pl.Series]:
    """Say for each model which images any attack makes wrong and accepted, in one order for all."""
    worst = worst_case(records).sort(PLACE)
    return {
        str(name): part["outcome"] == "wrong"
        for (name,), part in worst.group_by("model", maintain_order=True)
    }


def compare(pair: Pair, broken: Mapping[str, pl.Series]) -> Compared:
    """Compare a pair with its halves; `broken` is as from `broken_by_model`."""
    whole = broken[pair.name]
    halves = [broken[pair.first], broken[pair.second]]
    p_value = max(
        paired_p_value(int((whole & ~half).sum()), int((half & ~whole).sum()), len(whole))
        for half in halves
    )
    first, second = (int(half.sum()) for half in halves)
    return Compared(pair, (first, second, int(whole.sum())), p_value)


def _share(row: str, column: str, found: pl.Series) -> Measurement:
    """A share of images in %, with its Clopper-Pearson interval."""
    count, n = int(found.sum()), len(found)
    low, high = clopper_pearson(count, n)
    measured = round(100 * count / n, 10)
    return Measurement(
        row, column, unit="%", measured=measured, n=n, low=100 * low, high=100 * high
    )


def _pairs(
    compared: Sequence[Compared],
    adjusted: Sequence[float],
    broken: Mapping[str, pl.Series],
    front: Table,
) -> list[Measurement]:
    """The table of pairs."""
    clean = lookup(front)["no attack"]
    rows = []
    for one, p_value in zip(compared, adjusted, strict=True):
        name = one.pair.name
        n = len(broken[name])
        rows += [
            Measurement(name, f"clean: {outcome}", unit="%", measured=clean[name][outcome], n=n)
            for outcome in ("correct", "rejected")
        ]
        parts = {"first half": one.pair.first, "second half": one.pair.second, "pair": name}
        rows += [_share(name, f"wrong: {part}", broken[model]) for part, model in parts.items()]
        points = round(100 * one.gained / n, 10)
        rows.append(Measurement(name, "points from the better half", measured=points, n=n))
        rows.append(Measurement(name, "p (Holm)", measured=p_value, n=n))
    return rows


def _answer(compared: Sequence[Compared], adjusted: Sequence[float], texts: dict[str, str]) -> str:
    """Say whether a pair is better than its better half."""
    fewer = sum(one.gained < 0 for one in compared)
    more = sum(one.gained > 0 for one in compared)
    found = [
        f"{one.pair.name} ({one.wrong[2]} images, {min(one.wrong[:2])} of the better half)"
        for one, p_value in zip(compared, adjusted, strict=True)
        if p_value <= LEVEL
    ]
    kind = "better" if found else "none better"
    return texts[kind].format(
        fewer=fewer, more=more, n=len(compared), count=len(found), names="; ".join(found)
    )


def _largest(matrix: Sequence[Measurement], texts: dict[str, str]) -> list[str]:
    """Say for each model which other model's images break it most, beside its own."""
    sentences = []
    for name in dict.fromkeys(one.column for one in matrix):
        column = {one.row: one.measured or 0.0 for one in matrix if one.column == name}
        own = column.pop(name)
        worst = max(column, key=lambda row: column[row])
        sentences.append(
            texts["largest"].format(name=name, worst=worst, sent=column[worst], own=own)
        )
    return sentences


def _masked(records: pl.DataFrame, texts: dict[str, str]) -> list[str]:
    """Find images that only transferred attacks break: the attacks that know the model miss them
    (R13).
    """
    unaware = pl.col("attacker") == "defence-unaware"
    known = broken_by_model(records.filter(~unaware))
    found = []
    for name, broken in broken_by_model(records).items():
        missed = int((broken & ~known[name]).sum())
        if missed:
            said = texts["masked"].format(missed=missed, n=len(broken))
            found.append(f"{name}: {said}")
    return found
