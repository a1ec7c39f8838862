"""Rothberg et al. 2019: attacks that leave the object alone, and training against them."""

from demur.experiments.localized_training.experiment import SOURCE, TITLE, carry_out, prepare, work
from demur.experiments.localized_training.profile import Profile

__all__ = ["SOURCE", "TITLE", "Profile", "carry_out", "prepare", "work"]
