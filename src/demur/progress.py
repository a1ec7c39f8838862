"""One way to say how far a long job is. The library reports; only the command line draws."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol


class Reporter(Protocol):
    """Where progress goes: the command line's bars, a test's list, or nowhere."""

    def start(self, job: str, total: float) -> int:
        """Take note of a job of `total` units of work, within the jobs that are under way; give its number."""

    def advance(self, job: int, amount: float, note: str) -> None:
        """Take note that the job has done `amount` more units."""

    def finish(self, job: int) -> None:
        """Take note that the job is over."""

    def message(self, text: str) -> None:
        """Take note of something that the user should know (a warning, a cell computed again)."""


class Silent:
    """The reporter that says nothing."""

    def start(self, job: str, total: float) -> int:
        """Ignore it."""
        return 0

    def advance(self, job: int, amount: float, note: str) -> None:
        """Ignore it."""

    def finish(self, job: int) -> None:
        """Ignore it."""

    def message(self, text: str) -> None:
        """Ignore it."""


@dataclass(frozen=True)
class Job:
    """A job that is under way."""

    reporter: Reporter
    number: int

    def advance(self, amount: float, note: str = "") -> None:
        """Report `amount` more units of work done."""
        self.reporter.advance(self.number, amount, note)


_current: Reporter = Silent()


@contextmanager
def reporting(to: Reporter) -> Iterator[None]:
    """Inside, progress goes to `to`."""
    global _current
    before, _current = _current, to
    try:
        yield
    finally:
        _current = before


@contextmanager
def job(name: str, total: float) -> Iterator[Job]:
    """Begin and finish a job of `total` units on the reporter in force."""
    reporter = _current
    number = reporter.start(name, total)
    try:
        yield Job(reporter, number)
    finally:
        reporter.finish(number)


def message(text: str) -> None:
    """Tell the reporter in force something that the user should know."""
    _current.message(text)
