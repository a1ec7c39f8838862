"""Errors and warnings of demur: one line that names the fault and the remedy."""

from collections.abc import Iterable
from difflib import get_close_matches


class DemurError(ValueError):
    """Bad input or a missing resource.

    The message is one line. The command line prints it and exits with code 2.

    Examples
    --------
    >>> from demur.errors import DemurError
    >>> issubclass(DemurError, ValueError)
    True
    """


class ModuleError(DemurError):
    """A user's module failed, or its answer is no table of scores.

    If the module raised an error, that error is the `__cause__`.

    Examples
    --------
    >>> from demur.errors import DemurError, ModuleError
    >>> issubclass(ModuleError, DemurError)
    True
    """


class DemurWarning(UserWarning):
    """A result that may mislead.

    Examples
    --------
    >>> from demur.errors import DemurWarning
    >>> issubclass(DemurWarning, UserWarning)
    True
    """


def unknown(kind: str, name: str, known: Iterable[str]) -> DemurError:
    """Make the error for a name that is not among the known names.

    Parameters
    ----------
    kind : str
        What the name should name, for example ``"device"``.
    name : str
        The name that was given.
    known : iterable of str
        The names that exist. The message offers the nearest one.

    Returns
    -------
    DemurError
        The error, for the caller to raise.

    Examples
    --------
    >>> unknown("device", "gpu", ["cpu", "cuda"])
    DemurError("unknown device 'gpu'. Did you mean 'cpu'? Known: cpu, cuda.")
    """
    names = sorted(known)
    lowered = {one.lower(): one for one in reversed(names)}
    near = get_close_matches(str(name).lower(), list(lowered), n=1, cutoff=0.4)
    guess = f" Did you mean {lowered[near[0]]!r}?" if near else ""
    return DemurError(f"unknown {kind} {name!r}.{guess} Known: {', '.join(names) or 'none'}.")
