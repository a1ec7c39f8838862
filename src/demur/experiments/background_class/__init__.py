"""The background-class paper (McCoyd & Wagner 2018): does a large "none of the above" class help to detect attacks?"""

from demur.experiments.background_class.experiment import SOURCE, TITLE, carry_out, prepare, work
from demur.experiments.background_class.profile import Profile

__all__ = ["SOURCE", "TITLE", "Profile", "carry_out", "prepare", "work"]
