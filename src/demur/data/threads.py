"""Work on files in a few threads: Pillow and the hash functions release Python's lock."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")

READERS = 4
"""Threads, so also the largest number of images that are decoded at a time."""

_WAITING = 1000  # items that are given to the threads at a time: each costs memory


def in_threads(function: Callable[[T], R], items: Sequence[T]) -> Iterator[R]:
    """Call a function on each item in a few threads; give the results in the order of the items.

    The error of the first item that fails is raised, and the items after it are left.

    Examples
    --------
    >>> list(in_threads(len, ["a", "bc"]))
    [1, 2]
    """
    with ThreadPoolExecutor(READERS) as pool:
        for start in range(0, len(items), _WAITING):
            yield from pool.map(function, items[start : start + _WAITING])
