"""Figures for classifiers that reject, with one value for each image. All shares are in [0, 1].

An image is accepted if its confidence is at least a threshold. For a classifier with a reject
column, `confidences` gives the margin between the best class score and the reject score.
Thresholds are set on clean validation images alone.

The attacker must know the threshold at which the attacked images are judged. An attack that stops
at its first success ends just above its own threshold, so any higher threshold rejects its images.
Where one attack is judged at many thresholds (`auroc`), it must go on to the largest loss.
"""

from demur.metrics.rejection.detection import (
    accepted_accuracy,
    accuracy_or_rejection,
    auroc,
    false_positive_rate,
    robust_error,
    tpr_at_fpr,
)
from demur.metrics.rejection.distance import (
    error_with_rejection,
    implied_robust_accuracy,
    ramp_loss,
    step_loss,
    total_robust_loss,
)
from demur.metrics.rejection.thresholds import (
    acceptance_threshold,
    confidences,
    quantile_threshold,
)

__all__ = [
    "acceptance_threshold",
    "accepted_accuracy",
    "accuracy_or_rejection",
    "auroc",
    "confidences",
    "error_with_rejection",
    "false_positive_rate",
    "implied_robust_accuracy",
    "quantile_threshold",
    "ramp_loss",
    "robust_error",
    "step_loss",
    "total_robust_loss",
    "tpr_at_fpr",
]
