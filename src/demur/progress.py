"""Progress of long jobs. The library reports it; only the command line draws it.

In Python it goes to the logger `demur` at level INFO.
"""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final, Protocol

LOGGER: Final = logging.getLogger("demur")
SECONDS: Final = 5.0
"""Between two lines of the log about jobs under way."""


class Reporter(Protocol):
    """Receiver of progress: the progress bars of the command line, a test's list, or nothing.

    Examples
    --------
    >>> reporter: Reporter = Silent()
    """

    def start(self, job: str, total: float) -> int:
        """Record a job of `total` units of work inside the jobs under way; return its number."""

    def advance(self, job: int, amount: float, note: str) -> None:
        """Record that the job has done `amount` more units."""

    def finish(self, job: int) -> None:
        """Record that the job is over."""

    def message(self, text: str) -> None:
        """Record a text for the user, for example a warning."""


class Silent:
    """Reporter that discards everything.

    Examples
    --------
    >>> Silent().start("training", 10)
    0
    """

    def start(self, job: str, total: float) -> int:
        """Discard the start of a job; return 0."""
        return 0

    def advance(self, job: int, amount: float, note: str) -> None:
        """Discard the progress."""

    def finish(self, job: int) -> None:
        """Discard the end of a job."""

    def message(self, text: str) -> None:
        """Discard the text."""


@dataclass
class _Logged:
    """A job of the log."""

    name: str
    total: float
    began: float
    done: float = 0.0
    note: str = ""

    def __str__(self) -> str:
        percent = 100 * self.done / self.total if self.total else 100
        said = f"{self.name}: {percent:.0f} % after {time.monotonic() - self.began:.1f} s"
        return f"{said}, {self.note}" if self.note else said


class Logging:
    """Reporter that writes to the logger `demur` at level INFO. It is active at first.

    A line says what the jobs under way have done, every five seconds at most, and another one is
    written when the outermost job ends. `logging.basicConfig(level=logging.INFO)` shows the lines.

    Examples
    --------
    >>> reporter = Logging()
    >>> with reporting(reporter), job("training", 10) as progress:
    ...     progress.advance(5)
    """

    def __init__(self) -> None:
        self._jobs: dict[int, _Logged] = {}
        self._count = 0
        self._last = 0.0

    def start(self, job: str, total: float) -> int:
        """Begin a job, and return its number."""
        now = time.monotonic()
        if not self._jobs:
            self._last = now
        self._count += 1
        self._jobs[self._count] = _Logged(job, total, now)
        return self._count

    def advance(self, job: int, amount: float, note: str) -> None:
        """Add to what is done; write a line if the last one is old."""
        logged = self._jobs[job]
        logged.done += amount
        logged.note = note or logged.note
        if time.monotonic() - self._last >= SECONDS:
            self._last = time.monotonic()
            LOGGER.info("%s", "; ".join(map(str, self._jobs.values())))

    def finish(self, job: int) -> None:
        """End a job; write a line if it is the outermost one."""
        logged = self._jobs.pop(job)
        if not self._jobs:
            LOGGER.info("%s", logged)

    def message(self, text: str) -> None:
        """Write the text."""
        LOGGER.info("%s", text)


@dataclass(frozen=True)
class Job:
    """A job that is under way.

    Parameters
    ----------
    reporter : Reporter
        The reporter that the job was started on.
    number : int
        The job's number on that reporter.

    Examples
    --------
    >>> with job("training", 10) as progress:
    ...     progress.advance(10, "loss 0.1")
    """

    reporter: Reporter
    number: int

    def advance(self, amount: float, note: str = "") -> None:
        """Report `amount` more units of work, and optionally a note to show."""
        self.reporter.advance(self.number, amount, note)


_current: Reporter = Logging()


@contextmanager
def reporting(to: Reporter) -> Iterator[None]:
    """Send all progress inside the block to a reporter.

    Parameters
    ----------
    to : Reporter
        The reporter. After the block the previous one is active again.

    Examples
    --------
    >>> class Listening(Silent):
    ...     texts = []
    ...
    ...     def message(self, text):
    ...         self.texts.append(text)
    >>> with reporting(Listening()):
    ...     message("hello")
    >>> Listening.texts
    ['hello']
    """
    global _current
    before = _current
    _current = to
    try:
        yield
    finally:
        _current = before


@contextmanager
def job(name: str, total: float) -> Iterator[Job]:
    """Start a job on the active reporter, and finish it at the end of the block.

    Parameters
    ----------
    name : str
        What is done, for the user.
    total : float
        Units of work that the job will take.

    Yields
    ------
    Job
        The job; call its `advance` as the work proceeds.

    Examples
    --------
    >>> with job("training", 10) as progress:
    ...     progress.advance(10)
    """
    reporter = _current
    number = reporter.start(name, total)
    try:
        yield Job(reporter, number)
    finally:
        reporter.finish(number)


def message(text: str) -> None:
    """Send a text for the user to the active reporter.

    Parameters
    ----------
    text : str
        One line, for example a warning.

    Examples
    --------
    >>> message("the checkpoint belongs to another training")
    """
    _current.message(text)
