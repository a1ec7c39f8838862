"""demur: image classifiers that may decline to answer, and the truth about them under attack.

Names are imported when they are first used: `import demur` does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from demur.classifier import REJECT, Classifier, Outcome, black_box, outcomes
    from demur.commands.audit import audit, benchmark
    from demur.commands.harden import harden
    from demur.errors import DemurError, DemurWarning
    from demur.loading import load_model, wrap
    from demur.threat import ThreatModel

_HOME = {
    "REJECT": "classifier",
    "Classifier": "classifier",
    "DemurError": "errors",
    "DemurWarning": "errors",
    "Outcome": "classifier",
    "ThreatModel": "threat",
    "audit": "commands.audit",
    "benchmark": "commands.audit",
    "black_box": "classifier",
    "harden": "commands.harden",
    "load_model": "loading",
    "outcomes": "classifier",
    "wrap": "loading",
}
_ROOMS = frozenset(
    {
        *("attacks", "bounds", "certificates", "classifier", "data", "defenses", "errors"),
        "evaluation",
        *("files", "goals", "hardware", "loading", "masks", "metrics", "networks", "norms"),
        *("progress", "report", "seeds", "threat", "training"),
    }
)

__all__ = [
    "REJECT",
    "Classifier",
    "DemurError",
    "DemurWarning",
    "Outcome",
    "ThreatModel",
    "__version__",
    "audit",
    "benchmark",
    "black_box",
    "harden",
    "load_model",
    "outcomes",
    "wrap",
]


def __getattr__(name: str) -> Any:
    """Import a name of the library, or a room, at its first use (PEP 562)."""
    if name in _HOME:
        return getattr(import_module(f"demur.{_HOME[name]}"), name)
    if name in _ROOMS:
        return import_module(f"demur.{name}")
    raise AttributeError(f"module 'demur' has no attribute {name!r}")


def __dir__() -> list[str]:
    """List the public names."""
    return sorted({*__all__, *_ROOMS})
