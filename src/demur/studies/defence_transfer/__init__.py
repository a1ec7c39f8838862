"""Attacks sent from each defence to every other, and defences nested in pairs."""

from demur.studies.defence_transfer.plan import SOURCE, TITLE, plan
from demur.studies.defence_transfer.profile import Profile

__all__ = ["SOURCE", "TITLE", "Profile", "plan"]
