"""Self-tests of an audit, and its verdict: can these attacks be believed?"""

from collections.abc import Iterable
from dataclasses import replace
from itertools import pairwise
from typing import Final

import polars as pl

from demur.evaluation import checks
from demur.evaluation.audit_counts import counted
from demur.evaluation.audit_results import CheckRow, State, Verdict
from demur.evaluation.records import PLACE
from demur.goals import ForceReject

BLIND: Final = 0.01
UNCONSTRAINED: Final = 0.01
BLACK_BOX: Final = 0.002
MONOTONE: Final = 0.01
DOUBTFUL: Final = frozenset({"unstable predictions", "incomplete optimisation", "doubling"})
"""Checks that leave doubt where they are flagged; any other flagged check makes it unsound."""


def self_tests(
    records: pl.DataFrame,
    *,
    gradients: bool,
    randomised: bool = False,
    noise: pl.DataFrame | None = None,
) -> list[CheckRow]:
    """Run the self-tests that are queries over the records of the attacks.

    Parameters
    ----------
    records : polars.DataFrame
        Of one audited model.
    gradients : bool
        Whether the model has gradients.
    randomised : bool, default False
        Whether the model draws at random: outcomes of two attacks then differ by chance, and are
        not compared.
    noise : polars.DataFrame, optional
        Records of more random noise on some of the images.

    Returns
    -------
    list of CheckRow
    """
    found = _prepared(records, randomised)
    more = records if noise is None else pl.concat([records, noise])
    noisy = _prepared(more, randomised)
    attacked, compared = found
    return [
        _unavailable_gradients(attacked, gradients),
        _unconstrained(attacked, gradients),
        _black_box(compared, gradients),
        _monotone(compared, gradients),
        _noise(noisy[1]),
        _beaten(
            compared,
            "single step <= many steps",
            _KIND.is_in(checks.SINGLE_STEP),
            _KIND.is_in([*checks.ITERATIVE, "Strongest"]),
            BLACK_BOX,
            "that attacks with many steps leave",
        ),
        _beaten(
            compared,
            "defence-unaware <= defence-aware",
            pl.col("attacker") == "defence-unaware",
            pl.col("attacker").is_in(["defence-aware", "strongest"]),
            BLACK_BOX,
            "that attackers who know the rejection leave",
        ),
    ]


def _prepared(records: pl.DataFrame, randomised: bool) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Give the rows of attacks, and those whose outcomes may be compared."""
    records = records.select(_NEEDED)
    wrong = records.filter(pl.col("attack").is_null() & (pl.col("outcome") == "wrong"))
    records = records.join(wrong, on=list(PLACE), how="anti")  # no attack breaks these
    attacked = records.filter(pl.col("attack").is_not_null() & (pl.col("goal") != _FORCED))
    return attacked, attacked.clear() if randomised else attacked


def verdict(rows: Iterable[CheckRow], *, certain: bool) -> Verdict:
    """Give the verdict of some self-tests.

    Parameters
    ----------
    rows : iterable of CheckRow
    certain : bool
        Whether all attacks of the plan ran, on a model that has gradients and is not randomised.
        Otherwise the verdict is "doubtful" at best, as where a self-test that could be applied did
        not run.

    Examples
    --------
    >>> verdict([CheckRow("noise", 3, 0, "flagged", "")], certain=True)
    'unsound'
    """
    rows = list(rows)
    flagged = {row.name for row in rows if row.state == "flagged"}
    certain = certain and all(row.state != "not_run" for row in rows)
    if flagged - DOUBTFUL:
        return "unsound"
    return "sound" if certain and not flagged else "doubtful"


_FORCED: Final = repr(ForceReject())
_KIND: Final = pl.col("attack").str.extract(r"^(\w+)")
_NOISE: Final = _KIND == "RandomNoise"
_TOOL: Final = pl.col("by").fill_null(pl.col("attack"))
_BLACK: Final = (
    _TOOL.str.starts_with("Square")
    | _TOOL.str.starts_with("RandomNoise")
    | (pl.col("attacker") == "defence-unaware")
)
"""Attacks without gradients of the model itself."""
_NEEDED: Final = (
    *("model", *PLACE, "attacker", "attack", "by", "norm", "eps", "goal", "mask"),
    *("success", "outcome", "backwards", "zero_gradients"),
)
"""The columns that the queries read: copies of all others would cost memory."""


def _beaten(
    attacked: pl.DataFrame, name: str, weak: pl.Expr, strong: pl.Expr, limit: float, left: str
) -> CheckRow:
    """Count the images that a weak attack breaks and no strong one does, at the worst threat."""
    most = 0
    n = 0
    for _, rows in attacked.filter(pl.col("eps").is_finite()).group_by("norm", "eps"):
        by_weak, by_strong = rows.filter(weak), rows.filter(strong)
        if by_weak.is_empty() or by_strong.is_empty():
            continue
        n = max(n, by_weak.select(PLACE).n_unique())
        broken = [one.filter(pl.col("outcome") == "wrong") for one in (by_weak, by_strong)]
        only = broken[0].select(PLACE).unique().join(broken[1], on=list(PLACE), how="anti")
        most = max(most, len(only))
    if not n:
        return CheckRow(name, None, limit, "not_applicable", f"it counts images {left}")
    return counted(name, most, n, limit, f"images broken {left}")


def _noise(attacked: pl.DataFrame) -> CheckRow:
    """Count the images that noise alone breaks (R13)."""
    row = _beaten(attacked, "noise", _NOISE, ~_NOISE, 0.0, "that every other attack leaves")
    draws = attacked.filter(_NOISE)["attack"].str.extract(r"draws=(\d+)").cast(pl.Int64).max()
    if row.state == "not_applicable" or not isinstance(draws, int):
        return row
    share = 100 * (1 - 0.05 ** (1 / draws))
    seen = f" {draws:,} draws find, with 95 %, what {share:.2g} % of the allowed images break."
    return replace(row, text=row.text + seen)


def _monotone(attacked: pl.DataFrame, gradients: bool) -> CheckRow:
    """Count the images that an attack breaks at a size and leaves at the next larger one (R11)."""
    name = "monotone"
    text = "images that an attack breaks at one eps and leaves at a larger one"
    descent = attacked.filter(
        (pl.col("goal") == "evade") & _KIND.is_in(checks.ITERATIVE) & pl.col("eps").is_finite()
    )
    most = 0
    n = 0
    for _, rows in descent.group_by("attack", "norm"):
        slim = rows.select("eps", "success", *PLACE)
        for smaller, larger in pairwise(sorted(slim["eps"].unique())):
            both = slim.filter(eps=smaller).join(slim.filter(eps=larger), on=list(PLACE))
            most = max(most, int((both["success"] & ~both["success_right"]).sum()))
            n = max(n, len(both))
    if not n or not gradients:
        return CheckRow(name, None, MONOTONE, "not_applicable", f"it counts {text}")
    return counted(name, most, n, MONOTONE, text)


def _unavailable_gradients(attacked: pl.DataFrame, gradients: bool) -> CheckRow:
    """I1 of Pintor et al. 2022: images whose gradients are all zero."""
    name = "unavailable gradients"
    if not gradients:
        text = "the model gives no gradient: attacks with gradients did not run"
        return CheckRow(name, None, BLIND, "not_applicable", text)
    asked = attacked.filter(pl.col("backwards") > 0)
    if asked.is_empty() and bool(attacked["zero_gradients"].is_null().all()):
        text = "the attacks ran on the mean of a randomised model, whose gradients are not counted"
        return CheckRow(name, None, BLIND, "not_applicable", text)
    blind = asked.group_by(PLACE).agg(
        all_zero=pl.col("zero_gradients").sum() >= pl.col("backwards").sum(),
        share=pl.col("zero_gradients").sum() / pl.col("backwards").sum(),
    )
    return counted(
        name,
        int((blind["share"] > 0.5).sum()),
        len(blind),
        BLIND,
        "images for which most gradients are zero: attacks with gradients see nothing there",
    )


def _unconstrained(attacked: pl.DataFrame, gradients: bool) -> CheckRow:
    """I6 of Pintor et al. 2022: without a limit, an attack breaks every image."""
    unlimited = pl.col("eps").is_infinite() | pl.col("eps").is_null()
    free = attacked.filter(unlimited & (pl.col("goal") == "evade"))
    name = "unconstrained failure"
    text = "images that no attack breaks although every change is allowed"
    if free.is_empty():
        state: State = "not_run" if gradients else "not_applicable"
        return CheckRow(name, None, UNCONSTRAINED, state, f"it counts {text}")
    # What gradients break at a limit is allowed without one: successes are carried upward (R12).
    known = attacked.filter(
        (pl.col("goal") == "evade") & (pl.col("outcome") == "wrong") & ~_BLACK
    ).select(PLACE)
    wrong = free.filter(pl.col("outcome") == "wrong").select(PLACE)
    left = free.select(PLACE).unique().join(pl.concat([known, wrong]), on=list(PLACE), how="anti")
    n = free.select(PLACE).n_unique()
    return counted(name, len(left), n, UNCONSTRAINED, text, left["image"].sort().to_list())


def _black_box(attacked: pl.DataFrame, gradients: bool) -> CheckRow:
    """Images that only an attack without gradients breaks."""
    name = "white-box >= black-box"
    text = "images that only Square, transfer or noise breaks: gradients missed them"
    n = attacked.select(PLACE).n_unique()
    if not gradients or not n:
        return CheckRow(name, None, BLACK_BOX, "not_applicable", f"it counts {text}")
    broken = attacked.filter((pl.col("outcome") == "wrong") & pl.col("eps").is_finite())
    each = broken.group_by(["norm", "eps", *PLACE]).agg(_BLACK.all().alias("only"))
    most = each.filter(pl.col("only")).group_by(["norm", "eps"]).len()["len"].max()
    return counted(name, int(most) if isinstance(most, int) else 0, n, BLACK_BOX, text)
