"""The folder of a run: it belongs to one configuration, and one process at a time uses it."""

import json
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from filelock import FileLock, Timeout

from demur.errors import DemurError
from demur.files import canonical_json
from demur.writing import is_unfinished, write_text, writing

MARK: Final = "run.json"
LOCK: Final = ".lock"
USER: Final = ".lock.json"
SHORT: Final = 32
"""Letters from which on a message leaves out a value: hashes have so many."""


@contextmanager
def claimed(folder: Path, identity: Mapping[str, Any]) -> Iterator[None]:
    """Use a run's folder alone.

    Parameters
    ----------
    folder : Path
        Created if it does not exist.
    identity : mapping
        What the run is: its configuration, data and seed, as JSON.

    Raises
    ------
    DemurError
        If the folder holds another run or other files, or another process uses it.
    """
    text = canonical_json(identity)
    _check(folder, text)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / LOCK)
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise DemurError(
                f"{folder} is in use by {_user(folder)}. "
                "Wait for it to end, or choose another --out."
            ) from error
    try:
        write_text(folder / USER, json.dumps([os.getpid(), socket.gethostname()]))
        _check(folder, text)
        if not _mark(folder):
            write_text(folder / MARK, text)
        yield
    finally:
        (folder / USER).unlink(missing_ok=True)
        lock.release()


def refuse_other(folder: Path, identity: Mapping[str, Any]) -> None:
    """Refuse a folder whose run differs, before the whole identity of this run is known.

    Parameters
    ----------
    folder : Path
    identity : mapping
        The parts of the identity that are known already.

    Raises
    ------
    DemurError
        If the folder holds a run that differs in one of these parts.
    """
    try:
        there = json.loads((folder / MARK).read_text(encoding="utf-8"))
        known = {**there, **json.loads(canonical_json(identity))}
    except (OSError, ValueError, TypeError):
        known = dict(identity)  # no mark that can be read: the folder must be empty
    _check(folder, canonical_json(known))


def _check(folder: Path, text: str) -> None:
    """Refuse a folder that holds something else."""
    with writing(folder):
        if folder.exists() and not folder.is_dir():
            raise DemurError(f"{folder} is a file; --out needs a folder.")
        there = _mark(folder)
        names = {path.name for path in folder.iterdir()} if folder.exists() else set()
    # A killed process leaves its temporary file, and a stopped machine may leave an empty mark.
    others = {name for name in names - {LOCK, USER, MARK} if not is_unfinished(name)}
    if not there and others:
        raise DemurError(f"{folder} is not empty and holds no run. Choose another --out.")
    if there and there != text:
        raise DemurError(
            f"{folder} holds a run with another configuration, data or seed"
            f"{_difference(there, text)}. Choose another --out, or delete that folder."
        )


def _mark(folder: Path) -> str:
    """Give the identity that the folder holds, empty where there is none."""
    mark = folder / MARK
    return mark.read_text(encoding="utf-8", errors="replace").strip() if mark.exists() else ""


def _difference(there: str, asked: str) -> str:
    """Name the parts in which two runs differ, with their values where these are short."""
    try:
        old, new = json.loads(there), json.loads(asked)
        names = sorted(name for name in {*old, *new} if old.get(name) != new.get(name))
    except (ValueError, TypeError, AttributeError):
        return ""
    if not names or not all(map(str.isidentifier, names)):
        return ""
    if "images" in names and "data" in names:
        names.remove("data")  # another number of images is another fingerprint, too
    return f" (different: {', '.join(_values(name, old, new) for name in names)})"


def _values(name: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Name a part that differs: "images, 5 there and 6 here"."""
    shown = [
        ", ".join(map(str, value)) if isinstance(value, list) else str(value)
        for value in (old.get(name), new.get(name))
    ]
    return f"{name}, {shown[0]} there and {shown[1]} here" if all(map(_short, shown)) else name


def _short(text: str) -> bool:
    """Whether a value says something to a reader: it is no hash, and not empty."""
    return text not in ("", "None") and len(text) < SHORT and text.isprintable()


def _user(folder: Path) -> str:
    try:
        process, host = json.loads((folder / USER).read_text(encoding="utf-8"))
        return f"process {int(process)} on {host}"
    except (OSError, ValueError, TypeError):
        return "another process"
