"""Tables and curves of the rejection study: queries over records and measurements."""

import math
from collections.abc import Mapping

import polars as pl

from demur.evaluation.plan import Outputs
from demur.evaluation.records import worst_case
from demur.evaluation.results import Curve, Table
from demur.evaluation.shares import ATTACKED_BY, FRONT, share
from demur.evaluation.tables import outcome_table
from demur.studies import rejection, security
from demur.studies.neural_rejection.profile import Material
from demur.studies.reported import beside, measured, read_reported, read_texts
from demur.studies.security import counts
from demur.studies.study import Shown

THREE = DNN, NR, DNR = ("DNN", "NR", "DNR")
UNAWARE, PAPER, STRONGEST = ATTACKERS = ("defence-unaware", "the paper's", "strongest ensemble")
PAPERS_IMAGES = 30_000
IMAGES = ("train", "validation", "test", "images")
TEXTS = read_texts("neural_rejection")

Moved = Mapping[str, rejection.Thresholds]
"""Evaluations at other thresholds, by model."""


class Found:
    """What was found. `everywhere` are the attacked images before any attack, and under the attacks
    that all models meet; `points` their outcomes at each eps, and `at` where attacks are compared.
    """

    def __init__(
        self, given: Material, titles: Mapping[str, str], moved: Moved, outputs: Outputs
    ) -> None:
        self.given, self.profile, self.eps = given, given.profile, given.profile.strongest.eps
        self.outputs, self.moved = outputs, moved
        title = pl.col("attack").replace_strict(titles, default="", return_dtype=pl.String)
        self.records = outputs.records().with_columns(title=title)
        self.tests = self.records.filter(pl.col("split") == "test")
        same = (pl.col("attacker") != "defence-aware") | (pl.col("title") == PAPER)
        self.everywhere = self.records.filter(pl.col("split") == "attacked", same)
        names = {UNAWARE: UNAWARE, "defence-aware": PAPER}
        self.points = security.at_each_eps(self.everywhere, self.profile.attack.eps, names)
        self.at = self.points.filter(pl.col("at") == self.eps).drop("at")
        self.changes = security.smallest_changes(self.everywhere)
        self.names: list[str] = self.tests["model"].unique(maintain_order=True).to_list()
        self.rejecting = [name for name in self.names if not name.startswith(DNN)]

    def say(self, name: str, *values: object, **named: object) -> str:
        """Fill in a text of texts.csv."""
        given = self.given
        known = {name: len(getattr(given, name)) for name in IMAGES}
        return TEXTS[name].format(*values, profile=self.profile, eps=self.eps, **known, **named)


def show(given: Material, titles: Mapping[str, str], moved: Moved, outputs: Outputs) -> Shown:
    """Make all tables, curves and sentences; `titles` are those of the attacks by their repr."""
    found = Found(given, titles, moved, outputs)
    tables = [_network(found), _machines(found), _clean(found), *_against_eps(found)]
    tables += [_compared(found), _measures(found), _with_rejection(found), _gradients(found)]
    return Shown([*tables, _front(found)], _curves(found), _summary(found))


def _network(found: Found) -> Table:
    profile = found.profile
    table = Table("The network (Table 3)", measured(found.outputs, DNN), found.say("network"))
    same = found.given.train.name == "mnist" and profile.train_images == PAPERS_IMAGES
    return beside(table, read_reported("neural_rejection")) if same else table


def _machines(found: Found) -> Table:
    each = found.profile.machines.per_class
    learned = f"{each:,} images of each class" if each else "all training images"
    note = found.say("machines", learned=learned)
    rows = [row for name in found.rejecting for row in measured(found.outputs, name, name)]
    return Table("The machines, layer by layer (Figures 7 and 8)", rows, note)


def _clean(found: Found) -> Table:
    validated = found.records.filter(pl.col("split") == "validation")
    rows = rejection.clean_rows(found.tests, validated, found.outputs.measurements())
    return Table("Clean images", rows, found.say("clean"))


def _against_eps(found: Found) -> list[Table]:
    points, note = found.points, found.say("against eps")
    rejecting = points.filter(pl.col("model").is_in(found.rejecting))
    first = f"{note} At eps 0 a rejection counts as an error."
    title = "{}, against eps (Figures 11 and 12)".format
    correct = title("Correct or rejected"), security.lenient(points), "correct", first
    return [
        security.eps_table(*correct),
        security.eps_table(title("Correct"), points, "correct", note),
        security.eps_table(title("Rejected"), rejecting, "rejected", note),
    ]


def _curves(found: Found) -> list[Curve]:
    note, moved = found.say("curves"), found.say("false rejection")
    first = pl.col("model").is_in(THREE)
    title, label = "Outcomes against false rejection", "validation images rejected (%)"
    return [
        security.eps_curve("Security evaluation (Figure 11)", found.points.filter(first), note),
        security.eps_curve(
            "After adversarial training (Figure 12)", found.points.filter(~first), note
        ),
        rejection.against_rejection(title, found.moved, label, found.outputs, moved),
    ]


def _compared(found: Found) -> Table:
    three = pl.col("model").is_in(THREE)
    at = found.at.filter(three, pl.col("title") != STRONGEST)
    more = found.records.filter(three, ~pl.col("title").is_in(["", PAPER])).select(at.columns)
    lines = pl.concat([at, more])
    worst = worst_case(lines).with_columns(title=pl.lit("the worst of these"))
    note = found.say("compared")
    title = f"The attacks compared, at eps {found.eps:g}"
    return outcome_table(title, pl.concat([lines, worst]), row="title", group="model", note=note)


def _measures(found: Found) -> Table:
    column = f"implied robust accuracy at eps {found.eps / 2:g}"
    rows = []
    for model, thresholds in found.moved.items():
        rows += rejection.at_thresholds(model, thresholds, found.outputs)
        rows.append(rejection.implied_accuracy(model, found.changes, found.eps, column))
    for model in found.names:
        if model not in found.rejecting:
            rows.append(rejection.implied_accuracy(model, found.changes, found.eps / 2, column))
    return Table("Other measures of rejection", rows, found.say("measures"))


def _with_rejection(found: Found) -> Table:
    each = [rejection.near_rejections(model, found.changes, found.eps) for model in found.rejecting]
    rows = [row for rows in each for row in rows]
    title = "Errors, with rejections near the image counted as errors"
    return Table(title, rows, found.say("with rejection"))


def _gradients(found: Found) -> Table:
    search = found.everywhere.filter(pl.col("attacker") == "strongest", pl.col("eps").is_null())
    rows = rejection.gradient_rows(found.everywhere.filter(pl.col("title") == PAPER), PAPER)
    rows += rejection.gradient_rows(search, STRONGEST)
    wider = pl.col("attack").str.contains("Wider")
    for model in found.rejecting:
        here = search.filter(pl.col("model") == model, pl.col("goal") == "evade")
        for kernels, part in (("original", here.filter(~wider)), ("wider", here.filter(wider))):
            reached = part.group_by("index").agg(pl.col("success").any())["success"]
            figures = [(int(reached.sum()), len(reached))]
            rows.append(share(model, f"found, {kernels} kernels", figures, group=STRONGEST))
    return Table("Gradients", rows, found.say("gradients"))


def _front(found: Found) -> Table:
    titles = dict(zip(("", *ATTACKERS), ATTACKED_BY, strict=True))
    rows = pl.concat([found.tests.select(found.at.columns), found.at])
    rows = rows.with_columns(group=pl.col("title").replace_strict(titles))
    return outcome_table(FRONT, rows, note=found.say("front"))


def _summary(found: Found) -> list[str]:
    def percent(rows: pl.DataFrame, model: str, outcome: str, title: str = "") -> float:
        chosen = counts(rows.filter(pl.col("model") == model, pl.col("title") == title))
        return 100 * float(getattr(chosen, outcome)) / chosen.n

    clean = [
        [percent(found.tests, model, outcome) for outcome in ("correct", "rejected")]
        for model in THREE
    ]
    sentences = [found.say("toy")] * (found.given.train.name == "digits")
    sentences.append(found.say("said of clean", *clean))
    for model in found.names:
        least = found.changes.filter(pl.col("model") == model)["wrong"].to_torch().median()
        far = "infinity (none was found for half of the images)"
        length = f"{least:.2f}" if math.isfinite(least) else far
        wrong = (percent(found.at, model, "wrong", attacker) for attacker in ATTACKERS)
        sentences.append(found.say("said of attacked", *wrong, model=model, length=length))
    return sentences
