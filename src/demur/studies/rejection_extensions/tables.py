"""The tables of this study: queries over records."""

from collections.abc import Sequence

import polars as pl

from demur.evaluation.plan import Outputs
from demur.evaluation.results import Measurement, Table
from demur.evaluation.shares import ATTACKED_BY, FRONT
from demur.evaluation.tables import (
    Case,
    by_attacker,
    figures,
    labelled,
    lookup,
    outcome_table,
    share_of,
)
from demur.studies.rejection_extensions.profile import Profile
from demur.studies.reported import read_texts
from demur.studies.study import Shown

DENSITY = "The weight of the density term"
LINES = {"": "clean", "PGD, sent": "PGD on the network", "PGD": "PGD", "generator": "generator"}
"""Attacks of the table of models, and what its columns call them."""


def show(profile: Profile, cases: Sequence[Case], outputs: Outputs) -> Shown:
    """Make all tables and sentences."""
    texts = read_texts("rejection_extensions")
    records = labelled(outputs, cases)
    models = _models(records)
    density = _density(records)
    values = vars(profile)
    tables = [
        Table("Machines under attack", models, texts["models"].format(**values)),
        Table(DENSITY, density, texts["density"].format(**values)),
        Table("C and gamma that were chosen", _chosen(outputs), texts["chosen"]),
        outcome_table(FRONT, by_attacker(records), note=texts["front"].format(**values)),
    ]
    return Shown(tables, summary=_summary(tables, texts))


def _models(records: pl.DataFrame) -> list[Measurement]:
    """The outcomes of all models, by attack, and the worst of all attacks."""
    whole = by_attacker(records).filter(group=ATTACKED_BY[-1])
    worst = whole.with_columns(line=pl.lit("worst")).drop("group")
    named = records.filter(pl.col("line").is_in(list(LINES)))
    rows = pl.concat([named.select(worst.columns), worst])
    columns = {
        f"{shown}: {outcome}": share_of(outcome, among=pl.col("line") == line)
        for line, shown in {**LINES, "worst": ATTACKED_BY[-1]}.items()
        for outcome in (("correct", "rejected") if line == "" else ("rejected", "wrong"))
    }
    return figures(rows, columns)


def _density(records: pl.DataFrame) -> list[Measurement]:
    """The outcomes against the weight of the density term."""
    weight = pl.col("line").str.extract(r"^density (.*)$")
    rows = records.with_columns(weight=weight).filter(pl.col("weight").is_not_null())
    columns = {outcome: share_of(outcome) for outcome in ("wrong", "rejected")}
    return figures(rows, columns, row="weight", group="model")


def _chosen(outputs: Outputs) -> list[Measurement]:
    """What the grid search chose for each layer."""
    found = outputs.measurements().filter(pl.col("name").str.contains(": (C|gamma)$"))
    rows = []
    for name, value in found.select("name", "value").iter_rows():
        layer, _, column = name.partition(": ")
        rows.append(Measurement(layer, column, measured=value))
    return rows


def _summary(tables: list[Table], texts: dict[str, str]) -> list[str]:
    """Say what came out, one sentence a question."""
    models = lookup(tables[0])[""]
    sentences = []
    for model, rows in lookup(tables[1]).items():
        plain = rows.pop("0")["wrong"]
        weight = max(rows, key=lambda one: rows[one]["wrong"])
        gained = rows[weight]["wrong"] - plain
        sentences.append(
            texts["said of density"].format(model=model, weight=weight, gained=gained, plain=plain)
        )
    for name, row in models.items():
        broken = row[f"{ATTACKED_BY[-1]}: wrong"]
        sentences.append(
            texts["said of a model"].format(
                name=name,
                clean=row["clean: correct"],
                refused=row["clean: rejected"],
                generator=row["generator: wrong"],
                descent=row["PGD: wrong"],
                broken=broken,
            )
        )
    return sentences
