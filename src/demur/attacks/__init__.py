"""Attacks: plain functions of a classifier, images and labels, all with a goal and a region, all on one driver."""

from demur.attacks import regions
from demur.attacks.driver import AttackResult, Problem, drive
from demur.attacks.fast_gradient import fg, fgs
from demur.attacks.goals import AnyError, Evade, ForceReject, Goal, Target
from demur.attacks.noise import noise
from demur.attacks.norms import sizes
from demur.attacks.rounding import round_towards

__all__ = [
    "AnyError",
    "AttackResult",
    "Evade",
    "ForceReject",
    "Goal",
    "Problem",
    "Target",
    "drive",
    "fg",
    "fgs",
    "noise",
    "regions",
    "round_towards",
    "sizes",
]
