"""The tables of this study: queries over records."""

from collections.abc import Sequence

import polars as pl

from demur.evaluation.plan import Outputs
from demur.evaluation.records import worst_case
from demur.evaluation.results import Measurement, Table
from demur.evaluation.shares import FRONT
from demur.evaluation.tables import Case, by_attacker, figures, labelled, outcome_table, share_of
from demur.studies.reported import read_texts
from demur.studies.smoothing_extensions.profile import Profile
from demur.studies.study import Shown

TARGETED = "targeted"
COLUMN = pl.col("column")


def show(profile: Profile, cases: Sequence[Case], outputs: Outputs) -> Shown:
    """Make the table of filters and trainings, and a sentence for each filter."""
    texts = read_texts("smoothing_extensions")
    found = labelled(outputs, cases)
    # Targeted changes have no limit: they are no attack within eps.
    within = found.filter(pl.col("split") == "attacked", COLUMN != TARGETED)
    worst = worst_case(within, ["group", "row", "model"])
    worst = worst.with_columns(column=pl.lit("worst"))
    rows = []
    for (group, row), part in found.group_by("group", "row", maintain_order=True):
        at = {"group": str(group), "row": str(row)}
        own = worst.filter(**at)
        columns = {
            "clean accuracy": share_of("correct", among=COLUMN == "clean"),
            "PGD: correct": share_of("correct", among=COLUMN == "PGD"),
        }
        rows += figures(part, columns, row="row", group="group")
        rows.append(_product(part, str(row), str(group)))
        strongest = {"strongest ensemble: correct": share_of("correct")}
        rows += figures(own, strongest, row="row", group="group")
    table = Table("Filters and trainings", rows, texts["table"].format(**vars(profile)))
    front = by_attacker(within)
    tables = [table, outcome_table(FRONT, front, note=texts["front"].format(**vars(profile)))]
    return Shown(tables, summary=_summary(rows, texts))


def _product(part: pl.DataFrame, row: str, group: str) -> Measurement:
    """The paper's score: accuracy times the mean length of changes that reach their target."""
    clean = part.filter(COLUMN == "clean")["outcome"] == "correct"
    lengths = part.filter(COLUMN == TARGETED, pl.col("success"))["l2"]
    name = "accuracy x distance"
    if lengths.is_empty():
        return Measurement(row, name, group, note="no target reached")
    value = int(clean.sum()) / len(clean) * float(lengths.to_torch().mean())
    return Measurement(row, name, group, measured=value, n=len(lengths))


def _summary(rows: list[Measurement], texts: dict[str, str]) -> list[str]:
    """Compare the trainings of each filter."""
    of = {
        (one.row, one.group, one.column): one.measured for one in rows if one.measured is not None
    }
    robust = "strongest ensemble: correct"
    sentences = []
    for filtered in dict.fromkeys(one.row for one in rows):
        shares = {
            group: of[filtered, group, robust] for group in dict.fromkeys(one.group for one in rows)
        }
        sentences.append(
            texts["said"].format(
                filtered=filtered,
                shares="; ".join(f"{group}: {share:.1f} %" for group, share in shares.items()),
            )
        )
    return sentences
