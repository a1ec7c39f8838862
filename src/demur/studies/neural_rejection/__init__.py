"""The rejection paper (Thanthulage 2020): is rejection robust to a defence-aware attacker?"""

from demur.studies.neural_rejection.plan import SOURCE, TITLE, plan
from demur.studies.neural_rejection.profile import Profile

__all__ = ["SOURCE", "TITLE", "Profile", "plan"]
