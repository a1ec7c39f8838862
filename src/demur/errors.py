"""Errors and warnings of demur: one line that names the fault and the remedy."""

from collections.abc import Iterable
from difflib import get_close_matches


def one_line(value: object, limit: int | None = None) -> str:
    """Give the text of a value on one line, without control characters.

    Text of a file from an untrusted source reaches a terminal through this function only.

    Parameters
    ----------
    value : object
        A path, a class name, an exception.
    limit : int, optional
        Largest number of characters. The middle of a longer text is left out, so that the name of
        a file stays readable.

    Returns
    -------
    str
        The text. Escape sequences, and bytes of a file name that are not UTF-8, become "?".

    Examples
    --------
    >>> one_line("two" + chr(10) + "lines" + chr(27) + "[31m")
    'two lines?[31m'
    >>> one_line("a" * 50 + "b" * 50, limit=13)
    'aaaaa...bbbbb'
    """
    # Line breaks and tabs become spaces; other spaces of a file name stay.
    text = " ".join(str(value).splitlines()).replace("\t", " ")
    line = "".join(letter if letter.isprintable() else "?" for letter in text)
    if limit is None or len(line) <= limit:
        return line
    half = (limit - 3) // 2
    return f"{line[:half]}...{line[-half:]}"


def amount(count: int, one: str, many: str = "") -> str:
    """Write a number with the word for what it counts, in the singular or the plural.

    Parameters
    ----------
    count : int
    one : str
        The word for one of them, and what follows it.
    many : str, optional
        The word for several. Default: `one` with an "s".

    Examples
    --------
    >>> amount(1, "image"), amount(1438, "image"), amount(1, "is wrong", "are wrong")
    ('1 image', '1,438 images', '1 is wrong')
    """
    return f"{count:,} {one if count == 1 else many or f'{one}s'}"


class DemurError(ValueError):
    """Bad input or a missing resource.

    The message is one line, whatever it quotes. The command line prints it and exits with code 2.

    Examples
    --------
    >>> from demur.errors import DemurError
    >>> print(DemurError("no class " + chr(27) + "[2J"))
    no class ?[2J
    """

    def __str__(self) -> str:
        return one_line(super().__str__())


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
