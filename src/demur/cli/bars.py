"""Progress on the terminal."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from demur.cli.app import log_console
from demur.progress import reporting


class _Bars:
    """Progress as rich bars where there is a terminal, else as a line for each finished piece of
    the outermost job.
    """

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._began = time.monotonic()

    def start(self, job: str, total: float) -> int:
        """Show a bar."""
        return self._progress.add_task("  " * len(self._progress.tasks) + job, total=total, note="")

    def advance(self, job: int, amount: float, note: str) -> None:
        """Move the bar."""
        self._progress.update(TaskID(job), advance=amount, note=note)
        outermost = self._progress.tasks[0]
        if outermost.id == job and amount and not log_console.is_terminal:
            self.message(
                f"{outermost.percentage:3.0f} %  {time.monotonic() - self._began:6.0f} s  {note}"
            )

    def finish(self, job: int) -> None:
        """Take the bar away."""
        self._progress.remove_task(TaskID(job))

    def message(self, text: str) -> None:
        """Print a line above the bars."""
        log_console.print(text, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def progress() -> Iterator[None]:
    """Show the progress of what runs inside."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    with (
        Progress(
            *columns,
            console=log_console,
            transient=True,
            disable=not log_console.is_terminal,
            speed_estimate_period=600,
        ) as bars,
        reporting(_Bars(bars)),
    ):
        yield
