"""Tables, curves and sentences of the smoothing study: queries over its records."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import polars as pl

from demur.evaluation.plan import Outputs
from demur.evaluation.records import PLACE, worst_case
from demur.evaluation.results import Curve, Measurement, Table
from demur.evaluation.shares import ATTACKED_BY, FRONT, share, written
from demur.evaluation.tables import (
    Case,
    figures,
    labelled,
    outcome_shares,
    outcome_table,
    series_of,
    share_of,
    share_table,
)
from demur.metrics import paired_bounds, wilson_interval
from demur.studies.reported import beside, read_reported, read_texts
from demur.studies.smoothing.profile import Profile, SetProfile
from demur.studies.study import Shown

NONE = "no filter"
CLEAN, TARGETED, UNAWARE, THROUGH = "clean", "targeted", "defence-unaware", "through the filter"
IDENTITY, BOX, STRONGEST, WORST = "BPDA, identity", "BPDA, box", ATTACKED_BY[-1], "worst of all"
PUBLIC, WHITE = "attacked on the public network", "attacked on the tuned network, whole"
COLUMN = pl.col("column")
CORRECT = pl.col("outcome") == "correct"
TEXTS = read_texts("smoothing")


@dataclass(frozen=True)
class Lines:
    """What is measured: the models of the sets, the networks for ImageNet, and the tuned ones."""

    sets: Sequence[Case]
    photographs: Sequence[Case]
    tuned: Sequence[Case]
    notes: str
    toy: bool


def gaussian(sigma: float) -> str:
    """Name a Gaussian."""
    return f"Gaussian, sigma {sigma:g}"


def show(profile: Profile, measured: Lines, outputs: Outputs) -> Shown:
    """Make the tables, the curves and the sentences."""
    found = labelled(outputs, measured.sets)
    attacked = found.filter(~COLUMN.is_in([CLEAN, TARGETED]))
    # Of the images that the ensemble attacks.
    few = attacked.filter(column=STRONGEST)
    few = attacked.join(few, on=["group", "row", *PLACE], how="semi")
    worst = worst_case(few, ["group", "row", "model"]).with_columns(column=pl.lit(WORST))
    found = pl.concat([found, worst], how="diagonal")
    scores = _scores(found)
    summary = [TEXTS["toy"]] if measured.toy else []
    summary += [line for one in profile.sets for line in _summary(one, found, scores)]
    tables = [_ranked(profile, found, scores), _attackers(profile, attacked, worst)]
    if measured.photographs:
        pictures = labelled(outputs, measured.photographs)
        more, said = _photographs(profile, measured.notes, pictures, outputs.measurements())
        tables += more
        summary.append(said)
    if measured.tuned:
        table, sentences = _tuned(profile, labelled(outputs, measured.tuned))
        tables.append(table)
        summary += sentences
    tables.append(_front(profile, found))
    curves = [_curve(one, found) for one in profile.sets if one.gaussian]
    return Shown(tables, curves, summary, _warnings(found))


def _scores(found: pl.DataFrame) -> pl.DataFrame:
    """Give the paper's score of each filter, accuracy times distance, and its robust accuracy."""
    correct = CORRECT.cast(pl.Float64)
    reached = (COLUMN == TARGETED) & pl.col("success")
    scores = found.group_by("group", "row", maintain_order=True).agg(
        product=correct.filter(COLUMN == CLEAN).mean() * pl.col("l2").filter(reached).mean(),
        robust=100 * correct.filter(COLUMN == WORST).mean(),
        reached=reached.sum(),
    )
    ranks = pl.col("product", "robust").rank("min", descending=True).over("group")
    return scores.with_columns(ranks.name.prefix("rank_"))


def _ranked(profile: Profile, found: pl.DataFrame, scores: pl.DataFrame) -> Table:
    rows = []
    right = share_of("correct")
    places = {"row": "row", "group": "group"}
    for group, row, product, _, reached, first, second in scores.iter_rows():
        own = found.filter(group=group, row=row)
        targeted = own.filter(column=TARGETED)
        note = "" if reached else "no target reached"
        rows += [
            *figures(own.filter(column=CLEAN), {"clean accuracy": right}, **places),
            _flagged(row, "target reached", targeted["success"], group),
            _mean(row, "mean L2", targeted.filter("success")["l2"], group),
            _mean(row, "steps", targeted["backwards"], group),
            Measurement(row, "accuracy x distance", group, measured=product, n=reached, note=note),
            Measurement(row, "rank by the product", group, measured=first, note=note),
            *figures(own.filter(column=WORST), {"robust accuracy": right}, **places),
            Measurement(row, "rank by robust accuracy", group, measured=second),
        ]
    size = {**profile.attack.model_dump(), "strongest": profile.strongest.images}
    note = TEXTS["ranked"].format(eps=_eps(profile), **size)
    table = Table("Filters, ranked by the paper's product and by robust accuracy", rows, note)
    return beside(table, read_reported("smoothing"))


def _attackers(profile: Profile, attacked: pl.DataFrame, worst: pl.DataFrame) -> Table:
    unfiltered = (COLUMN == UNAWARE) & (pl.col("row") == NONE)
    both = pl.concat([attacked.filter(~unfiltered), worst], how="diagonal")
    note = TEXTS["attackers"].format(steps=profile.attack.steps)
    title = "Wrong answers under each attacker"
    return share_table(title, both, row="row", outcome="wrong", note=note)


def _front(profile: Profile, found: pl.DataFrame) -> Table:
    attackers = zip((CLEAN, UNAWARE, THROUGH, WORST), ATTACKED_BY, strict=True)
    parts = [found.filter(column=one).with_columns(group=pl.lit(name)) for one, name in attackers]
    return outcome_table(FRONT, pl.concat(parts), note=TEXTS["front"].format(eps=_eps(profile)))


def _photographs(
    profile: Profile, notes: str, found: pl.DataFrame, facts: pl.DataFrame
) -> tuple[list[Table], str]:
    assert profile.photographs is not None
    sent = found.filter(column=TARGETED)
    given = sent["row"].unique(maintain_order=True).to_list()
    # Distances compare on the photographs that reached the target on all networks.
    common = sent.filter(pl.col("success").all().over("index"))
    length = {name: common.filter(row=name)["l2"] for name in given}
    names = sorted(given, key=lambda name: -float(length[name].sum()))
    hard, transfer = [], []
    for name in names:
        own = sent.filter(row=name)
        stored = found.filter(row=name, column=name)["success"]
        median = float(own["backwards"].quantile(0.5, "lower") or 0)
        for fact, value, n in facts.filter(node=name).select("name", "value", "n").rows():
            hard.append(Measurement(name, fact, measured=value, n=n))
        hard += [
            _flagged(name, "target reached", own["success"]),
            _flagged(name, "target reached, 8 bits", stored),
            Measurement(name, "median steps", measured=median, n=len(own)),
            _mean(name, "mean L2", length[name]),
        ]
        for other in given:
            shown = found.filter(row=name, column=other)
            known = found.filter(CORRECT, row=other, column=CLEAN)
            wrong = shown.join(known, on="index", how="semi")["outcome"] == "wrong"
            figure = _flagged(name, other, wrong)
            if other == name:
                transfer.append(replace(figure, note="itself"))
            else:
                target = f"{other}: target"
                transfer += [figure, _flagged(name, target, shown["success"])]
    size = {**profile.photographs.model_dump(), "images": sent["index"].n_unique()}
    note = TEXTS["hardest"].format(notes=notes, **size).strip()
    layers = {name: facts.filter(node=name, name="layers")["value"].item() for name in names}
    tables = [
        Table("Photographs: which network is hardest (section 2.2)", hard, note),
        Table("Photographs: transfer from network to network", transfer, TEXTS["transfer"]),
    ]
    return tables, _depth(names, length, layers)


def _depth(names: list[str], length: dict[str, pl.Series], layers: dict[str, float]) -> str:
    """Judge whether depth helps, by the interval of the deepest network's lead over the others."""
    hardest, deepest = names[0], max(names, key=lambda name: layers[name])
    if length[hardest].is_empty():
        return TEXTS["none reached"]
    far, deep = (float(length[name].to_numpy().mean()) for name in (hardest, deepest))
    rival = hardest if hardest != deepest else names[min(1, len(names) - 1)]
    low, high = _interval(length[deepest] - length[rival])
    verdict = "agrees" if low > 0 else "does not agree" if high < 0 else "does not clearly agree"
    return TEXTS["depth"].format(hardest, far, deepest, deep, verdict)


def _tuned(profile: Profile, found: pl.DataFrame) -> tuple[Table, list[str]]:
    assert profile.tuning is not None
    rows = share_table("", found, row="row").rows
    by = {(one.group, one.row, one.column): one.measured for one in rows}
    said = [
        TEXTS["tuning"].format(*line, *(by[*line, column] for column in (CLEAN, PUBLIC, WHITE)))
        for line in dict.fromkeys((layers, name) for layers, name, _ in by)
    ]
    settings = profile.tuning.model_dump()
    note = TEXTS["tuned"].format(within=written(profile.tuning.eps), **settings)
    return Table("Transfer learning behind the filter", rows, note), said


def _curve(one: SetProfile, found: pl.DataFrame) -> Curve:
    """Draw the outcomes against the Gaussian's width."""
    own = found.filter(group=one.name)
    names = [NONE, *map(gaussian, one.gaussian)]
    drawn = {CLEAN: CLEAN, WORST: "the worst of all attackers", UNAWARE: UNAWARE}
    outcomes = [
        series_of(title, [own.filter(row=name, column=column) for name in names])
        for column, title in drawn.items()
    ]
    title = f"{one.name}: outcomes against the Gaussian's width"
    note = f"eps {written(one.eps)} in Linf. A sigma of 0 is no filter."
    return Curve(title, "sigma (pixels)", [0.0, *one.gaussian], outcomes, note)


def _summary(one: SetProfile, found: pl.DataFrame, scores: pl.DataFrame) -> list[str]:
    rows: list[dict[str, Any]] = scores.filter(group=one.name).fill_null(0.0).rows(named=True)
    plain, *smooth = rows
    own = found.filter(group=one.name)
    best = max(smooth, key=lambda row: row["robust"])
    unaware = own.filter(pl.col("row") != NONE, column=UNAWARE)
    said = {
        "name": one.name,
        "eps": written(one.eps),
        "plain": plain,
        "best": best,
        "product": max(rows, key=lambda row: row["product"]),
        "robust": max(rows, key=lambda row: row["robust"]),
        "unaware": 100 * outcome_shares(unaware)["correct"].value,
        "worst": sum(row["robust"] for row in smooth) / len(smooth),
        "verdict": _verdict(own, best["row"], len(smooth)),
    }
    return [TEXTS["product"].format(**said), TEXTS["kept"].format(**said)]


def _verdict(found: pl.DataFrame, best: str, filters: int) -> str:
    """Judge the best of some filters against none, by intervals over the same images."""
    worst = found.filter(column=WORST)
    sides = worst.filter(row=best).join(worst.filter(row=NONE), on=list(PLACE), suffix="_none")
    kept, unfiltered = sides["outcome"] == "correct", sides["outcome_none"] == "correct"
    gained, lost = int((kept & ~unfiltered).sum()), int((unfiltered & ~kept).sum())
    # The best of several is compared: the level is divided by their number (Bonferroni).
    low, _ = paired_bounds(gained, lost, len(sides), 1 - 0.05 / filters)
    if low <= 0:
        return TEXTS["no defence"]
    _, high = wilson_interval(int(kept.sum()), len(sides))
    return TEXTS["harder" if high < 0.5 else "helps"]


def _warnings(found: pl.DataFrame) -> list[str]:
    """Warn where another gradient breaks more images than the exact one (R24)."""
    said = []
    wrong = found.filter(pl.col("outcome") == "wrong")
    for (model,), own in wrong.group_by("model", maintain_order=True):
        exact, *others = (set(own.filter(column=one)["index"]) for one in (THROUGH, IDENTITY, BOX))
        for other, broken in zip((IDENTITY, BOX), others, strict=True):
            if len(broken) > len(exact):
                counts = {"exact": len(exact), "theirs": len(broken), "alone": len(broken - exact)}
                said.append(TEXTS["stand-in"].format(model=model, other=other, **counts))
    return said


def _eps(profile: Profile) -> str:
    return ", ".join(f"{written(one.eps)} on {one.name}" for one in profile.sets)


def _flagged(row: str, column: str, flags: pl.Series, group: str = "") -> Measurement:
    """Give the share of the flags that are set, in %, with its 95 % interval."""
    return share(row, column, [(int(flags.sum()), len(flags))], group=group)


def _mean(row: str, column: str, values: pl.Series, group: str = "") -> Measurement:
    """Give a mean over images, with its 95 % interval where there are two images."""
    if values.is_empty():
        return Measurement(row, column, group, n=0, note="none")
    found = Measurement(row, column, group, measured=float(values.to_numpy().mean()), n=len(values))
    low, high = _interval(values)
    return found if math.isinf(low) else replace(found, low=low, high=high)


def _interval(values: pl.Series) -> tuple[float, float]:
    """Give the normal 95 % interval of a mean; without two values it is unbounded."""
    if len(values) < 2:
        return -math.inf, math.inf
    middle = float(values.to_numpy().mean())
    reach = 1.96 * float(values.to_numpy().std(ddof=1)) / math.sqrt(len(values))
    return middle - reach, middle + reach
