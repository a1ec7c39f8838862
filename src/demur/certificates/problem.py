"""A classifier, its graph and its rule of rejection: what the methods bound."""

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from demur.bounds import Propagation, Region, UnsupportedLayerError, trace
from demur.bounds.optimised import at_once, branched, optimised
from demur.bounds.propagation import Bounded
from demur.bounds.rules import (
    ConfidenceRule,
    ConsistencyRule,
    Decision,
    RejectRule,
    StricterRule,
)
from demur.bounds.tracing import Graph
from demur.certificates.confidence import confidence_margin, confidence_rows
from demur.certificates.questions import question
from demur.classifier import Classifier, evaluating
from demur.goals import AnyError, ForceReject
from demur.threat import ThreatModel

Method = Literal["ibp", "crown-ibp", "crown", "alpha-crown", "branching"]
ALL_METHODS: tuple[Method, ...] = get_args(Method)
"""The deterministic methods, from the fastest to the slowest."""
METHODS = ALL_METHODS[:3]
"""Those without gradient steps: the default."""
SPLITS = 100
"""The default of `splits`."""

VALUES = 1 << 25
"""Intervals that are held at a time: 16 bytes each."""

SLOPES: tuple[Literal["adaptive", "flat", "steep"], ...] = ("adaptive", "flat", "steep")


@dataclass(frozen=True, eq=False)
class Problem:
    """What must be bounded to certify a classifier.

    Parameters
    ----------
    classifier : Classifier
    graph : Graph
    scores : int
        The node of the scores of the network under the rule.
    rule : RejectRule or None
        None: the scores decide, with or without a reject column.
    stricter : bool
        Whether more may be rejected than the rule rejects.
    splits : int
        Of a score difference, by the method "branching".
    """

    classifier: Classifier
    graph: Graph
    scores: int
    rule: RejectRule | None
    stricter: bool
    splits: int = SPLITS

    @classmethod
    def of(cls, classifier: Classifier, images: Tensor, splits: int = SPLITS) -> "Problem":
        """Trace a classifier on a few images, in evaluation mode and float32.

        Raises
        ------
        UnsupportedLayerError
            If a layer has no bounds, or the network draws random numbers.
        """
        device = images.device.type
        with evaluating(classifier), torch.no_grad(), torch.autocast(device, enabled=False):
            graph, first = trace(classifier, images)
            again, second = trace(classifier, images)
        if not (torch.equal(first, second) and _same_constants(graph, again)):
            raise UnsupportedLayerError("the model itself", "a random draw at prediction")
        place = graph.output
        stricter = False
        rule: RejectRule | None = None
        while isinstance(operation := graph.nodes[place].operation, Decision):
            rule = operation.rule
            place = graph.nodes[place].inputs[0]
            if not isinstance(rule, StricterRule):
                at_images = operation.given == 0
                if isinstance(rule, ConsistencyRule) and not at_images:
                    # Its balls are not balls of images: only more rejections are known.
                    rule, stricter = None, True
                break
            rule, stricter = None, True
        return cls(classifier, graph, place, rule, stricter, splits)

    @property
    def columns(self) -> int:
        """Columns of the scores under the rule."""
        return self.graph.nodes[self.scores].shape[0]

    @property
    def at_once(self) -> int:
        """Images whose intervals fit into the memory that is meant for them."""
        values = sum(torch.Size(node.shape).numel() for node in self.graph.nodes)
        return max(1, VALUES // max(1, values))

    def margin(self, images: Tensor, labels: Tensor, threat: ThreatModel, method: Method) -> Tensor:
        """Bound what must be above 0 for a proof, (N,) float64.

        Parameters
        ----------
        images : Tensor of shape (N, ...), in [0, 1]
        labels : Tensor of shape (N,), int64
        threat : ThreatModel
            Of these images.
        method : one of ALL_METHODS
        """
        goal = threat.goal
        rule = self.rule
        hidden = isinstance(goal, AnyError | ForceReject)
        if self.stricter and hidden:
            return torch.full((len(images),), -torch.inf, dtype=torch.float64)
        less = 0.0
        if isinstance(rule, ConsistencyRule):
            if hidden:
                return self._never_rejected(images, labels, threat, rule, method)
            less = proven_within(rule, threat, images)
        propagation = self._propagation(images, threat, method, less)
        classes = self.classifier.num_classes
        if isinstance(rule, ConfidenceRule):
            rows = confidence_rows(labels, classes)
            lower = self._lower(propagation, rows, method).lower
            return confidence_margin(lower, labels, classes, rule, goal)
        asked = question(goal, labels, classes, self.columns)
        rows = asked.rows.flatten(1, 2)
        lower = self._lower(propagation, rows, method, asked.rows.shape[2]).lower
        return asked.margin(lower)

    def _never_rejected(
        self,
        images: Tensor,
        labels: Tensor,
        threat: ThreatModel,
        rule: ConsistencyRule,
        method: Method,
    ) -> Tensor:
        """Certified consistency accepts everywhere, if its check passes at eps + delta.

        Intervals only: they widen with the box, so that the check of each image is contained. The
        check rounds as we do: its slack counts twice.
        """
        nothing = torch.full((len(images),), -torch.inf, dtype=torch.float64)
        if method != "ibp" or rule.check != "ibp":
            return nothing
        propagation = self._propagation(images, threat, method, -rule.delta)
        asked = question(AnyError(), labels, self.columns, self.columns)
        if isinstance(threat.goal, AnyError):
            found = self._lower(propagation, asked.rows.flatten(1, 2), method)
            return asked.margin(found.lower - found.slack)
        margin = nothing
        for column in range(self.columns):
            each = question(AnyError(), torch.full_like(labels, column), self.columns, self.columns)
            found = self._lower(propagation, each.rows.flatten(1, 2), method)
            margin = torch.maximum(margin.to(found.lower), each.margin(found.lower - found.slack))
        return margin

    def _propagation(
        self, images: Tensor, threat: ThreatModel, method: Method, less: float
    ) -> Propagation:
        assert threat.eps is not None
        norm: Any = threat.norm
        if less < 0:
            norm = "linf"  # the box around the Euclidean ball, wider by delta everywhere
        region = Region.around(images.double(), threat.eps, norm, threat.mask, less)
        propagation = Propagation(self.graph, self.classifier, region)
        propagation.forwards(tighten=method not in ("ibp", "crown-ibp"))
        return propagation

    def _lower(
        self, propagation: Propagation, rows: Tensor, method: Method, options: int | None = None
    ) -> Bounded:
        """Bound rows (N, P, columns) @ scores from below, (N, P).

        Of each group of `options` rows, one that is above 0 is enough: linear functions are left
        out for groups that have one. Slopes are optimised for the best row of each other group.
        """
        best = propagation.lower_by_intervals(self.scores, rows)
        if method == "ibp":
            return best
        count, each = rows.shape[:2]
        flat = rows.flatten(0, 1)
        owner = torch.arange(count, device=rows.device).repeat_interleave(each)
        lower, slack = (one.flatten().clone() for one in best)
        wanted = torch.arange(len(flat), device=rows.device)
        for slope in SLOPES:
            if options is not None:
                open_ = lower.view(-1, options).amax(1) <= 0
                wanted = open_.repeat_interleave(options).nonzero().flatten()
            if not len(wanted):
                break
            found = propagation.backwards(self.scores, flat[wanted], owner[wanted], slope)
            better = found.lower > lower[wanted]
            lower[wanted] = torch.where(better, found.lower, lower[wanted])
            slack[wanted] = torch.where(better, found.slack, slack[wanted])
        if method in ("alpha-crown", "branching"):
            # Without groups, bounds above 0 are not the aim: there is no end to splits.
            splits = self.splits if method == "branching" and options is not None else 0
            # A class against itself has the bound 0 in them.
            groups = lower.view(-1, options or 1).masked_fill(
                ~flat.any(1).view(-1, options or 1), torch.inf
            )
            first = torch.arange(len(groups), device=rows.device) * groups.shape[1]
            chosen = (first + groups.argmax(1))[groups.amax(1) <= 0]
            given = flat[chosen], owner[chosen]
            better = self._optimised(propagation, *given)
            if splits:
                better = self._branched(propagation, *given, better)
            lower[chosen] = torch.maximum(lower[chosen], better)
        return Bounded(lower.view(count, each), slack.view(count, each))

    def _optimised(self, propagation: Propagation, rows: Tensor, owner: Tensor) -> Tensor:
        """Bound rows (R, columns) @ scores with optimised slopes."""
        found = torch.empty(len(rows), dtype=rows.dtype, device=rows.device)
        every = torch.arange(len(rows), device=rows.device)
        for some in torch.split(every, at_once(propagation)):
            given = propagation.select(owner[some])
            found[some] = optimised(given, self.scores, rows[some])[0].lower
        return found

    def _branched(
        self, propagation: Propagation, rows: Tensor, owner: Tensor, lower: Tensor
    ) -> Tensor:
        """Bound rows with splits: the worst row of each image first, and no other if it fails."""
        lower = lower.clone()
        left = lower <= 0
        while bool(left.any()):
            worst: dict[int, int] = {}
            for place in lower.argsort().tolist():
                if left[place]:
                    worst.setdefault(int(owner[place]), place)
            some = torch.tensor(list(worst.values())[: at_once(propagation)], device=rows.device)
            given = propagation.select(owner[some])
            found = branched(given, self.scores, rows[some], self.splits)
            lower[some] = torch.maximum(lower[some], found)
            left[some] = False
            left &= ~torch.isin(owner, owner[some[found <= 0]])
        return lower


def proven_within(rule: ConsistencyRule, threat: ThreatModel, images: Tensor) -> float:
    """Give by how much the radius shrinks, because accepted answers are constant within delta.

    Where delta is Euclidean and the threat is not, the largest box in the ball counts.
    """
    if rule.check == "pgd":
        return 0.0
    if rule.norm == "l2" and threat.norm == "linf":
        return float(rule.delta / images[0].numel() ** 0.5)
    return rule.delta


def _same_constants(one: Graph, other: Graph) -> bool:
    """Say whether two graphs have the same operations and constants."""
    if len(one.nodes) != len(other.nodes) or one.output != other.output:
        return False
    for first, second in zip(one.nodes, other.nodes, strict=True):
        if type(first.operation) is not type(second.operation) or first.shape != second.shape:
            return False
        pairs = zip(first.operation.tensors, second.operation.tensors, strict=True)
        for left, right in pairs:
            if left.name != right.name:
                return False
            if left.value is None or right.value is None:
                continue
            if not torch.equal(left.value, right.value):
                return False
    return True
