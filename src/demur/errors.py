"""What goes wrong at the boundary, said in one line that names the fault and the remedy."""

from collections.abc import Iterable
from difflib import get_close_matches


class DemurError(ValueError):
    """Bad input or a missing resource. The message is one line; the command line prints it and exits with 2."""


class DemurWarning(UserWarning):
    """A result that is given, but that may mislead."""


def unknown(kind: str, name: str, known: Iterable[str]) -> DemurError:
    """Make the error for a name that is not among the known ones, offering the nearest."""
    names = sorted(known)
    near = get_close_matches(str(name).lower(), names, n=1, cutoff=0.4)
    guess = f" Did you mean {near[0]!r}?" if near else ""
    return DemurError(f"unknown {kind} {name!r}.{guess} Known: {', '.join(names) or 'none'}.")
