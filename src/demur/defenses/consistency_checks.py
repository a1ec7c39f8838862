"""The module inside certified consistency: scores, and how much room there is around an image."""

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from demur.bounds import Graph, Propagation, Region, trace
from demur.bounds.rules import ConsistencyRule
from demur.defenses.margins import next_above
from demur.errors import DemurError

Check = Literal["ibp", "crown-ibp", "pgd", "smoothing"]
"""How the answer is checked within delta. "pgd" proves nothing."""


class GraphCache:
    """Holds the last graph of a network, for exports. Copies, files and hashes leave it out."""

    def __init__(self) -> None:
        self.value: Graph | None = None

    def __deepcopy__(self, memo: object) -> "GraphCache":
        return GraphCache()

    def __reduce__(self) -> tuple[type["GraphCache"], tuple[()]]:
        return GraphCache, ()

    def fingerprint(self) -> str:
        """Give the same text for every value."""
        return "cache"


class Consistent(nn.Module):
    """Maps images to the network's scores (N, K) and a reject score, s_c - m.

    c is the best class, and m is a lower bound of min_k (s_c - s_k) over all images within delta.

    Parameters
    ----------
    network : nn.Module
    num_classes : int
    delta : float
    check : {"ibp", "crown-ibp", "pgd"}
    steps : int
        Of "pgd".
    step_size : float or None
        Of "pgd". None: a tenth of delta.
    """

    def __init__(
        self,
        network: nn.Module,
        num_classes: int,
        delta: float,
        check: Check,
        steps: int,
        step_size: float | None,
    ) -> None:
        super().__init__()
        self.network = network
        self.num_classes = num_classes
        self.delta = delta
        self.check = check
        self.steps = steps
        self.step_size = step_size
        self._graph = GraphCache()

    def reject_rule(self) -> ConsistencyRule:
        """Give the rule of rejection, for certificates."""
        return ConsistencyRule(self.network, self.delta, "linf", self.check)

    def forward(self, images: Tensor) -> Tensor:
        """Compute the scores, and the reject score last."""
        scores, margin = self.room(images, self.delta)
        best = scores.amax(1)
        joint = best - margin
        # Where a large score swallows a small margin below 0, the next number takes its place.
        least = next_above(best.detach())
        lost = (margin < 0) & (joint <= best)
        joint = torch.where(lost, joint + (least - joint.detach()), joint)
        return torch.cat([scores, joint[:, None]], 1)

    def room(self, images: Tensor, delta: float | Tensor) -> tuple[Tensor, Tensor]:
        """Give the scores (N, K), and m (N,), with a delta for all images or for each."""
        if self.check == "pgd":
            return self._attacked(images, delta)
        graph, scores = self._traced(images)
        self._check_scores(scores)
        kind = images.device.type
        with torch.autocast(kind, enabled=False):
            scores = scores.float() if scores.element_size() < 4 else scores
            given = images.to(scores.dtype)
            region = Region.around(given, delta)
            propagation = Propagation(graph, self.network, region)
            propagation.forwards()
            count = self.num_classes
            eye = torch.eye(count, dtype=given.dtype, device=given.device)
            rows = eye[scores.argmax(1)][:, None] - eye
            if self.check == "ibp":
                lower = propagation.lower_by_intervals(graph.output, rows).lower
            else:
                owner = torch.arange(len(given), device=given.device).repeat_interleave(count)
                flat = rows.flatten(0, 1)
                lower = propagation.backwards(graph.output, flat, owner).lower.view(-1, count)
            itself = eye[scores.argmax(1)] > 0
            return scores, lower.masked_fill(itself, torch.inf).amin(1)

    def _traced(self, images: Tensor) -> tuple[Graph, Tensor]:
        if torch.compiler.is_exporting():
            if self._graph.value is None:
                raise DemurError("score some images before an export of certified consistency.")
            scores: Tensor = self.network(images)
            return self._graph.value, scores
        graph, scores = trace(self.network, images)
        parts = self.network.modules()
        if any(one._forward_hooks or one._forward_pre_hooks for one in parts):
            scores = self.network(images)  # for hooks that read values
        if not torch.is_grad_enabled():
            self._graph.value = graph
        return graph, scores

    def _check_scores(self, scores: Tensor) -> None:
        if scores.ndim != 2 or scores.shape[1] != self.num_classes:
            raise DemurError(
                f"the network gave scores of shape {tuple(scores.shape)}; certified consistency of "
                f"{self.num_classes} classes takes a network without a reject column."
            )

    def _attacked(self, images: Tensor, delta: float | Tensor) -> tuple[Tensor, Tensor]:
        """The smallest margin that projected gradient descent finds, from the image itself."""
        scores: Tensor = self.network(images)
        self._check_scores(scores)
        label = scores.detach().argmax(1)
        clean = images.detach()
        region = Region.around(clean, delta)
        width = torch.as_tensor(delta, dtype=clean.dtype, device=clean.device)
        step = width / 10 if self.step_size is None else torch.full_like(width, self.step_size)
        step = step.expand(len(clean)).view(-1, *[1] * (clean.ndim - 1))
        attacked = clean
        with torch.enable_grad():
            for _ in range(self.steps):
                given = attacked.clone().requires_grad_(True)
                loss = -_margin(self.network(given), label).sum()
                (gradient,) = torch.autograd.grad(loss, given)
                moved = attacked + step * gradient.sign()
                attacked = moved.clamp(region.box.lower, region.box.upper).detach()
        # The check itself has no useful gradient: that of the attacked image stands for it (BPDA).
        return scores, _margin(self.network(images + (attacked - clean)), label)


def _margin(scores: Tensor, label: Tensor) -> Tensor:
    """Give s_c minus the best other score, (N,)."""
    own: Any = scores.gather(1, label[:, None]).squeeze(1)
    others = scores.scatter(1, label[:, None], -torch.inf)
    return torch.as_tensor(own - others.amax(1))


def check_delta(delta: object, largest: float = 1.0) -> float:
    """Give delta as a float. Raise DemurError unless it is a number from 0 to the largest."""
    value = float(delta) if isinstance(delta, int | float) else math.nan
    if not (0 <= value <= largest and math.isfinite(value)):
        kind = "a change of pixels in [0, 1]" if largest == 1 else "a length of at least 0"
        raise DemurError(f"delta is {kind}, not {delta!r}.")
    return value
