"""The parser and the consoles. The other files of this folder add commands to the parser."""

from importlib.metadata import version
from typing import Annotated

import typer
from rich.console import Console

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
out_console = Console()
log_console = Console(stderr=True)


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
) -> None:
    """demur: image classifiers that may decline to answer, measured under attack."""
