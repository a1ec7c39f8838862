"""Attacks: plain functions of a classifier, images and labels, all with a goal and a region, all on one driver."""

from demur.attacks import regions
from demur.attacks.apgd import apgd
from demur.attacks.carlini import carlini_l0, carlini_l2, carlini_linf
from demur.attacks.driver import AttackResult, Problem, drive
from demur.attacks.fast_gradient import fg, fgs
from demur.attacks.features import density, likeness
from demur.attacks.frozen import widened
from demur.attacks.goals import NEVER, AnyError, Evade, ForceReject, Goal, Target
from demur.attacks.minimum_norm import ddn, fmn, sigma_zero
from demur.attacks.noise import noise
from demur.attacks.normalized_gradient import normalized_gradient
from demur.attacks.norms import sizes
from demur.attacks.pgd import pgd
from demur.attacks.rounding import round_towards
from demur.attacks.square import square
from demur.attacks.strongest import Strongest, strongest
from demur.attacks.transfer import transfer
from demur.attacks.wrapping import StraightThrough, expectation

__all__ = [
    "NEVER",
    "AnyError",
    "AttackResult",
    "Evade",
    "ForceReject",
    "Goal",
    "Problem",
    "StraightThrough",
    "Strongest",
    "Target",
    "apgd",
    "carlini_l0",
    "carlini_l2",
    "carlini_linf",
    "ddn",
    "density",
    "drive",
    "expectation",
    "fg",
    "fgs",
    "fmn",
    "likeness",
    "noise",
    "normalized_gradient",
    "pgd",
    "regions",
    "round_towards",
    "sigma_zero",
    "sizes",
    "square",
    "strongest",
    "transfer",
    "widened",
]
