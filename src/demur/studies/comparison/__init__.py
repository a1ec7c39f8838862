"""The defences of all four papers on the same images, and one defence that combines them."""

from demur.studies.comparison.plan import SOURCE, TITLE, Profile, plan

__all__ = ["SOURCE", "TITLE", "Profile", "plan"]
