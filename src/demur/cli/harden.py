"""The command harden."""

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
)
from demur.cli.bars import progress
from demur.cli.options import DataRoot, Device, Seed, StoreFolder
from demur.errors import DemurError


@app.command()
def harden(
    model: Model,
    data: Annotated[
        str,
        typer.Option("--data", metavar="DATA", help="A folder by class, .npz, .csv, or a name."),
    ],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="The folder of the bundle.")],
    names: Annotated[
        list[str] | None,
        typer.Option("--with", metavar="NAME", help="A defence. Repeatable, the innermost first."),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A setting of a defence. Repeatable."),
    ] = None,
    background: Annotated[
        Path | None,
        typer.Option("--background", metavar="DIR", help="Images of none of the classes."),
    ] = None,
    false_rejection_rate: Annotated[
        float | None, typer.Option("--false-rejection-rate", metavar="R", help="Default: 0.02.")
    ] = None,
    max_wrong: Annotated[
        float | None,
        typer.Option(
            "--max-wrong", metavar="R", help="Largest share of wrong and accepted, guaranteed."
        ),
    ] = None,
    confidence: Annotated[
        float, typer.Option("--confidence", metavar="C", help="Of --max-wrong.")
    ] = 0.95,
    num_samples: Annotated[
        int | None, typer.Option("--num-samples", metavar="N", help="Images. Default: all.")
    ] = None,
    split: Annotated[
        str, typer.Option("--split", metavar="NAME", help="train, test or val, where there is one.")
    ] = "train",
    label_map: Annotated[
        Path | None,
        typer.Option("--label-map", metavar="FILE", help="The data's classes to the model's."),
    ] = None,
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
    data_root: DataRoot = None,
    device: Device = "auto",
    seed: Seed = 0,
    store: StoreFolder = None,
) -> None:
    """Make a better model: add defences, set the threshold on held-out images, save a bundle. An
    interrupted hardening goes on with the same command.
    """
    from demur.commands.harden import harden as command
    from demur.commands.harden import with_interval
    from demur.hardware import keep_buffers

    keep_buffers()
    options = model_options(
        arch=arch,
        checkpoint=checkpoint,
        model_kwargs=model_kwargs,
        num_classes=num_classes,
        reject_column=reject_column,
        allow_pickle=allow_pickle,
        preprocess=(img_size, mean, std, interpolation, crop_pct),
    )
    read = {"split": split, "label_map": label_map, "root": data_root}
    with progress():
        found = command(
            model,
            data,
            names or [],
            settings=dict(map(_setting, settings or [])),
            background=background,
            false_rejection_rate=false_rejection_rate,
            max_wrong=max_wrong,
            confidence=confidence,
            num_samples=num_samples,
            seed=seed,
            out=out,
            device=device,
            store=store,
            model_options=options,
            data_options=read,
        )
    table = Table(title=f"{model}, on clean images", title_justify="left")
    for column in ("", "correct %", "rejected %", "wrong %", "coverage %", "n"):
        table.add_column(column, justify="right" if column else "left")
    for name, one in (("before", found.before), ("after", found.after)):
        shares = [with_interval(count, one.n) for count in (one.correct, one.rejected, one.wrong)]
        table.add_row(name, *shares, f"{100 * one.coverage:.1f}", str(one.n))
    out_console.print(table, markup=False)
    out_console.print("In brackets: 95 % intervals over the images.", soft_wrap=True)
    for note in found.notes:
        out_console.print(f"• {note}", soft_wrap=True)
    out_console.print(f"Bundle: {out}", soft_wrap=True)
    out_console.print(f"Audit it: {found.audit_command}", soft_wrap=True)


def _setting(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise DemurError(f"--set takes KEY=VALUE, not {text!r}.")
    return key, value
