"""Tables, curves and sentences of localized training, with the paper's figures beside."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import polars as pl

from demur.evaluation import tables
from demur.evaluation.nodes import Measure, Node
from demur.evaluation.plan import Outputs
from demur.evaluation.records import ATTACKERS, PLACE, worst_case
from demur.evaluation.results import Curve, Measurement, Table
from demur.evaluation.shares import ATTACKED_BY, FRONT, written
from demur.networks import CLASSES
from demur.studies.album import ALL, AVERAGE, Album
from demur.studies.localized_training.profile import AttackedPhotographs, Profile, SetProfile
from demur.studies.localized_training.recipes import AROUND, EVERYWHERE, MODELS, RANDOM
from demur.studies.material import Part
from demur.studies.reported import Reported, beside, read_reported, read_texts
from demur.studies.study import Shown

ACCURACIES = "Accuracy of each model, attacked in each region"
TEXTS = read_texts("localized_training")
NONE, _, AWARE, STRONGEST = ATTACKERS
SPOKEN = {AROUND: "around the box", EVERYWHERE: EVERYWHERE}
STANDARD, BACKGROUND = (f"{model} against {MODELS[0]}" for model in MODELS[1:])


@dataclass(frozen=True)
class Nodes:
    """What is computed: evaluations with their labels, and measurements with their places."""

    profile: Profile
    parts: Sequence[Part[SetProfile]]
    tries: Sequence[tables.Case]
    album: Album | None
    cases: list[tables.Case] = field(default_factory=list)
    boxes: dict[str, int] = field(default_factory=dict)
    losses: dict[str, Measure] = field(default_factory=dict)
    answers: dict[tuple[str, float, str], Measure] = field(default_factory=dict)

    @property
    def all(self) -> tuple[Node, ...]:
        """All nodes."""
        evaluated = (case.node for case in (*self.tries, *self.cases))
        return (*evaluated, *self.losses.values(), *self.answers.values())


def reported(part: Part[SetProfile]) -> list[Reported]:
    """The paper's figures of a set, if the profile names one and its first data set is there."""
    settings = part.settings
    known = settings.paper if part.train.name == settings.data[0] else ""
    figures = (one for one in read_reported("localized_training") if one.group == known)
    return [replace(one, group=settings.name) for one in figures]


def choose(part: Part[SetProfile], tries: Sequence[tables.Case], outputs: Outputs) -> int:
    """Choose the box on which the attack leaves the part of clean accuracy nearest to the paper's
    (sec. 1.1), or else the middle one.
    """
    sides = part.settings.boxes
    paper = {one.column: one.value for one in reported(part) if one.table == ACCURACIES}
    if not paper:
        return sides[len(sides) // 2]
    own = [case.node for case in tries if case.labels["set"] == part.settings.name]
    clean, *left = (tables.outcome_shares(outputs.records([node]))["correct"].value for node in own)
    wanted = clean * paper[AROUND] / paper["clean"]
    apart = {side: abs(value - wanted) for side, value in zip(sides, left, strict=True)}
    return min(reversed(sides), key=apart.__getitem__)


def show(nodes: Nodes, outputs: Outputs) -> Shown:
    """Show all, the paper's tables first."""
    figures = [figure for part in nodes.parts for figure in reported(part)]
    records = tables.labelled(outputs, [case for case in nodes.cases if case.labels["set"]])
    # The images of the loss are more; accuracies are of those that every attack has.
    attacked = pl.col("index") < nodes.profile.attack.images
    records = records.filter((pl.col("attacker") == NONE) | attacked)
    worst = _worst(records.filter("full"))
    found = [*_losses(nodes, outputs), _accuracies(nodes, worst), _boxes(nodes, outputs)]
    shown = [beside(table, figures) for table in found]
    summary = [line for one in nodes.profile.sets for line in _sentences(one.name, *shown[1:3])]
    settings = nodes.profile.photographs
    if nodes.album and settings:
        shown += _photographs(nodes, settings, nodes.album, outputs)
        summary += _of_photographs(shown[-1], written(settings.eps[-1]))
    elif all(part.train.name == "digits" for part in nodes.parts):
        summary.insert(0, TEXTS["toy"])
    curves = [_curve(nodes, part, records.filter(set=part.settings.name)) for part in nodes.parts]
    return Shown([*shown, _front(nodes, worst)], curves, summary)


def _worst(records: pl.DataFrame) -> pl.DataFrame:
    """The worst outcomes of each model under each attacker in each region, and the name of that in
    `column`. The strongest attacker counts all attacks inside the region, on the images of the
    ensemble.
    """
    attacked = records.filter(pl.col("attacker") != NONE)
    parts = [
        records.filter(attacker=NONE).with_columns(column=pl.lit("clean")),
        records.filter(attacker=AWARE).with_columns(column="region"),
    ]
    for where in SPOKEN:
        inside = attacked.filter((pl.col("region") == where) | (where == EVERYWHERE))
        ensemble = inside.filter(attacker=STRONGEST)
        labels = {"attacker": STRONGEST, "region": where, "column": f"strongest ensemble, {where}"}
        counted = inside.join(ensemble, on=["model", *PLACE], how="semi")
        parts.append(counted.with_columns(pl.lit(labels[name]).alias(name) for name in labels))
    return worst_case(pl.concat(parts), by=["set", "kind", "attacker", "region", "column"])


def _losses(nodes: Nodes, outputs: Outputs) -> list[Table]:
    losses: list[Measurement] = []
    changes: list[Measurement] = []
    note = TEXTS["losses"].format(attack=nodes.profile.attack)
    for one in nodes.profile.sets:
        box = nodes.boxes[one.name]
        images = "all" if one.loss_images is None else f"{one.loss_images:,}"
        how = {"eps": written(one.eps), "box": box, "images": images}
        note += TEXTS["losses of a set"].format(one=one, **how)
        rows = tables.measured_rows(outputs.value(nodes.losses[one.name]), one.name)
        losses += [row for row in rows if row.row in MODELS]
        changes += [replace(row, unit="%") for row in rows if row.row not in MODELS]
    title = "Loss of each model on each kind of input (Figure 2)"
    second = Table("Differences of the loss", changes, TEXTS["differences"])
    return [Table(title, losses, note), second]


def _accuracies(nodes: Nodes, worst: pl.DataFrame) -> Table:
    profile = nodes.profile
    note = TEXTS["accuracies"].format(attack=profile.attack, strongest=profile.strongest)
    return tables.share_table(ACCURACIES, worst, row="kind", group="set", note=note)


def _boxes(nodes: Nodes, outputs: Outputs) -> Table:
    tried = tables.labelled(outputs, [case for case in nodes.tries if case.node.attack])
    tried = tried.with_columns(side=pl.format("{}x{}", "side", "side"), column=pl.lit("accuracy"))
    title = "The natural model, attacked around a box"
    table = tables.share_table(title, tried, row="side", group="set", note=TEXTS["boxes"])
    known = [part.settings.name for part in nodes.parts if reported(part)]
    boxes = ((name, f"{nodes.boxes[name]}x{nodes.boxes[name]}") for name in known)
    marks = [Measurement(box, "", name, note="chosen") for name, box in boxes]
    return replace(table, rows=[*table.rows, *marks])


def _photographs(
    nodes: Nodes, settings: AttackedPhotographs, album: Album, outputs: Outputs
) -> list[Table]:
    names = {photo.name for photo in album.photos[: settings.listed]}
    figures = [one for one in read_reported("localized_training") if one.group in settings.networks]
    if names == {one.row for one in figures} - {AVERAGE}:
        names.add(AVERAGE)
    figures = [one for one in figures if one.row in names]
    about = " ".join([f"{len(album.photos)} photographs.", *album.notes])
    title = "Unattacked photographs (Table 1)"
    note = TEXTS["photographs"].format(about=about)
    every: list[Measurement] = []
    found: list[Table] = []
    for eps in (0.0, *settings.eps):
        listed = []
        for (network, size, region), node in nodes.answers.items():
            rows = tables.measured_rows(outputs.value(node), network) if size == eps else []
            rows = [row if row.column == "confidence" else replace(row, unit="%") for row in rows]
            attack = f"{region}, eps {written(eps)}" if eps else "no attack"
            every += [replace(row, row=attack) for row in rows if row.row == ALL]
            listed += [row for row in rows if row.row != ALL and region in ("", AROUND)]
        if eps:
            title = "Photographs attacked around the object (Table 2)"
            how = {"eps": written(eps), "steps": settings.steps}
            note = TEXTS["attacked photographs"].format(**how)
        own = figures if eps in (0.0, settings.eps[0]) else []
        table = beside(Table(title, listed, note), own, missing=True)
        rows = [_in_words(row) if row.column == "guess" else row for row in table.rows]
        said = title.replace("object (", f"object, eps {written(eps)} (")
        found.append(replace(table, title=said, rows=rows))
    note = TEXTS["every region"].format(about=about)
    return [*found, Table("All photographs, attacked in each region", every, note)]


def _in_words(row: Measurement) -> Measurement:
    """Give classes instead of their numbers."""
    ours = "no weights at hand" if row.measured is None else CLASSES[int(row.measured)]
    theirs = "" if row.paper is None else f" [{CLASSES[int(row.paper)]}]"
    return Measurement(row.row, row.column, row.group, note=ours + theirs)


def _front(nodes: Nodes, worst: pl.DataFrame) -> Table:
    parts = []
    for where, spoken in SPOKEN.items():
        name = pl.format("{}: {} model, attacked {}", "set", "kind", pl.lit(spoken))
        parts.append(worst.filter(pl.col("region").is_in(["", where])).with_columns(model=name))
    records = pl.concat(parts).sort(
        pl.col("attacker").cast(pl.Enum(ATTACKERS)), maintain_order=True
    )
    title = pl.col("attacker").replace_strict(dict(zip(ATTACKERS, ATTACKED_BY, strict=True)))
    eps = ", ".join(f"{written(one.eps)} on {one.name}" for one in nodes.profile.sets)
    note = TEXTS["front"].format(eps=eps)
    return tables.outcome_table(FRONT, records.with_columns(group=title), note=note)


def _curve(nodes: Nodes, part: Part[SetProfile], records: pl.DataFrame) -> Curve:
    """Outcomes against eps: at 0 those of the clean images that are attacked."""
    attack = nodes.profile.attack
    sizes = [min(1.0, factor * part.settings.eps) for factor in attack.curve]
    aware = records.filter(attacker=AWARE)
    clean = records.filter(pl.col("image").is_in(aware["image"].to_list()), attacker=NONE)
    lines = []
    for kind in MODELS:
        for where, spoken in SPOKEN.items():
            own = aware.filter(kind=kind, region=where)
            start = [clean.filter(kind=kind)] if 0 in sizes else []
            points = [worst_case(own.filter(pl.col("eps") <= eps)) for eps in sizes if eps]
            lines.append(tables.series_of(f"{kind}, attacked {spoken}", [*start, *points]))
    note = TEXTS["curve"].format(attack=attack)
    x = [round(eps, 6) for eps in sizes]
    return Curve(f"{part.settings.name}: outcomes against eps", "eps (Linf)", x, lines, note)


def _sentences(name: str, changes: Table, accuracies: Table) -> list[str]:
    """Say the main findings on a set."""
    own = [row for row in (*changes.rows, *accuracies.rows) if row.group == name]
    of = {(row.row, row.column): row.measured or 0.0 for row in own}
    falls = [-of[STANDARD, "standard attack"], -of[BACKGROUND, "background attack"]]
    changed = [of[model, "natural images"] for model in (STANDARD, BACKGROUND)]
    kept = (
        f"{spoken}, "
        + ", ".join(f"{of[kind, f'strongest ensemble, {where}']:.1f} %" for kind in MODELS)
        for where, spoken in SPOKEN.items()
    )
    lines = [
        TEXTS["falls"].format(name=name, falls=falls, changed=changed),
        TEXTS["kept"].format(name=name, models=", ".join(MODELS), kept="; ".join(kept)),
    ]
    # A difference has a sign where its 95 % interval does not contain 0.
    signs = {
        f"{row.row} on {row.column}": {row.paper * (end or 0.0) > 0 for end in (row.low, row.high)}
        for row in changes.rows
        if row.group == name and row.paper is not None
    }
    if signs:
        same, other = ([key for key in signs if signs[key] == {sign}] for sign in (True, False))
        counts = {"same": len(same), "other": len(other), "all": len(signs)}
        counts["rest"] = len(signs) - len(same) - len(other)
        which = f" ({'; '.join(other)})" if other else ""
        lines.append(TEXTS["signs"].format(name=name, which=which, **counts))
    return lines


def _of_photographs(table: Table, eps: str) -> list[str]:
    """Say what the attack on the background does to each network, and what random pixels do."""
    of = {(row.group, row.row): row for row in table.rows if row.column == "correct"}
    names = ("no attack", f"{AROUND}, eps {eps}", f"{RANDOM}, eps {eps}")
    found = [[of[group, name] for name in names] for group in dict.fromkeys(key[0] for key in of)]
    return [TEXTS["of photographs"].format(*three, eps=eps) for three in found]
