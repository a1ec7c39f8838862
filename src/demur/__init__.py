"""demur: image classifiers that may decline to answer, and the truth about them under attack."""

from demur.classifier import REJECT, Classifier, Outcome, black_box, outcomes
from demur.errors import DemurError, DemurWarning

__version__ = "0.1.0"

__all__ = ["REJECT", "Classifier", "DemurError", "DemurWarning", "Outcome", "__version__", "black_box", "outcomes"]
