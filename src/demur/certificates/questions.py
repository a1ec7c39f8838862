"""What must be proven for a goal: score differences that stay above 0."""

from dataclasses import dataclass

import torch
from torch import Tensor

from demur.goals import AnyError, Evade, ForceReject, Goal, Target

ETAS = 11
"""Steps of the grid between the true class and the reject column."""


@dataclass(frozen=True)
class Question:
    """Lower bounds of `rows @ scores` answer it: for each wanted column, one of several rows must
    stay above 0.

    Attributes
    ----------
    rows : Tensor of shape (N, W, M, columns)
        W wanted columns, M combinations of the other columns, minus the wanted one.
    """

    rows: Tensor

    def margin(self, lower: Tensor) -> Tensor:
        """Combine lower bounds (N, W * M) to one margin (N,): the goal is out of reach above 0."""
        count, wanted, options = self.rows.shape[:3]
        return lower.view(count, wanted, options).amax(2).amin(1)


def question(goal: Goal, labels: Tensor, num_classes: int, columns: int) -> Question:
    """Make the question of a goal.

    Parameters
    ----------
    goal : Goal
    labels : Tensor of shape (N,), int64
    num_classes : int
    columns : int
        `num_classes`, or one more with a reject column.

    Notes
    -----
    With a reject column r, a wrong class k is accepted nowhere if (1 - eta) s_y + eta s_r > s_k for
    one eta in [0, 1] (Sheikholeslami et al. 2021, theorems 1 and 2). Any eta is sound.
    """
    count = len(labels)
    eye = torch.eye(columns, dtype=torch.float64, device=labels.device)
    true = eye[labels][:, None]
    rejects = columns > num_classes
    if isinstance(goal, Evade):
        wanted = _others(labels, num_classes)
        options = true
        if rejects:
            eta = torch.linspace(0, 1, ETAS, dtype=torch.float64, device=labels.device)
            options = (1 - eta)[None, :, None] * true + eta[None, :, None] * eye[-1]
    elif isinstance(goal, AnyError):
        wanted = _others(labels, columns)
        options = true
    elif isinstance(goal, ForceReject):
        wanted = torch.full((count, 1), num_classes, device=labels.device)
        options = eye[:num_classes].expand(count, -1, -1)
    elif isinstance(goal, Target):
        classes = torch.as_tensor(goal.classes, device=labels.device).expand(count)
        wanted = classes[:, None]
        options = eye[_others(classes, columns)]
        if rejects:
            eta = torch.linspace(0.1, 0.9, ETAS - 2, dtype=torch.float64, device=labels.device)
            mixed = (1 - eta)[None, :, None] * true + eta[None, :, None] * eye[-1]
            options = torch.cat([options, mixed], 1)
    else:
        raise TypeError(f"no certificate for the goal {goal!r}")
    return Question(options[:, None] - eye[wanted][:, :, None])


def _others(columns: Tensor, count: int) -> Tensor:
    """Give all columns except one, (N, count - 1)."""
    rest = torch.arange(count - 1, device=columns.device).expand(len(columns), -1)
    return rest + (rest >= columns[:, None])
