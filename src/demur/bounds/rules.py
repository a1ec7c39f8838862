"""Rules of rejection, as certificates see them.

A module that rejects by something else than a column of its network brings a method `reject_rule()`
that returns one of these. So no certificate imports a defence.
"""

from dataclasses import dataclass
from typing import Literal

from torch import nn

from demur.bounds.affine import Operation


@dataclass(frozen=True, eq=False)
class RejectRule:
    """How a module rejects answers of its network.

    Parameters
    ----------
    network : nn.Module
        Images (N, C, H, W) to scores (N, K). The answer is its argmax, or a rejection.
    """

    network: nn.Module


@dataclass(frozen=True, eq=False)
class ConfidenceRule(RejectRule):
    """The answer is accepted if its confidence is at least `limit`.

    Parameters
    ----------
    kind : {"max-prob", "margin", "energy"}
        Log-odds of the best class; the best score minus the second; logsumexp of the scores.
    limit : float
    """

    kind: Literal["max-prob", "margin", "energy"] = "margin"
    limit: float = 0.0


@dataclass(frozen=True, eq=False)
class StricterRule(RejectRule):
    """The network's answers, which may be rejections, of which more may be rejected.

    What is proven about wrong answers of the network holds. Nothing is known about rejections.
    """


@dataclass(frozen=True, eq=False)
class ConsistencyRule(RejectRule):
    """The answer is accepted only where it is proven to be constant within delta.

    Parameters
    ----------
    delta : float
    norm : {"linf", "l2"}
        The norm of delta.
    check : str
        The method that proves it at prediction: "ibp", "crown-ibp" or "smoothing". "pgd" proves
        nothing.
    """

    delta: float = 0.0
    norm: Literal["linf", "l2"] = "linf"
    check: str = "ibp"


@dataclass(frozen=True, eq=False)
class Decision(Operation):
    """The node where a rule rejects. It reads the scores of the rule's network.

    Parameters
    ----------
    rule : RejectRule
    given : int
        The node that the network reads.
    """

    rule: RejectRule
    given: int
