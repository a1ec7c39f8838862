"""Decisions on scores, and the three outcomes of a decision."""

from enum import IntEnum
from typing import Final

import torch
from torch import Tensor

REJECT: Final = -1
"""The prediction for a rejected image."""


class Outcome(IntEnum):
    """What became of an image: correct, rejected, or wrong (answered wrongly and accepted)."""

    CORRECT = 0
    REJECTED = 1
    WRONG = 2


def decide(scores: Tensor, num_classes: int) -> Tensor:
    """Take the argmax of scores (N, num_classes [+ 1]); column `num_classes` becomes REJECT."""
    columns = scores.argmax(dim=1)
    return torch.where(columns == num_classes, REJECT, columns)


def outcomes_of(predictions: Tensor, labels: Tensor) -> Tensor:
    """Find the outcome of each prediction (N,), given its label (N,)."""
    labels = labels.to(predictions.device)
    answered = torch.where(predictions == labels, int(Outcome.CORRECT), int(Outcome.WRONG))
    return torch.where(predictions == REJECT, int(Outcome.REJECTED), answered)
