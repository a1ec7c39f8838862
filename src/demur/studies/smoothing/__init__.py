"""Jézéquel 2019: does a filter at training and at use protect a network, and against whom?"""

from demur.studies.smoothing.plan import SOURCE, TITLE, plan
from demur.studies.smoothing.profile import Profile

__all__ = ["SOURCE", "TITLE", "Profile", "plan"]
