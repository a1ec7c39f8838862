"""Jézéquel 2019: does a filter at training and at use protect a network, and against which attacker?"""

from demur.experiments.smoothing.experiment import SOURCE, TITLE, carry_out, prepare, work
from demur.experiments.smoothing.profile import Profile

__all__ = ["SOURCE", "TITLE", "Profile", "carry_out", "prepare", "work"]
