"""The order in which an attack tries wanted columns: the nearest boundary first."""

from dataclasses import replace

import torch
from torch import Tensor

from demur.attacks.fast_minimum_norm import DUAL
from demur.attacks.state import AttackState

CANDIDATES = 10
"""Columns whose boundary is estimated, for each target that is sought: those of the highest scores.
"""


def nearest_targets(state: AttackState, count: int) -> Tensor:
    """Order the wanted columns by their distance, if the classifier were linear.

    MALT (Melamed et al. 2024): the distance to the boundary with a column is the lack of margin at
    the clean image, divided by the norm of the margin's gradient. The norm is the dual of that of
    the threat. A mask counts. This costs one gradient for each candidate, and none where there is
    only one.

    Parameters
    ----------
    state : AttackState
    count : int
        Number of targets.

    Returns
    -------
    Tensor of shape (n, at most count), int64
        Columns, the nearest first.
    """
    scores = state.evaluate(state.images).scores
    wanted = state.goal.wanted(scores, state.labels, state.num_classes)
    order = scores.masked_fill(~wanted, -torch.inf).argsort(dim=1, descending=True)
    candidates = order[:, : min(CANDIDATES * count, int(wanted.sum(1).min()))]
    (candidates,) = state.drop_solved(candidates)
    if candidates.shape[1] < 2 or not len(candidates):
        return candidates
    distances = torch.stack([_distance(state, column) for column in candidates.unbind(1)], 1)
    ranks = distances.argsort(dim=1, stable=True)[:, :count]
    return candidates.gather(1, ranks)


def _distance(state: AttackState, column: Tensor) -> Tensor:
    """Estimate how far away the boundary with a column (n,) is: (n,), infinite if unknown."""
    part = state.part()
    part.toward = column
    part.pursuit = replace(state.pursuit, loss="margin")
    seen = part.value_and_gradient(part.images, record=False)
    gradient = seen.gradient if state.ball.mask is None else seen.gradient * state.ball.mask
    slope = gradient.double().flatten(1).norm(p=DUAL[type(state.ball)], dim=1)
    distance = -seen.loss.double() / slope
    return torch.where(slope > 0, distance, torch.inf).nan_to_num(nan=torch.inf)
