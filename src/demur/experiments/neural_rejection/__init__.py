"""The rejection paper (Thanthulage 2020): is (deep) neural rejection robust to a defence-aware attacker?"""

from demur.experiments.neural_rejection.experiment import SOURCE, TITLE, carry_out, prepare, work
from demur.experiments.neural_rejection.profile import Profile

__all__ = ["SOURCE", "TITLE", "Profile", "carry_out", "prepare", "work"]
