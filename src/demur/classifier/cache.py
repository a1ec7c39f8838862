"""A place for values that can be computed again."""

from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass
class Cache(Generic[T]):
    """Holds a value that follows from others, so that it does not count in `files.fingerprint`."""

    value: T

    def fingerprint(self) -> str:
        """Give the same text for every value."""
        return "cache"
