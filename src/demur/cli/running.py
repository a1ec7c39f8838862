"""The run of a command: what goes wrong becomes one line and an exit code."""

import os
import sys
import warnings
from contextlib import suppress
from typing import TextIO

import typer

from demur.cli import (
    INTERRUPTED,
    audit,
    counterexamples,
    data,
    export,
    gate,
    harden,
    photographs,
    predict,
    studies,
)
from demur.cli.app import FILE_WIDTH, ClosedPipe, app, log_console, out_console
from demur.errors import DemurError, DemurWarning, one_line

__all__ = [
    "app",
    "audit",
    "counterexamples",
    "data",
    "export",
    "gate",
    "harden",
    "photographs",
    "predict",
    "run",
    "studies",
]

CLOSED_PIPE = 141
LONGEST = 2000
"""Letters of a message: a word of the command line may be much longer."""


def run() -> int:
    """Run the command line, and give the exit code.

    Raises
    ------
    KeyboardInterrupt
        If the user interrupts the command.
    """
    # What libraries warn their callers of is not for the user of a command.
    warnings.filterwarnings("ignore", module=r"lightning_fabric(\..*)?|torch(\..*)?")
    warnings.filterwarnings("ignore", module=r"PIL(\..*)?")
    warnings.filterwarnings("ignore", category=DemurWarning)  # a run's results say it of each cell
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal may not have all letters
            stream.reconfigure(errors="replace")
    if not out_console.is_terminal and "COLUMNS" not in os.environ:
        out_console.width = FILE_WIDTH
    try:
        code = _called()
        sys.stdout.flush()
    except (ClosedPipe, BrokenPipeError):
        _drop(sys.stdout)
        return CLOSED_PIPE
    except OSError as error:  # results are written by now: only the text is lost
        _drop(sys.stdout)
        return _failed(f"cannot print: {error.strerror or error}. Files are complete.", 2)
    return code


def _called() -> int:
    """Call the command, and give the exit code."""
    try:
        code = app(prog_name="demur", standalone_mode=False)
    except DemurError as error:
        return _failed(str(error), 2)
    except typer.TyperException as error:
        message: str = error.format_message() if hasattr(error, "format_message") else str(error)
        if message.startswith("Usage:"):  # no command at all: the help is the answer
            out_console.print(message)
            return 2
        said = " ".join(message.split())
        context = getattr(error, "ctx", None)
        command = context.command_path if context is not None else "demur"
        stop = "" if said.endswith((".", "?", "!")) else "."
        return _failed(f"{said}{stop} See: {command} --help", 2)
    except typer.Abort as error:
        raise KeyboardInterrupt from error
    if code == INTERRUPTED:  # typer catches Ctrl-C itself, and gives this
        raise KeyboardInterrupt
    return int(code or 0)


def _failed(message: str, code: int) -> int:
    """Say what went wrong, and give the exit code."""
    with suppress(OSError):  # stderr may be closed or full
        log_console.print(f"demur: {one_line(message, LONGEST)}", style="red", soft_wrap=True)
    return code


def _drop(stream: TextIO) -> None:
    """Let the interpreter's last flush of a stream succeed."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
