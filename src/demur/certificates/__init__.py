"""Certificates: proofs that no image within a threat makes a classifier wrong and accepted."""

from demur.certificates.certify import certify
from demur.certificates.problem import METHODS
from demur.certificates.prover import Prover
from demur.certificates.radius import certified_radius
from demur.certificates.status import Certificate, ProvenBounds, Status, UnsoundBoundError

__all__ = [
    "METHODS",
    "Certificate",
    "ProvenBounds",
    "Prover",
    "Status",
    "UnsoundBoundError",
    "certified_radius",
    "certify",
]
