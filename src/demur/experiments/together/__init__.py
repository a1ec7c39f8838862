"""All four papers' defences on the same images, against the same attackers, and one that combines them."""

from demur.experiments.together.experiment import SOURCE, TITLE, carry_out, prepare, work
from demur.experiments.together.profile import Profile

__all__ = ["SOURCE", "TITLE", "Profile", "carry_out", "prepare", "work"]
