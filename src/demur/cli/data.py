"""The commands data list, data verify and data download."""

from pathlib import Path
from typing import Annotated

import typer

from demur.cli.app import data_app, out_console
from demur.cli.bars import progress
from demur.cli.options import DataRoot
from demur.errors import DemurError


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
    for status in data.list_datasets(data_root):
        absent = (
            f"missing; {status.megabytes:,} MB to download"
            if status.megabytes
            else "missing; no download"
        )
        there = (
            absent
            if status.where is None
            else "embedded"
            if status.where == "embedded"
            else "present"
        )
        part = f", a subset of {data.counted(status.subset_of)}" if status.subset_of else ""
        images = data.counted(status.images)
        line = f"{status.name:18}{there:26}{images} images of {status.classes} classes{part}"
        out_console.print(line, highlight=False, soft_wrap=True)
        out_console.print(
            f"{'':18}{status.about}", style="dim", markup=False, highlight=False, soft_wrap=True
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
    for result in results:
        style = {"ok": "green", "bad": "red"}.get(result.state, "dim")
        out_console.print(
            f"{result.state:8}{result.name:17} {result.reason}",
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
