"""The tables of this study: queries over records."""

from dataclasses import replace

import polars as pl

from demur.evaluation.plan import Outputs
from demur.evaluation.results import Measurement, Table
from demur.evaluation.shares import FRONT, share
from demur.evaluation.tables import by_attacker, outcome_table
from demur.studies.certified_rejection.profile import Profile
from demur.studies.reported import beside, read_reported, read_texts
from demur.studies.study import Shown

TABLE = "Proven and not broken at Linf {}"
IMAGE = ["model", "image", "eps"]


def show(profile: Profile, outputs: Outputs) -> Shown:
    """Make all tables and sentences."""
    texts = {
        name: text if name.startswith("said") else text.format(**vars(profile))
        for name, text in read_texts("certified_rejection").items()
    }
    records = outputs.records()
    clean = records.filter(split="test", attacker="none").filter(pl.col("certified").is_null())
    attacked = records.filter(pl.col("attacker") == "strongest")
    proven = records.filter(pl.col("certified").is_not_null())
    reported = read_reported("certified_rejection")
    mnist = clean["dataset"].first() == "mnist"
    tables = []
    for eps in profile.attack.eps:
        rows = _rows(clean, _at(attacked, eps), _at(proven, eps))
        table = Table(TABLE.format(f"{eps:g}"), rows, texts["proven"])
        tables.append(beside(table, reported, missing=True) if mnist else table)
    deltas = outputs.measurements().filter(pl.col("name") == "delta")
    found = [
        Measurement(str(node), "delta", measured=value)
        for node, value in deltas.select("node", "value").iter_rows()
    ]
    tables.append(Table("Delta at each rate of false rejections", found, texts["delta"]))
    front = by_attacker(records.filter(pl.col("split") == "attacked"))
    tables.append(outcome_table(FRONT, front, note=texts["front"]))
    summary, warnings = _summary(tables, attacked, proven, texts)
    return Shown(tables, summary=summary, warnings=warnings)


def _at(records: pl.DataFrame, eps: float) -> pl.DataFrame:
    return records.filter((pl.col("eps") - eps).abs() < 1e-9)


def _rows(clean: pl.DataFrame, attacked: pl.DataFrame, proven: pl.DataFrame) -> list[Measurement]:
    """A line for each model: clean images, what is proven, and what no attack broke."""
    rows = []
    for (name,), part in clean.group_by("model", maintain_order=True):
        model = str(name)
        for outcome in ("correct", "rejected", "wrong"):
            found = int((part["outcome"] == outcome).sum())
            rows.append(share(model, f"clean: {outcome}", [(found, len(part))]))
        own = proven.filter(model=model)
        figure = share(model, "proven", [(int(own["certified"].sum()), len(own))])
        rows.append(figure if len(own) else replace(figure, note="nothing is proven"))
        tried = attacked.filter(model=model)
        held = int((tried["outcome"] != "wrong").sum())
        rows.append(share(model, "not broken", [(held, len(tried))]))
    return rows


def contradictions(attacked: pl.DataFrame, proven: pl.DataFrame) -> tuple[int, int]:
    """Count images that are certified and broken at the same eps, and all that were compared."""
    both = attacked.select([*IMAGE, "outcome"]).join(
        proven.select([*IMAGE, "certified"]), on=IMAGE, how="inner"
    )
    broken = both.filter(pl.col("certified") & (pl.col("outcome") == "wrong"))
    return len(broken), len(both)


def _summary(
    tables: list[Table],
    attacked: pl.DataFrame,
    proven: pl.DataFrame,
    texts: dict[str, str],
) -> tuple[list[str], list[str]]:
    """Say what came out, and whether a bound is wrong."""
    sentences = []
    for table in tables[: len(attacked["eps"].unique())]:
        of: dict[str, dict[str, float]] = {}
        for row in table.rows:
            if row.measured is not None:
                of.setdefault(row.row, {})[row.column] = row.measured
        for name in of:
            if name.startswith("certified consistency"):
                values = of[name]
                sentences.append(
                    texts["said of a model"].format(
                        title=table.title.partition("at ")[2],
                        name=name,
                        proven=values["proven"],
                        held=values["not broken"],
                        lost=values["clean: rejected"] + values["clean: wrong"],
                    )
                )
    wrong, compared = contradictions(attacked, proven)
    if wrong:
        said = texts["said of a contradiction"].format(wrong=wrong, compared=compared)
        return sentences, [said]
    return [*sentences, texts["said of soundness"].format(compared=compared)], []
