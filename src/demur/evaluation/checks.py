"""Checks of records: can these attacks be believed? The same queries serve studies and audits."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import polars as pl

from demur.errors import amount
from demur.evaluation.records import PLACE, worst_case
from demur.metrics import wilson_interval

BLIND = 0.01
"""The share of zero gradients from which an attack counts as blind."""
SINGLE_STEP = ("FGSM", "FGM")
ITERATIVE = ("PGD", "APGD")
_THREAT = ["norm", "eps", "goal", "mask"]


@dataclass(frozen=True)
class Finding:
    """What a check found.

    Parameters
    ----------
    check : str
        Name of the check.
    model : str
    text : str
        One sentence for the user.
    """

    check: str
    model: str
    text: str

    def __str__(self) -> str:
        """Give the line of a report."""
        return f"{self.model}: {self.text}"


def check(records: pl.DataFrame) -> list[Finding]:
    """Run all checks.

    Parameters
    ----------
    records : polars.DataFrame
        As `Outputs.records` gives them.

    Returns
    -------
    list of Finding
        Empty if nothing was found.
    """
    checks = (
        blind,
        unaware_beats_aware,
        noise_beats_attack,
        single_step_beats_iterative,
        falling,
        other_beats_ensemble,
        near_chance,
    )
    return [finding for one in checks for finding in one(records)]


def blind(records: pl.DataFrame) -> Iterator[Finding]:
    """Find attacks without gradients: more than 1 % of theirs were zero (R14, R20)."""
    attacked = records.filter(pl.col("backwards") > 0)
    sums = attacked.group_by(["model", "attack"], maintain_order=True).agg(
        pl.col("zero_gradients", "backwards").sum()
    )
    for row in sums.iter_rows(named=True):
        share = row["zero_gradients"] / row["backwards"]
        if share > BLIND:
            yield Finding(
                "blind gradients",
                row["model"],
                f"{100 * share:.0f} % of the gradients of {row['attack']} were zero: what it did "
                "not find says little.",
            )


def unaware_beats_aware(records: pl.DataFrame) -> Iterator[Finding]:
    """Find models of which the defence-unaware attacker breaks more images (R19).

    The goals may differ: such an attacker may seek any error of the undefended model.
    """
    attacked = records.filter(pl.col("attack").is_not_null())
    for name, rows in attacked.group_by(["model", "norm", "eps"], maintain_order=True):
        unaware = worst_case(rows.filter(pl.col("attacker") == "defence-unaware"))
        aware = worst_case(rows.filter(pl.col("attacker") == "defence-aware"))
        both = unaware.join(aware, on=["model", *PLACE], suffix="_aware")
        by_unaware = int((both["outcome"] == "wrong").sum())
        by_aware = int((both["outcome_aware"] == "wrong").sum())
        if by_unaware > by_aware:
            yield Finding(
                "defence-unaware beats defence-aware",
                str(name[0]),
                f"within {_written(name)} the defence-unaware attacker breaks "
                f"{amount(by_unaware, 'image')}, the defence-aware one {by_aware}: the "
                "defence-aware attack is too weak.",
            )


def noise_beats_attack(records: pl.DataFrame) -> Iterator[Finding]:
    """Find images that random noise breaks and every attack at the same threat does not (R11)."""
    for threat, rows in _by_threat(records):
        noise = rows.filter(pl.col("attack").str.starts_with("RandomNoise"))
        others = rows.filter(~pl.col("attack").str.starts_with("RandomNoise"))
        count = _broken_only_by(noise, others)
        if count:
            yield Finding(
                "noise beats attacks",
                str(threat[0]),
                f"random noise within {_written(threat)} breaks {amount(count, 'image')} that "
                "no attack breaks.",
            )


def single_step_beats_iterative(records: pl.DataFrame) -> Iterator[Finding]:
    """Find threats where one step breaks more of the same images than many steps (R11)."""
    for threat, rows in _by_threat(records):
        kind = pl.col("attack").str.extract(r"^(\w+)")
        iterative = rows.filter(kind.is_in(ITERATIVE))
        single = rows.filter(kind.is_in(SINGLE_STEP)).join(iterative, on=list(PLACE), how="semi")
        iterative = iterative.join(single, on=list(PLACE), how="semi")
        if single.is_empty() or iterative.is_empty():
            continue
        one = max(_wrong(part) or 0 for _, part in single.group_by("attack"))
        many = max(_wrong(part) or 0 for _, part in iterative.group_by("attack"))
        if one > many:
            yield Finding(
                "single step beats iterative",
                str(threat[0]),
                f"one step within {_written(threat)} breaks {amount(one, 'image')}, many "
                f"steps break {many}: the iterative attack is too weak.",
            )


def falling(records: pl.DataFrame) -> Iterator[Finding]:
    """Find attacks that succeed on fewer of the same images although eps grows (R11)."""
    same = ["model", "attacker", "attack", "norm", "goal", "mask"]
    limited = records.filter(pl.col("eps").is_finite())
    for name, rows in limited.group_by(same, maintain_order=True):
        sizes = sorted(rows["eps"].unique())
        slim = rows.select("eps", "success", *PLACE)
        for smaller, larger in pairwise(sizes):
            both = slim.filter(eps=smaller).join(slim.filter(eps=larger), on=list(PLACE))
            before = int(both["success"].sum())
            after = int(both["success_right"].sum())
            if after < before:
                yield Finding(
                    "success falls with eps",
                    str(name[0]),
                    f"{name[2]} succeeds on {amount(before, 'image')} at eps {smaller:g} and on "
                    f"{after} of them at {larger:g}.",
                )


def other_beats_ensemble(records: pl.DataFrame) -> Iterator[Finding]:
    """Find images that a defence-aware attack within the same limits breaks, and the ensemble does
    not. Noise has a check of its own.
    """
    limits = ["model", "norm", "eps", "mask"]
    attacked = records.filter(~pl.col("attack").str.starts_with("RandomNoise"))
    for threat, rows in attacked.group_by(limits, maintain_order=True):
        other = rows.filter(pl.col("attacker") == "defence-aware")
        count = _broken_only_by(other, rows.filter(pl.col("attacker") == "strongest"))
        if count:
            yield Finding(
                "another attack beats the ensemble",
                str(threat[0]),
                f"within {_written(threat)}, other attacks break {amount(count, 'image')} that the "
                "ensemble does not break. These attacks count in the worst case.",
            )


def near_chance(records: pl.DataFrame) -> Iterator[Finding]:
    """Find models whose accuracy on clean images may be below one and a half times chance."""
    known = records.filter(pl.col("attacker") == "none", pl.col("label") >= 0)
    for name, rows in known.group_by("model", maintain_order=True):
        # Classes have the numbers from 0 up: as many as the largest one says, at least.
        chance = 1 / (1 + rows.select(pl.max_horizontal(pl.max("label", "prediction"))).item())
        correct = rows.unique("image").filter(pl.col("outcome") == "correct").height
        low, high = wilson_interval(correct, rows["image"].n_unique())
        if chance < 1 and low < 1.5 * chance:
            yield Finding(
                "near chance",
                str(name[0]),
                f"the accuracy on clean images, {100 * low:.1f} to {100 * high:.1f} %, is close to "
                "chance: what an attack does not change is no robustness.",
            )


def _by_threat(records: pl.DataFrame) -> Iterator[tuple[tuple[object, ...], pl.DataFrame]]:
    """Give the attacked rows of each model and threat."""
    attacked = records.filter(pl.col("attack").is_not_null())
    yield from attacked.group_by(["model", *_THREAT], maintain_order=True)


def _wrong(rows: pl.DataFrame) -> int | None:
    """Count the images that are wrong and accepted; None without rows."""
    return None if rows.is_empty() else int((rows["outcome"] == "wrong").sum())


def _broken_only_by(noise: pl.DataFrame, others: pl.DataFrame) -> int:
    if noise.is_empty() or others.is_empty():
        return 0
    by_noise = worst_case(noise).filter(pl.col("outcome") == "wrong")
    by_others = worst_case(others).filter(pl.col("outcome") != "wrong")
    return by_noise.join(by_others, on=["model", *PLACE], how="semi").height


def _written(threat: tuple[object, ...]) -> str:
    norm, eps = threat[1], threat[2]
    return str(norm) if eps is None else f"{norm} {eps:g}"
