"""The error for a name that is not among very many."""

from collections.abc import Iterable
from difflib import get_close_matches

from demur.data.messages import printable
from demur.errors import DemurError


def no_such(kind: str, name: str, known: Iterable[str]) -> DemurError:
    """Make the error for a name that is not among very many known names.

    Parameters
    ----------
    kind : str
        What the name should name, with its owner, for example ``"timm has no model"``.
    name : str
        The name that was given.
    known : iterable of str
        The names that exist. The message offers the three nearest ones.

    Returns
    -------
    DemurError
        The error, for the caller to raise.

    Examples
    --------
    >>> no_such("timm has no model", "resnet19", ["resnet18", "vgg16"])
    DemurError("timm has no model 'resnet19'. Did you mean 'resnet18'?")
    """
    by_lower = {one.lower(): one for one in known}
    near = get_close_matches(name.lower()[:100], list(by_lower), n=3, cutoff=0.5)
    guess = f" Did you mean {' or '.join(repr(by_lower[one]) for one in near)}?" if near else ""
    return DemurError(f"{kind} {printable(name, 80)!r}.{guess}")
