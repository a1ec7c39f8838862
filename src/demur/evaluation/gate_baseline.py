"""The baseline of a gate: did the wrong answers rise since an earlier audit of the same images?"""

from dataclasses import dataclass

import polars as pl

from demur.evaluation.audit_results import AuditResults, ThreatRow, within
from demur.evaluation.gate import (
    INCREASE,
    Decision,
    State,
    counts_of,
    doubts_of,
    rows_of,
    too_few,
)
from demur.evaluation.gate_rules import CLEAN, Rules, threat_of
from demur.evaluation.records import worst_case
from demur.metrics.intervals import paired_bounds, paired_p_value

_WRONG = pl.col("outcome") == "wrong"


@dataclass(frozen=True)
class Paired:
    """The images that two audits share, at one threat.

    Parameters
    ----------
    threat : str
        Its key.
    n : int
        Number of images in both.
    gained, lost : int
        Images that only the new, and only the earlier audit has as wrong.
    """

    threat: str
    n: int
    gained: int
    lost: int


def decide_increase(
    paired: Paired, audit: AuditResults, earlier: AuditResults, rules: Rules
) -> Decision:
    """Decide whether the share of wrong answers rose by more than the baseline rule allows.

    Parameters
    ----------
    paired : Paired
    audit, earlier : AuditResults
        Attacks that did not run, and self-tests that did not pass, understate the wrong answers.
        Those of `audit` put a pass in doubt, those of `earlier` a failure.
    rules : Rules
        With a baseline rule.

    Returns
    -------
    Decision
    """
    assert rules.baseline is not None
    limit = rules.baseline.max_increase
    numbers = (paired.gained, paired.lost, paired.n)
    tail = 1 - rules.confidence
    holds = paired_p_value(*numbers, limit, "less") <= tail
    broken = paired_p_value(*numbers, limit, "greater") <= tail
    low, high = paired_bounds(*numbers, rules.confidence)
    doubts, earlier_doubts = [], []
    if paired.threat != CLEAN:
        doubts = doubts_of(audit, rows_of(audit)[paired.threat], rules)
        found = doubts_of(earlier, rows_of(earlier)[paired.threat], rules)
        earlier_doubts = [f"baseline: {one}" for one in found]
    if broken:
        reasons = earlier_doubts
    else:
        undecided = [] if holds else ["the images do not show whether the increase is too large"]
        reasons = [*doubts, *too_few(paired.n, rules), *undecided]
    state: State = "inconclusive" if reasons else "failed" if broken else "passed"
    return Decision(
        INCREASE,
        paired.threat,
        "max",
        limit,
        (paired.gained - paired.lost) / paired.n,
        # The bounds are rounded outwards: they must not contradict the exact decision.
        max(low, limit) if broken else min(low, limit),
        min(high, limit) if holds else max(high, limit),
        paired.n,
        state,
        "; ".join(reasons),
    )


def pair(new: pl.DataFrame, earlier: pl.DataFrame, key: str) -> Paired:
    """Count the images that two audits share, and that only one of them has as wrong.

    Parameters
    ----------
    new, earlier : polars.DataFrame
        Records.
    key : str
        "clean", or a threat as text.

    Returns
    -------
    Paired
        An image is shared if its pixels and its label are the same. An image that an audit has
        twice counts once.
    """
    sides = [
        _allowed(records, key).group_by("image", "label").agg(wrong=_WRONG.any())
        for records in (new, earlier)
    ]
    both = sides[0].join(sides[1], on=["image", "label"], suffix="_earlier")
    gained = int((both["wrong"] & ~both["wrong_earlier"]).sum())
    lost = int((~both["wrong"] & both["wrong_earlier"]).sum())
    return Paired(key, len(both), gained, lost)


def belongs(records: pl.DataFrame, row: ThreatRow) -> bool:
    """Say whether the records give the number of images, and of wrong ones, of a row."""
    worst = worst_case(_allowed(records, row.threat), ())
    wrong = int(worst.select(_WRONG.sum()).item())
    return (len(worst), wrong) == (row.n, counts_of(row)["wrong"])


def _allowed(records: pl.DataFrame, key: str) -> pl.DataFrame:
    """Give the records whose images a threat allows."""
    threat = threat_of(key)
    return records.filter(pl.col("attack").is_null()) if threat is None else within(records, threat)
