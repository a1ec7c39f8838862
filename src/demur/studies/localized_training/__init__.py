"""Rothberg et al. 2019: attacks that leave the object alone, and training against them."""

from demur.studies.localized_training.plan import SOURCE, TITLE, plan
from demur.studies.localized_training.profile import Profile

__all__ = ["SOURCE", "TITLE", "Profile", "plan"]
