"""The smoothing paper's conclusion: training that keeps the embeddings of classes apart."""

from demur.studies.smoothing_extensions.plan import SOURCE, TITLE, plan
from demur.studies.smoothing_extensions.profile import Profile

__all__ = ["SOURCE", "TITLE", "Profile", "plan"]
