"""Bounds whose lines are optimised (alpha-CROWN), and branching on the signs of rectifiers.

Each slope in [0, 1] gives a sound lower line of an undecided rectifier. So gradient steps on the
bound find the best slopes (Xu et al. 2021, "Fast and complete"). Where this is not enough, a
rectifier is split: its input is at most 0, or at least 0. In both parts it is linear, and a
multiplier brings the known sign into the bound (Wang et al. 2021, "Beta-CROWN"). Bounds above 0 in
all parts prove the whole.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from demur.bounds.curved import LEAST, Rectifier, Relaxation
from demur.bounds.held import Interval
from demur.bounds.propagation import Bounded, Propagation

Signs = Mapping[int, Tensor]
"""For each rectifier, (R, *node) int8: the known sign of each input, or 0."""

STEPS = 20
"""Gradient steps on the slopes of a row."""
STEPS_OF_PART = 10
"""Gradient steps in each part, which starts from the slopes of its row."""
RATE = 0.1
"""Learning rate of Adam, for slopes and multipliers. It falls by 2 % in each step."""
ROWS = 128
"""Rows that are optimised at a time, at most; see `at_once`."""
VALUES = 1 << 21
"""Values of nodes that are optimised at a time, in all rows. Each needs about 20 numbers."""
GAP = 1e-6
"""A part is empty if a lower bound in it is above the upper one by more than this."""


def rectifiers(propagation: Propagation, place: int) -> dict[int, int]:
    """Give the rectifiers up to a node, each with the node that it reads."""
    nodes = propagation.graph.nodes[: place + 1]
    found = {number: node.inputs for number, node in enumerate(nodes)}
    return {n: one[0] for n, one in found.items() if isinstance(nodes[n].operation, Rectifier)}


def at_once(propagation: Propagation) -> int:
    """Give the rows that are optimised at a time: fewer for large networks."""
    values = sum(torch.Size(node.shape).numel() for node in propagation.graph.nodes)
    return min(ROWS, max(1, VALUES // max(1, values)))


def optimised(
    propagation: Propagation,
    place: int,
    rows: Tensor,
    steps: int = STEPS,
    start: Mapping[int, Tensor] | None = None,
    signs: Signs | None = None,
) -> tuple[Bounded, Relaxation]:
    """Bound rows @ node from below with the best slopes that gradient steps find.

    Parameters
    ----------
    propagation : Propagation
        With intervals; its image i belongs to row i.
    place : int
        The node.
    rows : Tensor of shape (R, *node)
    steps : int
        Gradient steps, at most: they end where all bounds are above 0.
    start : mapping of int to Tensor, optional
        Slopes of each rectifier to start from. Default: those of CROWN.
    signs : mapping of int to Tensor, optional
        Known signs of inputs of rectifiers. The intervals must have them too.

    Returns
    -------
    bounded : Bounded
        The best bound of each row, (R,).
    relaxation : Relaxation
        Of these bounds, with the coefficients of the last pass.
    """
    sources = rectifiers(propagation, place)
    slopes = _slopes(propagation, sources, rows) if start is None else dict(start)
    slopes = {number: one.clone().requires_grad_() for number, one in slopes.items()}
    given = signs or {}
    factors = {n: torch.zeros_like(slopes[n]).detach().requires_grad_() for n in given}
    leaves = [*slopes.values(), *factors.values()]
    owner = torch.arange(len(rows), device=rows.device)
    if not leaves or not len(rows):
        relaxation = Relaxation({})
        return propagation.backwards(place, rows, owner, relaxation), relaxation
    optimizer = torch.optim.Adam(leaves, lr=RATE)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.98)
    best, kept = None, {number: one.detach().clone() for number, one in slopes.items()}
    for step in range(steps + 1):
        with torch.enable_grad():
            signed = {number: given[number] * factors[number] for number in given}
            relaxation = Relaxation(slopes, signed)
            found = propagation.backwards(place, rows, owner, relaxation)
        lower, slack = found.lower.detach(), found.slack.detach()
        better = torch.ones_like(lower, dtype=torch.bool) if best is None else lower > best.lower
        best = _best(best, Bounded(lower, slack), better)
        for number, one in slopes.items():
            chosen = better.view(-1, *[1] * (one.ndim - 1))
            kept[number] = torch.where(chosen, one.detach(), kept[number])
        if step == steps or bool((best.lower > 0).all()) or not found.lower.requires_grad:
            break
        # Only these leaves: the weights of the model must not get a gradient.
        down = -torch.ones_like(lower)
        gradients = torch.autograd.grad(found.lower, leaves, down, allow_unused=True)
        for leaf, gradient in zip(leaves, gradients, strict=True):
            leaf.grad = gradient
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            for one in slopes.values():
                one.clamp_(0, 1)
            for one in factors.values():
                one.clamp_(min=0)
    assert best is not None
    return best, Relaxation(kept, {}, relaxation.seen)


def _best(one: Bounded | None, other: Bounded, better: Tensor) -> Bounded:
    if one is None:
        return other
    pairs = zip(other, one, strict=True)
    return Bounded(*(torch.where(better, new, old) for new, old in pairs))


def _slopes(
    propagation: Propagation, sources: Mapping[int, int], rows: Tensor
) -> dict[int, Tensor]:
    """Give the slopes of CROWN: those of the smaller area."""
    found = {}
    for number, source in sources.items():
        low, high = propagation.intervals[source]
        steep = (high > -low).to(rows.dtype)
        found[number] = steep.expand(len(rows), *steep.shape[1:])
    return found


@dataclass
class Parts:
    """Parts of regions that are not proven yet.

    Attributes
    ----------
    owner : Tensor of shape (D,), int64
        The row of each part.
    lower : Tensor of shape (D,)
        Its bound.
    signs : dict of int to Tensor of shape (D, *node), int8
    choice : Tensor of shape (D,), int64
        The rectifier that is split next, counted through all of them; -1: none is left.
    """

    owner: Tensor
    lower: Tensor
    signs: dict[int, Tensor]
    choice: Tensor

    def select(self, index: Tensor) -> "Parts":
        """Give the parts at `index`."""
        signs = {number: one[index] for number, one in self.signs.items()}
        return Parts(self.owner[index], self.lower[index], signs, self.choice[index])

    def join(self, other: "Parts") -> "Parts":
        """Append other parts."""
        signs = {
            number: torch.cat([one, other.signs[number]]) for number, one in self.signs.items()
        }
        pairs = ((self.owner, other.owner), (self.lower, other.lower), (self.choice, other.choice))
        owner, lower, choice = (torch.cat(pair) for pair in pairs)
        return Parts(owner, lower, signs, choice)


def branched(propagation: Propagation, place: int, rows: Tensor, splits: int) -> Tensor:
    """Bound rows @ node from below with optimised slopes, and by splits where they are not enough.

    Parameters
    ----------
    propagation : Propagation
        With intervals; its image i belongs to row i.
    place : int
    rows : Tensor of shape (R, *node)
    splits : int
        Of each row, at most.

    Returns
    -------
    Tensor of shape (R,)
        The smallest bound of the parts where all are above 0, and else that of the whole.
    """
    sources = rectifiers(propagation, place)
    whole, relaxation = optimised(propagation, place, rows)
    signs = {n: torch.zeros_like(one, dtype=torch.int8) for n, one in relaxation.slopes.items()}
    owner = torch.arange(len(rows), device=rows.device)
    parts = Parts(owner, whole.lower, signs, _choice(propagation, sources, relaxation))
    lost = torch.zeros_like(owner, dtype=torch.bool)
    least = torch.full_like(whole.lower, torch.inf)
    used = torch.zeros_like(owner)
    step = max(1, at_once(propagation) // 2)
    while True:
        proven = parts.lower > 0
        least = least.scatter_reduce(0, parts.owner[proven], parts.lower[proven], "amin")
        parts = parts.select(~proven)
        # Each open part needs one split at least.
        needed = used + torch.bincount(parts.owner, minlength=len(rows))
        lost[parts.owner[(parts.choice < 0) | (needed[parts.owner] > splits)]] = True
        parts = parts.select(~lost[parts.owner])
        if not len(parts.owner):
            break
        some = torch.arange(min(len(parts.owner), step), device=rows.device)
        rest = parts.select(torch.arange(len(some), len(parts.owner), device=rows.device))
        used.scatter_add_(0, parts.owner[some], torch.ones_like(some))
        halves = _split(parts.select(some))
        parts = rest.join(_bounded(propagation, place, rows, sources, relaxation.slopes, halves))
    return torch.where(lost, whole.lower, torch.maximum(least, whole.lower))


def _split(parts: Parts) -> Parts:
    """Give both halves of each part."""
    both = {}
    start = 0
    for number, one in parts.signs.items():
        size = one[0].numel()
        here = (parts.choice >= start) & (parts.choice < start + size)
        place = (parts.choice - start).clamp(0, size - 1)[:, None]
        halves = []
        for sign in (1, -1):
            flat = one.flatten(1)
            value = torch.where(here[:, None], sign, flat.gather(1, place)).to(torch.int8)
            halves.append(flat.scatter(1, place, value).view_as(one))
        both[number] = torch.cat(halves)
        start += size
    return Parts(parts.owner.repeat(2), parts.lower.repeat(2), both, parts.choice.repeat(2))


def _bounded(
    propagation: Propagation,
    place: int,
    rows: Tensor,
    sources: Mapping[int, int],
    slopes: Mapping[int, Tensor],
    parts: Parts,
) -> Parts:
    """Bound each part, and choose where it is split next."""
    inside = propagation.select(parts.owner)
    empty = _restrict(inside, sources, parts.signs)
    start = {number: one[parts.owner] for number, one in slopes.items()}
    given = rows[parts.owner]
    found, relaxation = optimised(inside, place, given, STEPS_OF_PART, start, parts.signs)
    lower = torch.maximum(found.lower, parts.lower).masked_fill(empty, torch.inf)
    return Parts(parts.owner, lower, parts.signs, _choice(inside, sources, relaxation))


def _restrict(propagation: Propagation, sources: Mapping[int, int], signs: Signs) -> Tensor:
    """Bring known signs into the intervals, and into those of the nodes behind.

    Returns
    -------
    Tensor of shape (D,), bool
        The parts that contain no image.
    """
    before = propagation.intervals
    empty = torch.zeros(len(propagation.like), dtype=torch.bool, device=propagation.like.device)
    propagation.intervals = []
    for place, node in enumerate(propagation.graph.nodes):
        found = propagation.interval(node, place).intersect(before[place])
        for sign in (signs[number] for number, source in sources.items() if source == place):
            low = torch.where(sign > 0, found.lower.clamp(min=0), found.lower)
            high = torch.where(sign < 0, found.upper.clamp(max=0), found.upper)
            empty |= (low - high > GAP).flatten(1).any(1)
            found = Interval(low, torch.maximum(low, high))
        propagation.intervals.append(found)
    return empty


def _choice(propagation: Propagation, sources: Mapping[int, int], relaxation: Relaxation) -> Tensor:
    """Choose the undecided rectifier whose triangle, times its coefficient, is the highest."""
    found = []
    for number, source in sources.items():
        rows = relaxation.seen.get(number)
        if rows is None:  # the scores do not depend on it
            rows = torch.zeros_like(relaxation.slopes[number])
        low, high = propagation.intervals[source]
        undecided = (low < 0) & (high > 0)
        height = torch.where(undecided, -low * high / (high - low).clamp(min=LEAST), 0.0)
        found.append((rows.abs() * height).flatten(1))
    if not found:
        return torch.full((len(propagation.like),), -1, device=propagation.like.device)
    most, choice = torch.cat(found, 1).max(1)
    return torch.where(most > 0, choice, -1)
