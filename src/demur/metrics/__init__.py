"""Metrics: counts of outcomes, intervals, and figures for classifiers that reject."""

from demur.metrics.accumulated import OutcomeCurve, OutcomeShares, RejectionFigures, Share
from demur.metrics.intervals import (
    clopper_pearson,
    paired_bounds,
    paired_p_value,
    wilson_interval,
)
from demur.metrics.multiple import holm
from demur.metrics.outcomes import Rates, Spread, rates, spread
from demur.metrics.selective import aurc, risk_coverage

__all__ = [
    "OutcomeCurve",
    "OutcomeShares",
    "Rates",
    "RejectionFigures",
    "Share",
    "Spread",
    "aurc",
    "clopper_pearson",
    "holm",
    "paired_bounds",
    "paired_p_value",
    "rates",
    "risk_coverage",
    "spread",
    "wilson_interval",
]
