"""Arrays of npz archives: sizes are checked before memory is allocated, nothing is unpickled."""

import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from demur.data.messages import printable
from demur.errors import DemurError
from demur.untrusted import ARRAYS, check_limit, check_regular

_HEADERS: dict[tuple[int, int], Any] = {
    (1, 0): npy.read_array_header_1_0,
    (2, 0): npy.read_array_header_2_0,
}

_CHUNK = 1 << 20

_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
"""How numpy stores members. Python unpacks other methods without a bound on the memory."""


class Archive:
    """The arrays of an open npz archive.

    Parameters
    ----------
    file : zipfile.ZipFile
        The archive.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder, "own.npz")
    ...     np.savez(path, labels=np.array([0, 1]))
    ...     with open_archive(path) as archive:
    ...         archive.names, archive.read("labels")
    (('labels',), array([0, 1]))
    """

    def __init__(self, file: zipfile.ZipFile) -> None:
        self._file = file
        self._members = {one.filename.removesuffix(".npy"): one for one in file.infolist()}
        self._sizes: dict[str, int] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the arrays, in their order."""
        return tuple(self._members)

    def read(self, name: str) -> NDArray[Any]:
        """Read an array.

        Raises
        ------
        DemurError
            If there is no such array, it holds Python objects, or it would make the arrays that
            were read larger than the limit.
        """
        if name not in self._members:
            known = ", ".join(sorted(self._members)) or "nothing"
            raise DemurError(
                f"it has no array {name!r}, only {printable(known)}; it needs images and labels, "
                "or train_images, train_labels, test_images and test_labels."
            )
        member = self._members[name]
        if member.compress_type not in _METHODS:
            raise DemurError(
                f"its array {name!r} is compressed in a way that numpy does not write. Save it "
                "with numpy.savez_compressed."
            )
        with self._file.open(member) as content:
            shape, fortran_order, dtype = _header(content, name)
            size = prod(shape) * dtype.itemsize
            self._sizes[name] = size
            check_limit("it", sum(self._sizes.values()), ARRAYS, "bytes of arrays")
            data = np.empty(size, np.uint8)
            for start in range(0, size, _CHUNK):
                part = content.read(min(_CHUNK, size - start))
                if len(part) < min(_CHUNK, size - start):
                    raise ValueError("the data are incomplete")
                data[start : start + _CHUNK] = np.frombuffer(part, np.uint8)
            if content.read(1):  # also compares the checksum
                raise ValueError("there are more data than the header says")
        return data.view(dtype).reshape(shape, order="F" if fortran_order else "C")


def _header(content: Any, name: str) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Read shape, order and type of an array."""
    version = npy.read_magic(content)
    if version not in _HEADERS:
        raise DemurError(f"its array {name!r} is of version {version} of the format.")
    shape, fortran_order, dtype = _HEADERS[version](content)
    if dtype.hasobject:
        raise DemurError(
            f"its array {name!r} holds Python objects, which can run code when they are read. "
            "Save numbers only."
        )
    if dtype.itemsize == 0 or any(length < 0 for length in shape):
        raise ValueError("the header is damaged")
    return shape, fortran_order, dtype


@contextmanager
def open_archive(path: Path) -> Iterator[Archive]:
    """Open an npz archive. Any failure of the block becomes a DemurError that names the file.

    Raises
    ------
    DemurError
        Of the same class as one that is raised in the block.
    """
    check_regular(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what numpy says of damaged headers quotes them
            with path.open("rb") as file:
                _refuse_single(file.read(6))
                with zipfile.ZipFile(file) as opened:
                    yield Archive(opened)
    except DemurError as error:
        raise type(error)(f"{path}: {error}") from error
    except Exception as error:  # damaged archives and headers fail in many ways
        raise DemurError(
            f"{path} is not a complete npz archive (truncated, damaged or of another format). "
            "Replace the file."
        ) from error


def _refuse_single(start: bytes) -> None:
    if start == npy.MAGIC_PREFIX:
        raise DemurError(
            "it holds a single array, not an npz archive; "
            "save it with numpy.savez(images=..., labels=...)."
        )
