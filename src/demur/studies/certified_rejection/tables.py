"""The tables of this study: queries over records."""

from collections.abc import Sequence
from dataclasses import replace

import polars as pl
import torch

from demur.evaluation.plan import Outputs
from demur.evaluation.records import OUTCOMES, worst_case
from demur.evaluation.results import Measurement, Table
from demur.evaluation.shares import FRONT, share
from demur.evaluation.tables import by_attacker, outcome_table
from demur.metrics.rejection import implied_robust_accuracy
from demur.studies.certified_rejection.profile import Profile
from demur.studies.reported import Reported, beside, read_reported, read_texts
from demur.studies.study import Shown

TABLE = "Proven and not broken at Linf {}"
MATCHED = "At equal rejection of clean images, Linf {}"
SMOOTHED = "Proven and not broken at L2 {}"
FAMILIES = (
    "adversarial training, confidence threshold",
    "certified consistency",
    "CPR (unproven check)",
    "learned reject column",
)
"""Models that there are at each rate of false rejections."""
IMAGE = ["model", "image", "eps"]


def at_rate(family: str, rate: float) -> str:
    """Name a model at a rate of false rejections."""
    return f"{family} at {100 * rate:g} % false rejection"


def show(profile: Profile, outputs: Outputs) -> Shown:
    """Make all tables and sentences."""
    texts = read_texts("certified_rejection")
    given = {**vars(profile), "methods": ", ".join(profile.certified.methods)}
    for name in ("proven", *(["smoothed"] if profile.smoothing else []), "matched", "delta"):
        texts[name] = texts[name].format(**given)
    records = outputs.records()
    wide = records.filter(pl.col("norm") == "l2")
    records = records.filter(pl.col("norm").is_null() | (pl.col("norm") != "l2"))
    mnist = records["dataset"].first() == "mnist"
    reported = read_reported("certified_rejection") if mnist else []
    linf = [_at_eps(profile, records, eps, texts, reported) for eps in profile.attack.eps]
    tables = [table for pair in linf for table in pair]
    tables += _smoothed(profile, wide, texts, reported)
    deltas = outputs.measurements().filter(pl.col("name") == "delta")
    found = [
        Measurement(str(node), "delta", measured=value)
        for node, value in deltas.select("node", "value").iter_rows()
    ]
    tables.append(Table("Delta at each rate of false rejections", found, texts["delta"]))
    front = by_attacker(records.filter(pl.col("split") == "attacked"))
    tables.append(outcome_table(FRONT, front, note=texts["front"]))
    summary, warnings = _summary(tables, records, wide, texts)
    return Shown(tables, summary=summary, warnings=warnings)


def _at_eps(
    profile: Profile,
    records: pl.DataFrame,
    eps: float,
    texts: dict[str, str],
    reported: Sequence[Reported],
) -> tuple[Table, Table]:
    """Make the tables of an eps: all models, and those at equal rejection of clean images."""
    matched = {
        at_rate(family, rate): (family, f"{100 * rate:g} % of the correct clean images rejected")
        for rate in profile.rates
        for family in FAMILIES
    }
    apart = pl.col("model").is_in(list(matched))
    rows = _rows(records.filter(~apart), eps, profile.denial)
    equal = []
    for row in _rows(records.filter(apart), eps, profile.denial):
        family, group = matched[row.row]
        equal.append(replace(row, row=family, group=group))
    equal.sort(key=lambda row: list(matched.values()).index((row.row, row.group)))
    table = Table(TABLE.format(f"{eps:g}"), rows, texts["proven"])
    return (
        beside(table, reported, missing=True),
        Table(MATCHED.format(f"{eps:g}"), equal, texts["matched"]),
    )


def _rows(records: pl.DataFrame, eps: float, denial: float) -> list[Measurement]:
    """A line for each model: clean images, what is proven, and what no attack broke."""
    unattacked = records.filter(pl.col("attacker") == "none", pl.col("certified").is_null())
    clean = unattacked.filter(pl.col("split") == "test")
    proven = records.filter(pl.col("certified").is_not_null())
    forced = proven.filter(pl.col("goal") == "ForceReject()")
    proven = _at(proven.filter(pl.col("goal") == "evade"), eps)
    attacked = _at(records.filter(pl.col("attacker") == "strongest"), eps)
    rows = []
    for (name,), part in clean.group_by("model", maintain_order=True):
        model = str(name)
        rows += _clean(model, part)
        own = proven.filter(model=model)
        figure = _certified(model, "proven", own)
        rows.append(figure if len(own) else replace(figure, note="nothing is proven"))
        tried = attacked.filter(model=model)
        rows.append(_held(model, tried))
        if part["reject_margin"].null_count() == len(part):
            continue
        before = unattacked.filter(pl.col("split") == "attacked", pl.col("model") == model)
        rows.append(_implied(model, eps, before, tried))
        if len(own := forced.filter(model=model)):
            rows.append(_certified(model, f"never rejected within {denial:g}", own))
    return rows


def _clean(model: str, records: pl.DataFrame) -> list[Measurement]:
    counts = [int((records["outcome"] == outcome).sum()) for outcome in OUTCOMES]
    return [
        share(model, f"clean: {outcome}", [(count, len(records))])
        for outcome, count in zip(OUTCOMES, counts, strict=True)
    ]


def _certified(model: str, column: str, records: pl.DataFrame) -> Measurement:
    return share(model, column, [(int(records["certified"].sum()), len(records))])


def _held(model: str, attacked: pl.DataFrame) -> Measurement:
    return share(
        model, "not broken", [(int((attacked["outcome"] != "wrong").sum()), len(attacked))]
    )


def _implied(model: str, eps: float, clean: pl.DataFrame, attacked: pl.DataFrame) -> Measurement:
    """The robust accuracy that rejection implies at eps / 2 (Tramer 2022)."""
    both = attacked.select("image", "outcome").join(
        clean.select("image", "outcome"), on="image", suffix="_clean"
    )
    outcomes = torch.tensor(both["outcome_clean"].to_physical().to_list(), dtype=torch.int64)
    broken = torch.tensor((both["outcome"] == "wrong").to_list(), dtype=torch.bool)
    count = 0
    if len(both):
        count = round(len(both) * implied_robust_accuracy(outcomes, broken))
    return share(model, f"implied accuracy at {eps / 2:g}", [(count, len(both))])


def _smoothed(
    profile: Profile, records: pl.DataFrame, texts: dict[str, str], reported: Sequence[Reported]
) -> list[Table]:
    """Make the tables in L2: one for each eps."""
    tables = []
    cases = profile.smoothing.cases if profile.smoothing else ()
    for eps in dict.fromkeys(case.eps for case in cases):
        rows = []
        for case in cases:
            if case.eps != eps:
                continue
            own = _at(records.filter(model=case.name), eps)
            proven = own.filter(pl.col("certified").is_not_null())
            tried = worst_case(own.filter(pl.col("attack").is_not_null()))
            rows += [*_clean(case.name, proven), _certified(case.name, "proven", proven)]
            rows += [_held(case.name, tried), _implied(case.name, eps, proven, tried)]
        table = Table(SMOOTHED.format(f"{eps:g}"), rows, texts["smoothed"])
        tables.append(beside(table, reported, missing=True))
    return tables


def _at(records: pl.DataFrame, eps: float) -> pl.DataFrame:
    return records.filter((pl.col("eps") - eps).abs() < 1e-9)


def contradictions(attacked: pl.DataFrame, proven: pl.DataFrame) -> tuple[int, int]:
    """Count images that are certified and broken at the same eps, and all that were compared."""
    both = attacked.select([*IMAGE, "outcome"]).join(
        proven.select([*IMAGE, "certified"]), on=IMAGE, how="inner"
    )
    broken = both.filter(pl.col("certified") & (pl.col("outcome") == "wrong"))
    return len(broken), len(both)


def _summary(
    tables: Sequence[Table], records: pl.DataFrame, wide: pl.DataFrame, texts: dict[str, str]
) -> tuple[list[str], list[str]]:
    """Say what came out, and whether a bound is wrong."""
    sentences = []
    for table in tables:
        of: dict[tuple[str, str], dict[str, float]] = {}
        for row in table.rows:
            if row.measured is not None:
                of.setdefault((row.group, row.row), {})[row.column] = row.measured
        for (group, name), values in of.items():
            if "clean: wrong" in values and name.startswith(("certified consistency", "smoothing")):
                sentences.append(
                    texts["said of a model"].format(
                        title=table.title.rpartition("at ")[2].rpartition(", ")[2],
                        name=f"{name}, {group}" if group else name,
                        proven=values["proven"],
                        held=values["not broken"],
                        lost=values["clean: rejected"] + values["clean: wrong"],
                    )
                )
    proven = records.filter(pl.col("certified").is_not_null(), pl.col("goal") == "evade")
    attacked = records.filter(pl.col("attacker") == "strongest")
    wrong, compared = contradictions(attacked, proven)
    drawn = contradictions(
        wide.filter(pl.col("attack").is_not_null()), wide.filter(pl.col("certified").is_not_null())
    )
    said = [texts["said of draws"].format(wrong=drawn[0], compared=drawn[1])] if len(wide) else []
    if wrong:
        warning = texts["said of a contradiction"].format(wrong=wrong, compared=compared)
        return [*sentences, *said], [warning]
    return [*sentences, texts["said of soundness"].format(compared=compared), *said], []
