"""The commands data list, data verify and data download."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from demur.cli.app import data_app, out_console
from demur.cli.bars import progress
from demur.cli.options import DataRoot
from demur.errors import DemurError

if TYPE_CHECKING:
    from demur.data import SourceStatus

GAP = 2
"""Spaces between the columns of the list."""


@data_app.command("list")
def list_data(data_root: DataRoot = None) -> None:
    """List the known data sets and weights: present, missing, and what can be downloaded."""
    from demur import data
    from demur.networks import weights

    _existing(data_root)
    out_console.print(
        f"Data sets under {data.data_root(data_root)}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    statuses = data.list_datasets(data_root)
    first = GAP + max(len(status.name) for status in statuses)
    second = GAP + max(len(_presence(status)) for status in statuses)
    for status in statuses:
        part = f", a subset of {data.counted(status.subset_of)}" if status.subset_of else ""
        images = f"{data.counted(status.images)} images of {status.classes} classes{part}"
        line = f"{status.name:{first}}{_presence(status):{second}}{images}"
        out_console.print(line, highlight=False, soft_wrap=True)
        out_console.print(
            f"{'':{first}}{status.about}",
            style="dim",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
    known = {
        name: "present" if weights.find(name, data_root) else "missing" for name in weights.URLS
    }
    said = ", ".join(f"{name} {state}" for name, state in known.items())
    out_console.print(
        f"Weights of networks for photographs: {said}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    out_console.print(
        "Download one with: demur data download NAME. "
        "The path of an .npz file or of a folder of images by class also works as a name."
    )


def _presence(status: "SourceStatus") -> str:
    if status.where is not None:
        return "embedded" if status.where == "embedded" else "present"
    if status.megabytes:
        return f"missing; {status.megabytes:,} MB to download"
    return "missing; no download"


@data_app.command("verify")
def verify_data(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NAME]...", help="Data sets to verify, by name or path. Default: all."
        ),
    ] = None,
    data_root: DataRoot = None,
) -> None:
    """Verify counts, checksums and ranges of present data sets. Exits with 1 if one is bad."""
    from demur import data

    _existing(data_root)
    results = data.verify(data_root, names or None)
    width = GAP + max(len(result.name) for result in results)
    for result in results:
        style = {"ok": "green", "bad": "red"}.get(result.state, "dim")
        out_console.print(
            f"{result.state:8}{result.name:{width}}{result.reason}",
            style=style,
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
    if any(result.state == "bad" or (names and result.state == "missing") for result in results):
        raise typer.Exit(1)


def _existing(data_root: Path | None) -> None:
    """Refuse a data root that was given and does not exist; the default one may not exist yet."""
    if data_root and not data_root.expanduser().is_dir():
        raise DemurError(
            f"the folder {data_root}, given by --data-root or DEMUR_DATA, does not exist."
        )


@data_app.command("download")
def download_data(
    name: Annotated[str, typer.Argument(metavar="NAME")], data_root: DataRoot = None
) -> None:
    """Download a data set, or the weights of an ImageNet network (resnet18, ...), into the data
    root.
    """
    from demur import data
    from demur.networks import weights

    with progress():
        if name in weights.URLS:
            weights.download(name, data_root)
        else:
            data.download(name, data_root)
    out_console.print(
        f"{name} is in {data.data_root(data_root)}", markup=False, highlight=False, soft_wrap=True
    )
