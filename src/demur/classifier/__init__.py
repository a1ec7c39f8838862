"""Classifiers: scores of images, decisions, and the three outcomes of a decision."""

from demur.classifier.base import Classifier, black_box, check_classifier, outcomes
from demur.classifier.checks import check_counts, check_images, check_labels
from demur.classifier.decisions import REJECT, Outcome, decide, outcomes_of
from demur.classifier.guard import is_out_of_memory, raising_module_errors
from demur.classifier.modes import device_of, evaluating, modes_kept
from demur.classifier.preprocess import Preprocess
from demur.classifier.provenance import Provenance

__all__ = [
    "REJECT",
    "Classifier",
    "Outcome",
    "Preprocess",
    "Provenance",
    "black_box",
    "check_classifier",
    "check_counts",
    "check_images",
    "check_labels",
    "decide",
    "device_of",
    "evaluating",
    "is_out_of_memory",
    "modes_kept",
    "outcomes",
    "outcomes_of",
    "raising_module_errors",
]
