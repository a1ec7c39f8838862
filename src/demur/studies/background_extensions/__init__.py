"""The background-class paper, section VII: capacity, kinds of background, and grown background."""

from demur.studies.background_extensions.plan import SOURCE, TITLE, plan
from demur.studies.background_extensions.profile import Profile

__all__ = ["SOURCE", "TITLE", "Profile", "plan"]
