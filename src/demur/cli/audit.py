"""The command audit, and the options that name a model."""

import ast
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from demur.cli.app import app, out_console
from demur.cli.bars import progress
from demur.cli.options import Address, DataRoot, Device, Engine, ReuseStale, Seed, StoreFolder
from demur.errors import DemurError

if TYPE_CHECKING:
    from demur.evaluation.audit_results import AuditResults, ThreatRow

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="torchvision:NAME, timm:NAME, py:FILE.py:FACTORY, a file of weights, or a bundle.",
    ),
]
Arch = Annotated[
    str | None,
    typer.Option("--arch", metavar="SOURCE:NAME", help="The network of a file of weights."),
]
Checkpoint = Annotated[
    Path | None,
    typer.Option("--checkpoint", metavar="FILE", help="Weights in place of a download."),
]
ModelKwargs = Annotated[
    list[str] | None,
    typer.Option("--model-kwargs", metavar="K=V", help="An argument of the factory. Repeatable."),
]
NumClasses = Annotated[
    int | None, typer.Option("--num-classes", metavar="K", help="Without the reject column.")
]
RejectColumn = Annotated[
    str | None,
    typer.Option("--reject-column", metavar="last|N", help="The column of the reject score."),
]
ImgSize = Annotated[
    int | None, typer.Option("--img-size", metavar="N", help="Pixels a side of the input.")
]
Mean = Annotated[
    str | None, typer.Option("--mean", metavar="M,M,M", help="Of each channel, in [0, 1].")
]
Std = Annotated[
    str | None, typer.Option("--std", metavar="S,S,S", help="Of each channel, in [0, 1].")
]
Interpolation = Annotated[
    str | None,
    typer.Option("--interpolation", metavar="NAME", help="bilinear, bicubic, nearest or lanczos."),
]
CropPct = Annotated[
    float | None, typer.Option("--crop-pct", metavar="P", help="Share of the side that is kept.")
]
AllowPickle = Annotated[
    bool, typer.Option("--allow-pickle", help="Read weights that can run code: only your own.")
]


@app.command()
def audit(
    model: Model,
    data: Annotated[
        str,
        typer.Option("--data", metavar="DATA", help="A folder by class, .npz, .csv, or a name."),
    ],
    threat: Annotated[
        list[str] | None,
        typer.Option(
            "--threat",
            metavar="NORM:EPS",
            help="Repeatable. Default: linf:8/255. NORM alone: the smallest change.",
        ),
    ] = None,
    profile: Annotated[
        str, typer.Option("--profile", metavar="quick|standard|thorough", help="How much is spent.")
    ] = "quick",
    num_samples: Annotated[
        int | None, typer.Option("--num-samples", metavar="N", help="Images. Default: all.")
    ] = None,
    split: Annotated[
        str,
        typer.Option("--split", metavar="NAME", help="train, test or val, where there are any."),
    ] = "test",
    label_map: Annotated[
        Path | None,
        typer.Option("--label-map", metavar="FILE", help="The data's classes to the model's."),
    ] = None,
    base_model: Annotated[
        str | None,
        typer.Option("--base-model", metavar="MODEL", help="Attacks on it are transferred."),
    ] = None,
    baseline: Annotated[
        Path | None,
        typer.Option("--baseline", metavar="AUDIT", help="An earlier audit, to compare with."),
    ] = None,
    reject_score: Annotated[
        str | None,
        typer.Option(
            "--reject-score",
            metavar="max-prob|margin|energy",
            help="Gives a rejection to a model that has none.",
        ),
    ] = None,
    reject_threshold: Annotated[
        float | None,
        typer.Option("--reject-threshold", metavar="T", help="Of the reject score, in its unit."),
    ] = None,
    false_rejection_rate: Annotated[
        float | None, typer.Option("--false-rejection-rate", help="Default: 0.02.")
    ] = None,
    expect_accuracy: Annotated[
        str | None,
        typer.Option(
            "--expect-accuracy",
            metavar="A+-D",
            help="Shares, as 0.76+-0.02. Fail if accuracy differs.",
        ),
    ] = None,
    max_minutes: Annotated[
        float | None, typer.Option("--max-minutes", metavar="M", help="Leave parts out to fit.")
    ] = None,
    ood: Annotated[
        str | None,
        typer.Option("--ood", metavar="FOLDER", help="Images of none of the classes."),
    ] = None,
    corruptions: Annotated[
        bool, typer.Option("--corruptions", help="Noise, blur, weather and compression, too.")
    ] = False,
    certify: Annotated[
        bool, typer.Option("--certify", help="Prove images, too: a lower bound of robustness.")
    ] = False,
    batch_size: Annotated[int | None, typer.Option("--batch-size", metavar="N")] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="The audit's folder. Default: runs/audit-NAME."),
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
    engine: Engine = "local",
    address: Address = None,
    store: StoreFolder = None,
    reuse_stale: ReuseStale = False,
) -> None:
    """Measure how a model fails, without and under attack; write a report that says whether the
    attacks can be believed. An interrupted audit goes on with the same command.
    """
    from demur.commands.audit import audit as command
    from demur.commands.audit_subject import default_folder
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
            threat or ["linf:8/255"],
            profile=profile,
            num_samples=num_samples,
            seed=seed,
            batch_size=batch_size,
            base_model=base_model,
            baseline=baseline,
            reject_score=reject_score,
            reject_threshold=reject_threshold,
            false_rejection_rate=false_rejection_rate,
            expect_accuracy=expect_accuracy,
            max_minutes=max_minutes,
            ood=ood,
            corruptions=corruptions,
            certify=certify,
            out=out or default_folder(model),
            device=device,
            engine=engine,
            address=address,
            store=store,
            reuse_stale=reuse_stale,
            command=shlex.join(["demur", *sys.argv[1:]]),
            model_options=options,
            data_options=read,
        )
    _show(found.results)
    say(f"Report: {found.folder / 'report.html'}")


def model_options(
    *,
    arch: str | None,
    checkpoint: Path | None,
    model_kwargs: list[str] | None,
    num_classes: int | None,
    reject_column: str | None,
    allow_pickle: bool,
    preprocess: tuple[int | None, str | None, str | None, str | None, float | None],
) -> dict[str, Any]:
    """Give the options of `demur.load_model` that were named on the command line."""
    from demur.loading import PreprocessOverrides

    img_size, mean, std, interpolation, crop_pct = preprocess
    found: dict[str, Any] = {
        "arch": arch,
        "checkpoint": checkpoint,
        "num_classes": num_classes,
        "model_kwargs": dict(map(_pair, model_kwargs)) if model_kwargs else None,
        "allow_pickle": allow_pickle or None,
    }
    if reject_column is not None:
        found["reject_column"] = int(reject_column) if reject_column.isdecimal() else reject_column
    if any(one is not None for one in preprocess):
        found["preprocess"] = PreprocessOverrides(
            img_size=img_size,
            mean=_numbers("--mean", mean),
            std=_numbers("--std", std),
            interpolation=interpolation,
            crop_pct=crop_pct,
        )
    return {name: value for name, value in found.items() if value is not None}


def _pair(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise DemurError(f"--model-kwargs takes NAME=VALUE, not {text!r}.")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return name, value


def _numbers(option: str, text: str | None) -> tuple[float, ...]:
    try:
        return tuple(float(one) for one in (text or "").replace(",", " ").split())
    except ValueError as error:
        raise DemurError(f"{option} takes numbers such as 0.5,0.5,0.5, not {text!r}.") from error


def _show(results: "AuditResults") -> None:
    """Print the outcomes, the checks that need attention, the findings, and the notes."""
    from demur.report.audit import sentences

    table = Table(title=f"Audit of {results.model['name']}", title_justify="left")
    for column in ("threat", "correct %", "rejected %", "wrong %", "n"):
        table.add_column(column, justify="left" if column == "threat" else "right")
    for row in results.threats:
        shares = [_share(row, name) for name in ("correct", "rejected", "wrong")]
        goal = " (forcing rejections)" if row.goal == "force-reject" else ""
        missing = "" if row.complete else " *"
        table.add_row(f"{row.threat}{goal}{missing}", *shares, str(row.n))
    out_console.print(table, markup=False)
    if not all(row.complete for row in results.threats):
        say("* not all attacks ran.")
    _show_corruptions(results)
    for check in results.checks:
        if check.state == "flagged":
            say(f"• Self-test {check.name}: {check.text}")
    for sentence in [*sentences(results), *results.findings]:
        say(f"• {sentence}")
    for note in results.notes:
        say(f"Note: {note}")
    say(f"Verdict: {results.verdict}")


def _show_corruptions(results: "AuditResults") -> None:
    """Print the wrong answers by kind and severity, and the means of all outcomes."""
    from demur.report.corruptions import SEVERITY, corruption_tables

    other = results.other_inputs
    tables = corruption_tables(other.corruptions) if other is not None else []
    if not tables:
        return
    wrong, *rest = tables
    table = Table(title="Corrupted images: wrong %, by severity", title_justify="left")
    table.add_column("kind")
    means = [f"mean {one.outcome} %" for one in tables]
    for column in (*map(str, wrong.severities), *means):
        table.add_column(column, justify="right")
    for place, line in enumerate(wrong.lines):
        shares = [*line.shares, *(one.lines[place].mean for one in rest)]
        table.add_row(line.name, *("–" if one is None else f"{100 * one:.1f}" for one in shares))
    out_console.print(table, markup=False)
    say(SEVERITY)


def _share(row: "ThreatRow", outcome: str) -> str:
    low, high = getattr(row, f"{outcome}_low"), getattr(row, f"{outcome}_high")
    return f"{100 * getattr(row, outcome):.1f} ({100 * low:.1f}-{100 * high:.1f})"


def say(text: str) -> None:
    """Print a line, letter by letter."""
    out_console.print(text, markup=False, highlight=False, soft_wrap=True)
