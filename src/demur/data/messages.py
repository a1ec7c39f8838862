"""Parts of messages about what comes from a user's files: bounded, on one line, printable."""


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
    # Surrogates stand for bytes of a file name that are not UTF-8: they cannot be printed.
    line = "".join(letter if letter.isprintable() else "?" for letter in _on_one_line(value))
    if len(line) <= limit:
        return line
    half = (limit - 3) // 2
    return f"{line[:half]}...{line[-half:]}"


def quoted(value: object, limit: int = 60) -> str:
    """Give the text of a value in quotation marks.

    Examples
    --------
    >>> quoted("goldfish")
    "'goldfish'"
    """
    return f"'{printable(value, limit)}'"


def _on_one_line(value: object) -> str:
    """Replace line breaks and tabs by spaces; other spaces of a file name stay."""
    return " ".join(str(value).splitlines()).replace("\t", " ")
