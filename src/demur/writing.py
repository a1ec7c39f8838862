"""The writing boundary: files that are written completely or not at all.

Each file that demur writes goes through this module. A file replaces the old one in one step, and
is on the disk before the next one is begun. Each error of writing is one line.
"""

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from demur.errors import DemurError

UNFINISHED = ".unfinished-"
"""What the name of a temporary file begins with."""
FREE_SPACE = "Free some space, or choose another folder."
WRAPPING = ("SafetensorError", "RuntimeError", "ComputeError")
"""Errors of libraries that may stand for an error of the system."""
FAILED = ("os error", "No space left", "file write failed", "writing file", "unexpected pos")
"""Parts of messages of libraries that could not write."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write a file completely or not at all, and keep it even if the machine stops right after.

    The file has the permissions that the umask of the process allows.

    Parameters
    ----------
    path : Path
        The file. Its folder is created where it does not exist.

    Yields
    ------
    Path
        Temporary file that replaces `path` at the end of the block; an error removes it.

    Raises
    ------
    DemurError
        If the folder cannot be created or written, or the disk is full.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with replacing(Path(folder, "a.txt")) as partial_file:
    ...         _ = partial_file.write_text("whole")
    ...     Path(folder, "a.txt").read_text()
    'whole'
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{UNFINISHED}{secrets.token_hex(6)}.{path.name[:100]}")
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        try:
            yield temporary
            _flush(temporary)
            temporary.replace(path)
            _flush(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def is_unfinished(name: str) -> bool:
    """Say whether a file name is that of a temporary file, which a killed process left behind.

    Examples
    --------
    >>> is_unfinished("results.json")
    False
    """
    return name.startswith(UNFINISHED)


def _flush(path: Path) -> None:
    """Wait until the content of a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some file systems cannot synchronise a folder
            raise
    finally:
        os.close(handle)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an error of writing into a DemurError about the file: an OSError, and what libraries
    make of one.

    Parameters
    ----------
    path : Path
        The file that the block writes.

    Examples
    --------
    >>> with writing(Path("x.txt")):
    ...     raise PermissionError(13, "Permission denied")
    Traceback (most recent call last):
    demur.errors.DemurError: cannot write x.txt: Permission denied. Choose a folder that you may ...
    """
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = FREE_SPACE if full else "Choose a folder that you may write to."
        raise DemurError(
            f"cannot write {_short(path)}: {error.strerror or error}. {remedy}"
        ) from error
    except Exception as error:
        # safetensors, torch and polars wrap the error of the system in their own.
        if type(error).__name__ not in WRAPPING or not any(sign in str(error) for sign in FAILED):
            raise
        raise DemurError(f"cannot write {_short(path)}: {_said(error)}. {FREE_SPACE}") from error


def _said(error: Exception) -> str:
    """Give the words of the system where a library passes them on."""
    full = os.strerror(errno.ENOSPC)
    return full if full in str(error) else "the disk is full, or the file was cut short"


def _short(path: Path) -> str:
    text = str(path)
    return text if len(text) <= 200 else f"{text[:100]}...{text[-97:]}"


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8, completely or not at all.

    Parameters
    ----------
    path : Path
        The file.
    text : str
        Its content.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_text(Path(folder, "a.txt"), "text")
    """
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def check_writable(folder: Path) -> None:
    """Create a folder, and raise DemurError if no file can be written into it.

    A command calls this before it computes.

    Examples
    --------
    >>> check_writable(Path(os.devnull, "folder"))
    Traceback (most recent call last):
    demur.errors.DemurError: cannot write /dev/null/folder: Not a directory. Choose a folder ...
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f"{UNFINISHED}{secrets.token_hex(6)}"
        try:
            probe.write_bytes(b"1")
        finally:
            probe.unlink(missing_ok=True)
