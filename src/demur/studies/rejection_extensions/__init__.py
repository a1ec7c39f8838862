"""The rejection paper's conclusion: density in the attack, a generator, and other machines."""

from demur.studies.rejection_extensions.plan import SOURCE, TITLE, plan
from demur.studies.rejection_extensions.profile import Profile

__all__ = ["SOURCE", "TITLE", "Profile", "plan"]
