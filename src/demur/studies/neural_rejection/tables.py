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
from demur.studies.reported import beside, measured, read_reported
from demur.studies.security import counts
from demur.studies.study import Shown

THREE = DNN, NR, DNR = ("DNN", "NR", "DNR")
UNAWARE, PAPER, STRONGEST = ATTACKERS = ("defence-unaware", "the paper's", "strongest ensemble")
PAPERS_IMAGES = 30_000

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


def show(given: Material, titles: Mapping[str, str], moved: Moved, outputs: Outputs) -> Shown:
    """Make all tables, curves and sentences; `titles` are those of the attacks by their repr."""
    found = Found(given, titles, moved, outputs)
    tables = [_network(found), _machines(found), _clean(found), *_against_eps(found)]
    tables += [_compared(found), _measures(found), _with_rejection(found), _gradients(found)]
    return Shown([*tables, _front(found)], _curves(found), _summary(found))


def _network(found: Found) -> Table:
    profile = found.profile
    note = (
        f"After {profile.epochs} epochs on {len(found.given.train):,} images; in training with "
        "dropout, over the last epoch."
    )
    table = Table("The network (Table 3)", measured(found.outputs, DNN), note)
    same = found.given.train.name == "mnist" and profile.train_images == PAPERS_IMAGES
    return beside(table, read_reported("neural_rejection")) if same else table


def _machines(found: Found) -> Table:
    used = found.profile.machines
    each = f"{used.per_class:,} images of each class" if used.per_class else "all training images"
    note = (
        "Test images whose highest-scoring machine is that of their class, without rejection. RBF "
        f"machines on {each}: C {used.C:g}, gamma {used.gamma:g}; combined C {used.combiner_C:g}, "
        f"gamma {used.combiner_gamma:g}. The text of the paper does not print the values of "
        "Figures 7 and 8."
    )
    rows = [row for name in found.rejecting for row in measured(found.outputs, name, name)]
    return Table("The machines, layer by layer (Figures 7 and 8)", rows, note)


def _clean(found: Found) -> Table:
    validated = found.records.filter(pl.col("split") == "validation")
    rows = rejection.clean_rows(found.tests, validated, found.outputs.measurements())
    note = (
        f"All {len(found.given.test):,} test images. Selective accuracy is the accuracy on "
        "accepted images; selective F1 is its harmonic mean with the share accepted. Reject below "
        f"{found.profile.machines.threshold:g}, on Platt's probabilities normalised over classes."
    )
    return Table("Clean images", rows, note)


def _against_eps(found: Found) -> list[Table]:
    attack, points = found.profile.attack, found.points
    note = (
        f"L2; {attack.repeats} times {attack.images} test images, mean and sd over these. The "
        "defence-unaware attacker attacks the network alone and maximises the loss. The strongest "
        "ensemble is, for each image, the worst outcome within eps of these two attackers, of the "
        "search for the smallest change and of `attacks.Strongest`, which attacks within "
        f"{found.eps:g}. Where no wrong answer was forced, a forced rejection counts."
    )
    title = "{}, against eps (Figures 11 and 12)".format
    rejecting = points.filter(pl.col("model").is_in(found.rejecting))
    first = f"{note} At eps 0 a rejection counts as an error."
    return [
        security.eps_table(
            title("Correct or rejected"), security.lenient(points), "correct", first
        ),
        security.eps_table(title("Correct"), points, "correct", note),
        security.eps_table(title("Rejected"), rejecting, "rejected", note),
    ]


def _curves(found: Found) -> list[Curve]:
    note = (
        f"Outcomes of {len(found.given.images):,} test images. The paper's accuracy counts correct "
        "and rejected."
    )
    first = pl.col("model").is_in(THREE)
    moved = (
        f"The threshold rejects that share of {len(found.given.validation):,} validation images. "
        f"{found.profile.thresholds.images} test images are attacked within {found.eps:g} in L2 by "
        "PGD on the margin, which knows the threshold, with kernels of three widths. An attacked "
        "image that is accepted at a higher threshold counts as accepted at every lower one. The "
        "strongest ensemble would break more."
    )
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
    note = (
        f"L2 within {found.eps:g}. The paper's attack uses the margin of sec. 2.5.1 and includes "
        "images broken at a smaller eps; with twice the steps it is run at this eps alone. The "
        "density is a kernel estimate of the features of known images, as the paper's conclusion "
        "suggests. Feature matching moves towards the features of an accepted image of another "
        "class. These two follow gradients of wider kernels. The ensemble is `attacks.Strongest`."
    )
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
    note = (
        f"Attacked within {found.eps:g} in L2 by an attacker that knows the threshold, which is "
        f"set on {len(found.given.validation):,} clean validation images. Robust error is taken "
        "where 99 % of the correct images are accepted (Stutz et al. 2020), detection at each "
        "false rejection rate. A detector that is robust within eps implies a slow classifier "
        "that is robust within half of it (Tramer 2022): the last column has the implied "
        "accuracy, and that of the networks without rejection."
    )
    return Table("Other measures of rejection", rows, note)


def _with_rejection(found: Found) -> Table:
    each = [rejection.near_rejections(model, found.changes, found.eps) for model in found.rejecting]
    note = (
        f"Share of images with an accepted error within {found.eps:g}, or a rejection within alpha "
        f"times {found.eps:g}: R_eps(f, alpha) of Chen et al. 2023. Their total robust loss is "
        "given for ramps, where a rejection costs more the nearer it is. Forcing a rejection is an "
        "attack too."
    )
    rows = [row for rows in each for row in rows]
    return Table("Errors, with rejections near the image counted as errors", rows, note)


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
    note = (
        "Kernels are flat far from their support vectors. Found: images for which the search for "
        "the smallest change found an accepted error at any distance, with gradients of the "
        "original kernels and of wider ones. The paper's attack meets every image at every eps."
    )
    return Table("Gradients", rows, note)


def _front(found: Found) -> Table:
    titles = dict(zip(("", *ATTACKERS), ATTACKED_BY, strict=True))
    rows = pl.concat([found.tests.select(found.at.columns), found.at])
    rows = rows.with_columns(group=pl.col("title").replace_strict(titles))
    note = (
        f"L2 within {found.eps:g}. Defence-aware: the paper's attacker. No attack: all test images."
    )
    return outcome_table(FRONT, rows, note=note)


def _summary(found: Found) -> list[str]:
    def percent(rows: pl.DataFrame, model: str, outcome: str, title: str = "") -> float:
        chosen = counts(rows.filter(pl.col("model") == model, pl.col("title") == title))
        return 100 * float(getattr(chosen, outcome)) / chosen.n

    (right, _), (nr, nr_lost), (dnr, dnr_lost) = (
        [percent(found.tests, model, outcome) for outcome in ("correct", "rejected")]
        for model in THREE
    )
    toy = "A toy, to see how it works: small embedded digits and few images."
    sentences = [toy] if found.given.train.name == "digits" else []
    sentences.append(
        f"Clean images: {right:.2f} % correct for the network, {nr:.2f} % with NR (which rejects "
        f"{nr_lost:.2f} %) and {dnr:.2f} % with DNR ({dnr_lost:.2f} % rejected)."
    )
    for model in found.names:
        least = found.changes.filter(pl.col("model") == model)["wrong"].to_torch().median()
        far = "infinity (none was found for half of the images)"
        unaware, paper, strongest = (
            percent(found.at, model, "wrong", attacker) for attacker in ATTACKERS
        )
        sentences.append(
            f"{model} within {found.eps:g} in L2: {unaware:.1f} % wrong and accepted under the "
            f"defence-unaware attacker, {paper:.1f} % under the paper's, {strongest:.1f} % under "
            "the strongest ensemble; the median length of the smallest change found to an accepted "
            f"error is {f'{least:.2f}' if math.isfinite(least) else far}."
        )
    return sentences
