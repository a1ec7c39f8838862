"""Parts of messages about what comes from a user's files: bounded, on one line, printable."""

from demur.errors import one_line


def printable(value: object, limit: int = 200) -> str:
    """Give the text of a value on one line, bounded, without control characters.

    Parameters
    ----------
    value : object
        A path, a class name, an exception.
    limit : int, default=200
        Largest number of characters. The middle of a longer text is left out, so that the name of
        a file stays readable.

    Returns
    -------
    str
        The text.

    Examples
    --------
    >>> printable("two" + chr(10) + "lines" + chr(27) + "[31m")
    'two lines?[31m'
    >>> printable("a" * 50 + "b" * 50, limit=13)
    'aaaaa...bbbbb'
    """
    return one_line(value, limit)


def quoted(value: object, limit: int = 60) -> str:
    """Give the text of a value in quotation marks.

    Examples
    --------
    >>> quoted("goldfish")
    "'goldfish'"
    """
    return f"'{printable(value, limit)}'"
