"""The reading boundary: files that may come from an untrusted source.

Each reader of such a file opens it through this module. It reads regular files only, checks a limit
before it allocates memory, and turns each error of a decoder into one line. `docs/data.md` states
the limits.
"""

import json
import os
import stat
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import isfinite
from pathlib import Path
from typing import Any, BinaryIO, Final

from demur.errors import DemurError, one_line

LIMITS: Final = "DEMUR_LIMITS"
"""The environment variable that raises all limits: a factor."""

TEXT: Final = 1 << 24
"""Bytes of a file of text: results, configs, profiles, rules, annotations, label maps."""
MANIFEST: Final = 1 << 28
"""Bytes of a CSV manifest, which is read line by line."""
ARRAYS: Final = 1 << 30
"""Bytes of all arrays that are read into memory from one archive, folder or IDX file."""
PIXELS: Final = 1 << 26
"""Pixels of an image file."""
ROWS: Final = 1 << 24
"""Rows of a table of records."""
WEIGHTS: Final = 1 << 34
"""Bytes of a file of weights. The tensors in memory are as large as the file."""


def check_limit(subject: object, count: int, largest: int, unit: str) -> None:
    """Raise DemurError if something is larger than a limit allows.

    Parameters
    ----------
    subject : object
        What the message begins with, usually the path of the file.
    count : int
        Its size, in `unit`.
    largest : int
        One of the limits of this module. The environment variable DEMUR_LIMITS multiplies it.
    unit : str
        For example ``"bytes"``.

    Raises
    ------
    DemurError
        If `count` is larger, or DEMUR_LIMITS is no positive number.

    Examples
    --------
    >>> check_limit("a.png", 10**9, PIXELS, "pixels")
    Traceback (most recent call last):
    demur.errors.DemurError: a.png has 1,000,000,000 pixels, more than the limit of 67,108,864. ...
    """
    allowed = int(largest * _factor())
    if count > allowed:
        factor = -(-count // largest)
        raise DemurError(
            f"{subject} has {count:,} {unit}, more than the limit of {allowed:,}. If you trust the "
            f"file, raise the limits: demur --limits {factor} ..., or {LIMITS}={factor}."
        )


def _factor() -> float:
    text = os.environ.get(LIMITS, "1")
    try:
        factor = float(text)
    except ValueError:
        factor = 0.0
    if not factor > 0 or not isfinite(factor):
        raise DemurError(f"{LIMITS} is {text!r}: it must be a positive number, for example 4.")
    return factor


def user_path(text: str | Path) -> Path:
    """Expand ``~``, and make sure that the system can look for the file.

    Parameters
    ----------
    text : str or path

    Returns
    -------
    Path
        It need not exist.

    Raises
    ------
    DemurError
        If the path is too long, there is no home folder for ``~``, or a folder may not be read.

    Examples
    --------
    >>> user_path("no/such/file").name
    'file'
    """
    try:
        path = Path(text).expanduser()
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, RuntimeError, ValueError) as error:
        raise DemurError(f"{_short(text)} is no usable path: {_reason(error)}.") from error
    return path


def check_regular(path: Path) -> None:
    """Raise DemurError unless a path leads to a regular file: a FIFO or a device could hang.

    Examples
    --------
    >>> check_regular(Path(os.devnull))
    Traceback (most recent call last):
    demur.errors.DemurError: /dev/null is no regular file.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError as error:
        raise DemurError(f"there is no file {_short(path)}.") from error
    except (OSError, ValueError) as error:
        raise DemurError(f"cannot read {_short(path)}: {_reason(error)}.") from error
    if not stat.S_ISREG(mode):
        raise DemurError(f"{_short(path)} is no regular file.")


@contextmanager
def opened(path: Path, largest: int) -> Iterator[BinaryIO]:
    """Open a regular file of at most `largest` bytes for reading.

    Parameters
    ----------
    path : Path
    largest : int
        One of the limits of this module.

    Yields
    ------
    binary file

    Raises
    ------
    DemurError
        If the file is missing, too large, or no regular file, or an OSError occurs in the block.

    Examples
    --------
    >>> with opened(Path("no/such/file"), TEXT) as file:
    ...     pass
    Traceback (most recent call last):
    demur.errors.DemurError: there is no file no/such/file.
    """
    check_regular(path)  # first, since the mere opening of a device can have effects
    try:
        with path.open("rb") as file:
            check_limit(_short(path), os.fstat(file.fileno()).st_size, largest, "bytes")
            yield file
    except OSError as error:
        raise DemurError(f"cannot read {_short(path)}: {_reason(error)}.") from error


def read_bytes(path: Path, largest: int = TEXT) -> bytes:
    """Read a regular file of at most `largest` bytes."""
    with opened(path, largest) as file:
        return file.read()


def read_text(path: Path, largest: int = TEXT) -> str:
    """Read a text file in UTF-8, with or without a byte order mark.

    Raises
    ------
    DemurError
        As `opened`, and if the file is not UTF-8.
    """
    content = read_bytes(path, largest)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DemurError(f"{_short(path)} is not a text file in UTF-8.") from error


def read_json(path: Path, pairs: Callable[[list[Any]], Any] | None = None) -> Any:
    """Read a JSON file. NaN and Infinity, which are not JSON, are refused.

    Parameters
    ----------
    path : Path
    pairs : callable, optional
        Makes the value of an object from the list of its pairs. Default: a dict.

    Raises
    ------
    DemurError
        As `read_text`, and if the text is not JSON or is nested too deeply.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = Path(folder, "a.json").write_text('{"a": [1, 2]}')
    ...     read_json(Path(folder, "a.json"))
    {'a': [1, 2]}
    """
    text = read_text(path)
    try:
        return json.loads(text, parse_constant=_refuse, object_pairs_hook=pairs)
    except (ValueError, RecursionError) as error:  # also an integer of very many digits
        raise DemurError(f"{_short(path)} is not JSON: {_reason(error)}.") from error


def parse_toml(text: str, subject: object) -> dict[str, Any]:
    """Read TOML. The subject begins the message of an error.

    Raises
    ------
    DemurError
        If the text is not TOML, is nested too deeply, or has an integer of very many digits.

    Examples
    --------
    >>> parse_toml("a = 1", "a.toml")
    {'a': 1}
    """
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise DemurError(f"{subject} is not TOML: {_reason(error)}.") from error


@contextmanager
def decoding(path: Path, what: str) -> Iterator[None]:
    """Turn each error of a decoder into one line that names the file.

    A decoder of a damaged file can fail with any exception. A DemurError passes unchanged.

    Parameters
    ----------
    path : Path
        A regular file.
    what : str
        What it should be, for example ``"a file of weights"``.

    Raises
    ------
    DemurError
        For each exception in the block, and if the path leads to no regular file.

    Examples
    --------
    >>> with decoding(Path(__file__), "an image"):
    ...     raise IndexError("list index out of range")
    Traceback (most recent call last):
    demur.errors.DemurError: cannot read ...untrusted.py as an image: list index out of range.
    """
    check_regular(path)
    try:
        yield
    except DemurError:
        raise
    except Exception as error:
        raise DemurError(f"cannot read {_short(path)} as {what}: {_reason(error)}.") from error


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is no JSON")


def _reason(error: Exception) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return _short(text).rstrip(". ") or type(error).__name__


def _short(value: object) -> str:
    return one_line(value, 200)
