"""The handshake before an audit: whether a model and images fit together, before any attack.

The points are those that users get wrong: pixels, modes, labels, probabilities, normalisation.
Each gives a line of the report. A failure is one line that names the remedy.
"""

from demur.evaluation.handshake.lines import HandshakeError, Line
from demur.evaluation.handshake.meeting import Handshake, handshake
from demur.evaluation.handshake.operations import suspicious_operations

__all__ = ["Handshake", "HandshakeError", "Line", "handshake", "suspicious_operations"]
