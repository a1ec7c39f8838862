"""Measuring: three outcomes for every image, figures with their uncertainty, and a ledger that remembers each cell."""

from demur.evaluation.curves import SecurityCurve, offset_for, security_curve, shifted
from demur.evaluation.ledger import Cell, Ledger
from demur.evaluation.metrics import Rates, Spread, rates, spread, wilson_interval

__all__ = [
    "Cell",
    "Ledger",
    "Rates",
    "SecurityCurve",
    "Spread",
    "offset_for",
    "rates",
    "security_curve",
    "shifted",
    "spread",
    "wilson_interval",
]
