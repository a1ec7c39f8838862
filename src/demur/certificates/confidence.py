"""What a rejection by a confidence threshold adds to the bounds of score differences."""

import torch
from torch import Tensor

from demur.bounds.rules import ConfidenceRule
from demur.goals import AnyError, Evade, Goal, Target

MOST = 32
"""With more classes, only differences with the true class are bounded."""


def confidence_rows(labels: Tensor, num_classes: int) -> Tensor:
    """Give the rows whose lower bounds `confidence_margin` takes.

    Returns
    -------
    Tensor of shape (N, P, K)
        All differences s_j - s_k, in the order of j, then all s_k, then all -s_k. With more than 32
        classes, only the differences with the true class.
    """
    eye = torch.eye(num_classes, dtype=torch.float64, device=labels.device)
    if num_classes <= MOST:
        pairs = (eye[:, None] - eye[None, :]).flatten(0, 1).expand(len(labels), -1, -1)
    else:
        true = eye[labels][:, None]
        pairs = torch.cat([true - eye, eye - true], 1)
    singles = torch.cat([eye, -eye]).expand(len(labels), -1, -1)
    return torch.cat([pairs, singles], 1)


def confidence_margin(
    lower: Tensor, labels: Tensor, num_classes: int, rule: ConfidenceRule, goal: Goal
) -> Tensor:
    """Combine lower bounds (N, P) of `confidence_rows` to one margin (N,).

    Above 0, the goal is out of reach.

    Notes
    -----
    A class k is accepted only if it has the largest score and its confidence is at least the limit.
    With L_jk a lower bound of s_j - s_k, the confidence of k is at most -max_j L_jk ("margin"),
    -logsumexp_j L_jk ("max-prob"), or, where k is the best class, its upper bound plus
    log(1 + sum_j exp(min(0, -L_kj))) ("energy").
    """
    pairs, least, most = _tables(lower, labels, num_classes)
    never = torch.eye(num_classes, dtype=torch.bool, device=lower.device)
    above = pairs.masked_fill(never, -torch.inf)  # (N, j, k): s_j - s_k
    if isinstance(goal, Evade | Target):
        best = above.amax(1)
        margin = torch.maximum(best, rule.limit - _most(above, most, rule.kind))
        wanted = torch.ones_like(margin, dtype=torch.bool)
        wanted = wanted.scatter(1, labels[:, None], False)
        if isinstance(goal, Target):
            classes = torch.as_tensor(goal.classes, device=labels.device).expand(len(labels))
            wanted = torch.zeros_like(wanted).scatter(1, classes[:, None], True)
        return margin.masked_fill(~wanted, torch.inf).amin(1)
    confidence = _least(above, least, rule.kind) - rule.limit
    if not isinstance(goal, AnyError):
        return confidence.amax(1)
    rows = labels[:, None]
    first = above.masked_fill(never, torch.inf).amin(2).gather(1, rows)
    return torch.minimum(first, confidence.gather(1, rows)).squeeze(1)


def _tables(lower: Tensor, labels: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Give lower bounds of differences (N, K, K), and lower and upper bounds of scores (N, K)."""
    least, most = lower[:, -2 * count : -count], -lower[:, -count:]
    if count <= MOST:
        return lower[:, : count * count].view(-1, count, count), least, most
    pairs = torch.full((len(lower), count, count), -torch.inf, dtype=lower.dtype)
    pairs = pairs.to(lower.device)
    place = labels[:, None, None]
    pairs = pairs.scatter(1, place.expand(-1, 1, count), lower[:, None, :count])
    back = lower[:, count : 2 * count, None]
    return pairs.scatter(2, place.expand(-1, count, 1), back), least, most


def _most(above: Tensor, most: Tensor, kind: str) -> Tensor:
    """Bound the confidence of each class from above, where it is the best class."""
    if kind == "margin":
        return -above.amax(1)
    if kind == "max-prob":
        return -above.logsumexp(1)
    # s_j - s_k is at most -L_kj, and at most 0.
    below = (-above).clamp(max=0).masked_fill(above == -torch.inf, 0.0)
    same = torch.eye(above.shape[1], dtype=torch.bool, device=above.device)
    others = below.masked_fill(same, -torch.inf).logsumexp(2)
    return most + _log_one_plus(others)


def _least(above: Tensor, least: Tensor, kind: str) -> Tensor:
    """Bound the confidence that a class gives the answer from below, (N, K)."""
    if kind == "energy":
        return least.logsumexp(1, keepdim=True).expand_as(least)
    same = torch.eye(above.shape[1], dtype=torch.bool, device=above.device)
    over = above.masked_fill(same, torch.inf)  # s_j - s_k of the class j
    if kind == "margin":
        return over.amin(2)
    return -(-over).logsumexp(2)


def _log_one_plus(values: Tensor) -> Tensor:
    """log(1 + e^x), without rounding to x."""
    return torch.logaddexp(values, torch.zeros_like(values))
