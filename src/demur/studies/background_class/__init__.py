"""The background-class paper (McCoyd & Wagner 2018): a large class "none of the above"."""

from demur.studies.background_class.plan import SOURCE, TITLE, plan
from demur.studies.background_class.profile import Profile

__all__ = ["SOURCE", "TITLE", "Profile", "plan"]
