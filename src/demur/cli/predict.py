"""The command predict."""

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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
from demur.cli.options import Device
from demur.errors import amount, unknown

if TYPE_CHECKING:
    from demur.commands.predict import Prediction


@app.command()
def predict(
    model: Model,
    images: Annotated[
        list[Path], typer.Argument(metavar="IMAGE...", help="Image files, or folders of them.")
    ],
    form: Annotated[
        str, typer.Option("--format", metavar="table|jsonl|csv", help="How answers are printed.")
    ] = "table",
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
    """Print the class of each image, or REJECT, with the probability of the best class. The number
    of rejected images follows on stderr. The exit code is 1 if a file could not be read.
    """
    if form not in FORMS:
        raise unknown("format", form, FORMS)
    from demur.commands.predict import predict as command
    from demur.hardware import pick_device

    options = model_options(
        arch=arch,
        checkpoint=checkpoint,
        model_kwargs=model_kwargs,
        num_classes=num_classes,
        reject_column=reject_column,
        allow_pickle=allow_pickle,
        preprocess=(img_size, mean, std, interpolation, crop_pct),
    )
    found = command(model, images, device=pick_device(device).type, model_options=options)
    count = rejected = failed = 0
    if form == "csv":
        out_console.print("path,prediction,rejected,score,error", soft_wrap=True)
    for one in found:
        out_console.print(FORMS[form](one), soft_wrap=True)
        count += 1
        rejected += one.rejected
        failed += bool(one.error)
    unread = f", {failed} could not be read" if failed else ""
    share = 100 * rejected / max(1, count - failed)
    seen = amount(count, "image")
    log_console.print(f"{seen}: {rejected:,} rejected ({share:.1f} %){unread}.")
    if failed:
        raise typer.Exit(1)


def _line(one: "Prediction") -> str:
    answer = f"not read: {one.error}" if one.error else f"{one.prediction}  {one.score:.4f}"
    return f"{one.path}  {answer}"


def _json(one: "Prediction") -> str:
    answer: dict[str, object] = {"path": one.path}
    if one.error:
        return json.dumps({**answer, "error": one.error})
    answer |= {"prediction": one.prediction, "rejected": one.rejected, "score": one.score}
    return json.dumps(answer)


def _csv(one: "Prediction") -> str:
    text = io.StringIO()
    rejected = "" if one.error else str(one.rejected).lower()
    score = "" if one.error else f"{one.score:.6f}"
    row = [one.path, one.prediction, rejected, score, one.error]
    csv.writer(text, lineterminator="").writerow(row)
    return text.getvalue()


FORMS: dict[str, Callable[["Prediction"], str]] = {"table": _line, "jsonl": _json, "csv": _csv}
