"""The commands replay and show: the broken images of an audit."""

import shlex
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from demur.cli.app import app, out_console
from demur.cli.audit import (
    AllowPickle,
    Arch,
    Checkpoint,
    CropPct,
    ImgSize,
    Interpolation,
    Mean,
    Model,
    ModelKwargs,
    NumClasses,
    RejectColumn,
    Std,
    model_options,
    say,
)
from demur.cli.options import Device
from demur.errors import DemurError

LISTED = 20
"""Images in the table of `demur show`."""
HASH = 12
"""Letters of a hash that are shown."""


@app.command()
def replay(
    audit: Annotated[Path, typer.Argument(metavar="AUDIT", help="The folder of an audit.")],
    model: Model,
    arch: Arch = None,
    checkpoint: Checkpoint = None,
    model_kwargs: ModelKwargs = None,
    num_classes: NumClasses = None,
    reject_column: RejectColumn = None,
    img_size: ImgSize = None,
    mean: Mean = None,
    std: Std = None,
    interpolation: Interpolation = None,
    crop_pct: CropPct = None,
    allow_pickle: AllowPickle = False,
    device: Device = "auto",
) -> None:
    """Score the broken images of an audit on another model, in seconds."""
    from demur.commands.replay import replay as command

    options = model_options(
        arch=arch,
        checkpoint=checkpoint,
        model_kwargs=model_kwargs,
        num_classes=num_classes,
        reject_column=reject_column,
        allow_pickle=allow_pickle,
        preprocess=(img_size, mean, std, interpolation, crop_pct),
    )
    found = command(audit, model, device=device, model_options=options)
    table = Table(title=f"Counterexamples of {audit.name} on this model", title_justify="left")
    for column in ("threat", "n", "correct %", "rejected %", "wrong %"):
        table.add_column(column, justify="left" if column == "threat" else "right")
    for row in found.table.iter_rows(named=True):
        shares = [f"{100 * row[name]:.1f}" for name in ("correct", "rejected", "wrong")]
        table.add_row(row["threat"], str(row["n"]), *shares)
    out_console.print(table, markup=False)
    for note in found.notes:
        say(f"Note: {note}")


@app.command()
def show(
    audit: Annotated[Path, typer.Argument(metavar="AUDIT", help="The folder of an audit.")],
    image: Annotated[
        str | None,
        typer.Option(
            "--image",
            metavar="ID",
            help="The number of an image, or the beginning of its hash. Default: list the images.",
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE", help="A .png file.")] = None,
) -> None:
    """Show how one image was broken: what changed, and by which attack. Without --image, list the
    broken images.
    """
    from demur.commands.replay import show as command

    if image is None:
        _list_broken(audit, out)
        return
    for line in command(audit, image, out):
        say(line)


def _list_broken(audit: Path, out: Path | None) -> None:
    from demur.commands.replay import broken_images

    if out is not None:
        raise DemurError("--out takes the picture of one image: name it with --image.")
    rows = broken_images(audit)
    if rows.is_empty():
        say("The audit broke no image.")
        return
    count = f"the first {LISTED} of {len(rows):,}" if len(rows) > LISTED else f"{len(rows)}"
    table = Table(title=f"Broken images of {audit.name}: {count}", title_justify="left")
    for column in ("image", "number", "class", "broken at"):
        table.add_column(column, justify="right" if column in ("number", "class") else "left")
    for row in rows.head(LISTED).iter_rows(named=True):
        about = (str(row["index"]), str(row["label"]), ", ".join(row["threats"]))
        table.add_row(row["image"][:HASH], *about)
    out_console.print(table, markup=False)
    say(f"One of them: demur show {shlex.quote(str(audit))} --image {rows['image'][0][:HASH]}")
