"""The command export."""

from pathlib import Path
from typing import Annotated

import typer

from demur.cli.app import app, log_console, out_console
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
from demur.cli.options import DataRoot, Seed
from demur.errors import one_line


@app.command()
def export(
    model: Model,
    form: Annotated[
        str, typer.Option("--format", metavar="onnx|pt2", help="What is written.")
    ] = "onnx",
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE", help="Default: model.onnx or .pt2 in the bundle."),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option("--data", metavar="DATA", help="Images to compare on. Default: made ones."),
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
    seed: Seed = 0,
) -> None:
    """Write a model as one graph, with its normalisation, kernel machines (SVMs) and reject score,
    and compare it with the original. The exit code is 1, and nothing is written, if a decision
    differs. A py: model needs --img-size or --data.
    """
    from demur.commands.export import export as command
    from demur.loading.export import ParityError

    options = model_options(
        arch=arch,
        checkpoint=checkpoint,
        model_kwargs=model_kwargs,
        num_classes=num_classes,
        reject_column=reject_column,
        allow_pickle=allow_pickle,
        preprocess=(img_size, mean, std, interpolation, crop_pct),
    )
    try:
        path, parity = command(
            model,
            form,
            out=out,
            data=data,
            seed=seed,
            model_options=options,
            data_options={"root": data_root},
        )
    except ParityError as error:
        log_console.print(f"demur: {one_line(error)}", style="red", soft_wrap=True)
        raise typer.Exit(1) from error
    out_console.print(f"{path}: {parity}", soft_wrap=True)
    if not parity.close:
        out_console.print("• The scores differ by more than 1e-4 of the largest.", soft_wrap=True)
