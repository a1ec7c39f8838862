"""The parser and the consoles. The other files of this folder add commands to the parser."""

import os
from collections.abc import Iterable
from importlib.metadata import version
from typing import Annotated, Any

import typer
from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from demur.errors import one_line
from demur.untrusted import LIMITS

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
data_app = typer.Typer(no_args_is_help=True, help="Data sets: list, verify and download them.")
app.add_typer(data_app, name="data")

FILE_WIDTH = 240
"""Columns of a table that goes into a file or a pipe: wide enough that no line is broken."""


class ClosedPipe(Exception):  # noqa: N818 - not an error: the reader of the output has ended
    """The reader of the output has ended."""


class PlainConsole(Console):
    """A console that shows all text letter by letter: text of a file is neither markup nor an
    escape sequence.
    """

    def __init__(self, *, stderr: bool = False) -> None:
        super().__init__(stderr=stderr, markup=False, highlight=False, emoji=False)

    def on_broken_pipe(self) -> None:
        """Go on without messages where nobody reads them; without a reader of the output, end."""
        self.quiet = True
        if not self.stderr:
            raise ClosedPipe

    def print(self, *objects: Any, **options: Any) -> None:
        """Print. A message that cannot be written never ends the work."""
        try:
            super().print(*objects, **options)
        except OSError:
            if not self.stderr:
                raise
            self.quiet = True

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """Render, and replace what is not printable. Control segments are rich's own."""
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else _printable(text), style, control)


def _printable(text: str) -> str:
    if text.isprintable():
        return text
    return "\n".join(one_line(line) for line in text.split("\n"))


out_console = PlainConsole()
log_console = PlainConsole(stderr=True)


def _print_version(asked: bool) -> None:
    if asked:
        out_console.print(f"demur {version('demur')}", highlight=False)
        raise typer.Exit


@app.callback()
def _root(
    show_version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
    limits: Annotated[
        float,
        typer.Option(
            "--limits",
            metavar="FACTOR",
            envvar=LIMITS,
            help="Multiply the limits of the size of files that are read.",
        ),
    ] = 1.0,
) -> None:
    """demur: image classifiers that may decline to answer, measured under attack."""
    os.environ[LIMITS] = str(limits)
