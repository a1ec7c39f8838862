"""The tables of the background-class paper, and what they say in words: queries over records."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import polars as pl

from demur.attacks.base import Attack
from demur.data import ImageSet
from demur.data.background import Selection
from demur.evaluation import tables as make
from demur.evaluation.nodes import Measure, Train
from demur.evaluation.on_images import Evaluate
from demur.evaluation.plan import Outputs
from demur.evaluation.records import worst_case
from demur.evaluation.results import Curve, Measurement, Table
from demur.evaluation.shares import FRONT, share
from demur.evaluation.tables import mean_of, share_of
from demur.studies.background_class.material import Material
from demur.studies.background_class.profile import Profile
from demur.studies.reported import beside, read_reported, read_texts
from demur.studies.study import Shown
from demur.threat import ThreatModel

PLAIN, DEFENDED = "Digits", "Digits + background"
NAIVE, FORCING = "naive", "forcing rejection"
AWARE, BY_ENTROPY = "reject-aware, margin", "reject-aware, cross-entropy"
WORST = "reject-aware, worst of both"
TARGETED, NEAREST = "targeted", "reject-aware, any wrong class"
UNAWARE = "targeted, unaware of the background"
LETTERS = "TtUdEPfFXHCnhAKMVWeRrN"
"""The letters that the paper keeps (sec. IV.A)."""
PRINTED = {"FGS": 0.25, "FG": 6.79}
"""The paper's eps."""
CARLINI = "Carlini & Wagner: the smallest changes"
CURVES = ("Outcomes under FGS against eps", "Outcomes against false rejection")

Attackers = dict[str, tuple[Attack | None, ThreatModel | None, str]]
"""Lines of the tables: attack, threat, and what the attacker knows."""
CLEAN: Attackers = {"clean": (None, None, "none")}


@dataclass(frozen=True)
class Cells:
    """What is computed, and the lines of the tables that it gives."""

    profile: Profile
    material: Material
    selection: Selection
    kept: tuple[str, ...]
    lines: dict[Evaluate, str] = field(default_factory=dict)
    strange: list[Measure] = field(default_factory=list)
    sizes: dict[str, int] = field(default_factory=dict)

    def add(self, model: Train, images: ImageSet, lines: Attackers, **options: Any) -> None:
        """Add attacks on a model."""
        for line, (attack, threat, knows) in lines.items():
            self.lines[Evaluate(model, images, threat, attack, attacker=knows, **options)] = line

    @property
    def printed(self) -> bool:
        """Whether the paper measured the same: digits, and its letters."""
        return self.material.keys == tuple("0123456789") and set(self.kept) == set(LETTERS)


def show(cells: Cells, outputs: Outputs) -> Shown:
    """Make Tables III, V, IV and I of the paper, its selection, and what it lacks."""
    records = _lined(outputs, cells.lines)
    found = {
        **_of_test_images(records.filter(split="test"), records.filter(split="Carlini")),
        CARLINI: _carlini(cells, records.filter(split="Carlini"), outputs),
        "Out-of-distribution images rejected": _strange(outputs),
        "The selection of background images": _selection(cells),
        "Trade-off: how many kinds to keep": _trade_off(records.filter(split="trade-off")),
        "Table I: data sizes": _counts(cells),
    }
    texts = read_texts("background_class")
    say = _say(cells, texts)
    eps = {"FGS": cells.profile.fgs_eps, "FG": cells.profile.fg_eps}
    reported = read_reported("background_class") if cells.printed else []
    paper = [one for one in reported if eps.get(one.column) == PRINTED.get(one.column)]
    order = [title for title in texts if title in found]
    ready = {title: beside(Table(title, found[title], say(title)), paper) for title in order}
    return Shown(list(ready.values()), _curves(cells, records, say), _summary(cells, ready, say))


def _lined(outputs: Outputs, lines: dict[Evaluate, str]) -> pl.DataFrame:
    """Give records with their line: the name of an attack and its eps, and the kind of attacker."""
    line = pl.col("line")
    parts = [outputs.records([node]).with_columns(line=pl.lit(lines[node])) for node in lines]
    return pl.concat(parts).with_columns(
        name=line.str.extract(r"^(\w+)"),
        title=line.str.extract("^([^,]*)"),
        label=line.str.extract("^[^,]*, (.*)$"),
    )


def _of_test_images(test: pl.DataFrame, carlini: pl.DataFrame) -> dict[str, list[Measurement]]:
    name, label = pl.col("name"), pl.col("label")
    clean = test.filter(name="clean")
    attacked = test.filter(name != "clean")
    aware = attacked.filter(name.is_in(list(PRINTED)), label.is_in([AWARE, BY_ENTROPY]))
    worst = worst_case(aware, ("model", "name", "title")).with_columns(
        line=pl.col("title") + ", worst of both reject-aware", label=pl.lit(WORST)
    )  # R18
    together = pl.concat([attacked, worst], how="diagonal")
    groups = {NAIVE: NAIVE, TARGETED: NAIVE, WORST: WORST, NEAREST: WORST}
    success = pl.concat([together, carlini], how="diagonal").with_columns(
        group=label.replace_strict(groups, default=None)
    )
    linf = attacked.filter(pl.col("norm") == "linf", label != FORCING, name != "noise")
    answered = pl.col("outcome") != "rejected"
    zero = 100 * pl.col("zero_gradients").sum() / pl.col("backwards").sum().clip(1)
    shares = {outcome: share_of(outcome) for outcome in ("correct", "wrong", "rejected")}
    rates = {
        "coverage": share_of("correct", "wrong"),
        "selective accuracy": share_of("correct", among=answered),
    }
    sizes = {norm: mean_of(pl.col(norm.lower()).mean()) for norm in ("L0", "L2", "Linf")}
    sizes["wrong when stored in 8 bits"] = share_of("wrong", column="stored_outcome")
    sizes["zero gradients"] = mean_of(zero, "%")
    wrong = {one: share_of("wrong", among=name == one) for one in ("FGS", "FG", "Carlini")}
    front = pl.concat([make.by_attacker(clean), make.by_attacker(linf)])
    return {
        "Table III: clean images": make.figures(clean, shares | rates),
        "Table V: attacked images": make.figures(together, shares, group="line"),
        "Table IV: attack success rates": make.figures(
            success.drop_nulls("group"), wrong, group="group"
        ),
        "Size of the perturbations": make.figures(
            attacked.filter(label != FORCING), sizes, group="line"
        ),
        FRONT: make.figures(front, shares, group="group"),
    }


def _carlini(cells: Cells, carlini: pl.DataFrame, outputs: Outputs) -> list[Measurement]:
    # The attacker that is unaware of the background counts successes on the key classes alone.
    own = {node.sent if node.through else node: line for node, line in cells.lines.items()}
    seen = _lined(outputs, {node: line for node, line in own.items() if node.split == "Carlini"})
    found = pl.col("success")
    shares = {"wrong and accepted": share_of("wrong"), "rejected": share_of("rejected")}
    lengths = {
        "median L2": mean_of(pl.col("l2").quantile(0.5, "lower"), among=found),
        "mean L2": mean_of(pl.col("l2").mean(), among=found),
        "gradients an image": mean_of(pl.col("backwards").mean()),
    }
    rows = make.figures(carlini, shares, group="label")
    return rows + make.figures(seen, lengths, group="label")


def _strange(outputs: Outputs) -> list[Measurement]:
    groups = outputs.measurements().group_by("node", "name", maintain_order=True)
    return [
        share(str(node), str(kind), [(round(row["value"] * row["n"]), row["n"]) for row in rows])
        for (node, kind), rows in ((names, part.to_dicts()) for names, part in groups)
    ]


def _selection(cells: Cells) -> list[Measurement]:
    rows = []
    for line in cells.selection.table:
        ours = "kept" if line.name in cells.selection.kept else "dropped"
        theirs = f"; the paper {'keeps' if line.name in LETTERS else 'drops'} it" * cells.printed
        taken = f"; taken for {line.confused_with}" * bool(line.confused_with)
        counts = [(round(line.rate * line.images), line.images)]
        note = ours + theirs + taken
        rows.append(share(line.name, "taken for background", counts, group=ours, note=note))
    return rows


def _trade_off(records: pl.DataFrame) -> list[Measurement]:
    """Give the clean outcomes beside those of each attacker."""
    each = pl.concat(
        records.with_columns(label=pl.col("label").fill_null(one)).filter(label=one)
        for one in (NAIVE, AWARE, BY_ENTROPY)
    ).with_columns(kinds=pl.col("model").str.extract(r"\((.*)\)"))
    columns = {
        f"{name} {outcome}": share_of(outcome, among=pl.col("name") == name)
        for name, first in (("clean", "correct"), ("FGS", "wrong"), ("FG", "wrong"))
        for outcome in (first, "rejected")
    }
    return make.figures(each, columns, row="kinds", group="label")


def _counts(cells: Cells) -> list[Measurement]:
    size = cells.profile.batch_size
    return [
        Measurement(model, column, measured=n, n=n, note=f"{n // size * size:,} in whole batches")
        for model in (PLAIN, DEFENDED)
        for column, n in cells.sizes.items()
        if model == DEFENDED or column != "train background"
    ]


def _curves(cells: Cells, records: pl.DataFrame, say: Callable[..., str]) -> list[Curve]:
    settings = cells.profile.curve
    label = pl.col("label")
    by_eps, by_rate = records.filter(split="eps curve"), records.filter(split="rejection curve")
    fgs = pl.when(label.is_null()).then(pl.lit("clean images")).otherwise("FGS, " + label)
    first = make.outcome_series(by_eps, pl.col("model") + ", " + label, "eps")
    second = make.outcome_series(by_rate, fgs, "model")
    percent = [round(100 * rate, 10) for rate in settings.rejected]
    return [
        Curve(CURVES[0], "eps (Linf)", list(settings.eps), first, say(CURVES[0])),
        Curve(CURVES[1], "other clean images rejected (%)", percent, second, say(CURVES[1])),
    ]


def _summary(cells: Cells, ready: dict[str, Table], say: Callable[..., str]) -> list[str]:
    """Say the main findings in sentences made of the figures."""
    profile = cells.profile
    lines = make.lookup(ready["Table V: attacked images"])
    sentences = [say("toy")] * cells.material.embedded
    sentences.append(say("clean", **make.lookup(ready["Table III: clean images"])[""]))
    for name, eps in (("FGS", profile.fgs_eps), ("FG", profile.fg_eps)):
        own = {line.removeprefix(f"{name} eps {eps:g}, "): lines[line] for line in lines}
        pgd = lines[f"PGD eps {eps:g}, {AWARE}"]
        sentences.append(say("attacked", name=name, eps=eps, pgd=pgd, **own))
    sentences.append(say("Carlini", **make.lookup(ready[CARLINI])[NEAREST]))
    ours, theirs = set(cells.selection.kept), set(LETTERS)
    sets = {"ours": ours, "theirs": theirs, "both": ours & theirs, "more": ours - theirs}
    sets |= {"fewer": theirs - ours, "dropped": set(cells.selection.dropped)}
    names = {name: ", ".join(sorted(one)) or "none" for name, one in sets.items()}
    counts = {name: len(one) for name, one in sets.items()}
    sentences.append(say("letters" if cells.printed else "kinds", n=counts, **names))
    return sentences


def _say(cells: Cells, texts: dict[str, str]) -> Callable[..., str]:
    """Give a function that fills in a text with the numbers of the profile, and with others."""
    profile = cells.profile
    pixels = cells.material.images.images[0].numel()
    repeats = profile.selection.repeats
    values = {
        "profile": profile,
        "pixels": pixels,
        "longest": profile.fgs_eps * pixels**0.5,
        "times": "once" if repeats == 1 else f"{repeats} times",
        "selected": cells.material.for_selection.name,
        "percent": 100 * profile.selection.cutoff,
        "others": cells.sizes["test key images"] - profile.curve.images,
        "made": "synthetic backgrounds, " * bool(profile.made_per_kind),
    }
    return lambda text, /, **more: texts[text].format(**values, **more)
