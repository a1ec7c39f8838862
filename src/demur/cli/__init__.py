"""The command line: parses, calls and prints. No other part of demur prints."""

import os
import sys
import warnings

import typer

from demur.cli import audit, data, gate, photographs, studies
from demur.cli.app import FILE_WIDTH, app, log_console, out_console
from demur.errors import DemurError, DemurWarning

__all__ = ["app", "audit", "data", "gate", "main", "photographs", "studies"]

INTERRUPTED = 130


def main() -> None:
    """Run the command line. Bad input is one line on stderr and exit code 2; an interruption is
    exit code 130.
    """
    # What libraries warn their callers of is not for the user of a command.
    warnings.filterwarnings("ignore", module=r"lightning_fabric(\..*)?|torch(\..*)?")
    warnings.filterwarnings("ignore", category=DemurWarning)  # a run's results say it of each cell
    if not out_console.is_terminal and "COLUMNS" not in os.environ:
        out_console.width = FILE_WIDTH
    try:
        code = app(standalone_mode=False)
        if code == INTERRUPTED:  # typer catches Ctrl-C itself, and gives this
            raise KeyboardInterrupt
        sys.exit(code)
    except DemurError as error:
        _fail(str(error), 2)
    except typer.TyperException as error:
        message: str = error.format_message() if hasattr(error, "format_message") else str(error)
        if message.startswith("Usage:"):  # no command at all: the help is the answer
            out_console.print(message, markup=False, highlight=False)
            sys.exit(2)
        said = " ".join(message.split())
        _fail(f"{said}{'' if said.endswith(('.', '?', '!')) else '.'} See: demur --help", 2)
    except (KeyboardInterrupt, typer.Abort):
        _fail("interrupted. The same command goes on where it was.", INTERRUPTED)
    except BrokenPipeError:
        sys.exit(141)


def _fail(message: str, code: int) -> None:
    log_console.print(
        f"demur: {message}", style="red", markup=False, highlight=False, soft_wrap=True
    )
    sys.exit(code)
