"""Sound bounds of a network's scores over a region of images: IBP, CROWN-IBP and CROWN."""

from demur.bounds.held import Interval
from demur.bounds.propagation import Bounded, Propagation
from demur.bounds.recording import trace
from demur.bounds.region import Region
from demur.bounds.rules import ConfidenceRule, ConsistencyRule, RejectRule, StricterRule
from demur.bounds.tracing import Graph
from demur.bounds.unsupported import UnsupportedLayerError

__all__ = [
    "Bounded",
    "ConfidenceRule",
    "ConsistencyRule",
    "Graph",
    "Interval",
    "Propagation",
    "Region",
    "RejectRule",
    "StricterRule",
    "UnsupportedLayerError",
    "trace",
]
