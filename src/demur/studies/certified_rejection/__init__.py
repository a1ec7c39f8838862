"""Certified rejection: what is proven and what is not broken, for the same images and threats."""

from demur.studies.certified_rejection.plan import SOURCE, TITLE, plan
from demur.studies.certified_rejection.profile import Profile

__all__ = ["SOURCE", "TITLE", "Profile", "plan"]
