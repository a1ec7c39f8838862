"""Evaluation: plans of nodes, their records and tables, the store of results, security curves."""

from demur.evaluation.curves import SecurityCurve, offset_for, security_curve, shifted
from demur.evaluation.store import NodeResult, Store

__all__ = ["NodeResult", "SecurityCurve", "Store", "offset_for", "security_curve", "shifted"]
