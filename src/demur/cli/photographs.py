"""The command attack: one photograph."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from demur.cli.app import app, out_console
from demur.cli.options import DataRoot, Device
from demur.errors import DemurError

if TYPE_CHECKING:
    from demur.commands.photograph import PhotoAttack


@app.command()
def attack(
    photo: Annotated[
        Path, typer.Argument(metavar="PHOTO", help="A photograph: a file of any usual format.")
    ],
    network: Annotated[
        str,
        typer.Option("--network", metavar="NAME", help="resnet18, mobilenet_v2, inception_v3, ..."),
    ],
    target: Annotated[
        str,
        typer.Option(
            "--target",
            metavar="CLASS",
            help="Of ImageNet's classes, by name, WordNet id or number.",
        ),
    ],
    weights: Annotated[
        Path | None,
        typer.Option(
            "--weights", metavar="FILE", help="The network's; else those in the data root."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", metavar="FILE", help="A .png file. Default: PHOTO-attacked.png, here."
        ),
    ] = None,
    step_size: Annotated[
        float, typer.Option("--step-size", help="Euclidean length of a step, on pixels in [0, 1].")
    ] = 0.1,
    steps: Annotated[int, typer.Option("--steps", help="At most so many.")] = 1000,
    data_root: DataRoot = None,
    device: Device = "auto",
) -> None:
    """Attack a photograph until a network takes it for another class; write it, and it beside the
    original and the difference.
    """
    from demur.commands.photograph import attack_photograph
    from demur.hardware import keep_buffers, pick_device

    keep_buffers()
    place = out or Path(f"{photo.stem}-attacked.png")
    _check_place(place, photo)
    chosen = pick_device(device)
    found = attack_photograph(
        photo,
        network,
        target,
        weights=weights,
        data_root=data_root,
        step_size=step_size,
        steps=steps,
        device=chosen,
    )
    for line in _written(found, photo, network, place):
        out_console.print(line, markup=False, highlight=False, soft_wrap=True)
    if not found.success:
        raise DemurError(
            f"{network} does not take it for {found.target[0]} after {found.steps} steps: "
            "allow more --steps, or a larger --step-size."
        )


def _triple_of(place: Path) -> Path:
    return place.with_name(f"{place.stem}-triple.png")


def _check_place(place: Path, photo: Path) -> None:
    """Refuse places that cannot be written, and places of pictures that must stay."""
    from demur.report.pictures import is_own
    from demur.writing import check_writable

    if place.suffix.lower() != ".png" or place.resolve() == photo.resolve():
        raise DemurError(
            f"--out {place}: the attacked picture must end in .png "
            "and must not replace the photograph."
        )
    check_writable(place.parent)
    triple = _triple_of(place)
    if triple.exists() and (triple.resolve() == photo.resolve() or not is_own(triple)):
        raise DemurError(
            f"{triple} exists, and demur did not write it. The pictures side by side would "
            "replace it. Choose another --out."
        )


def _written(found: "PhotoAttack", photo: Path, network: str, place: Path) -> list[str]:
    """Write the pictures, and say what they show."""
    from demur.commands.photograph import answer_on
    from demur.data import to_float
    from demur.report.pictures import AMPLIFIED, save_picture, save_triple

    stored = save_picture(found.attacked, place)
    triple = _triple_of(place)
    save_triple(found.original, found.attacked, triple)
    answer, sure = answer_on(found.classifier, to_float(stored[None]))
    name, before, after = found.target
    converted = f", {found.photo.converted}" if found.photo.converted else ""
    return [
        f"{photo}: {found.photo.size[1]}x{found.photo.size[0]} pixels{converted}",
        f"seen by {network} in its size: the middle, {stored.shape[2]}x{stored.shape[1]} pixels",
        f"before: {found.before[0]} ({found.before[1]:.1%}); {name} ({before:.2%})",
        f"after, as {place} has it: {answer} ({sure:.1%}); {name} ({after:.2%})",
        f"moved by {found.l2:.3f} in L2, no pixel by more than {255 * found.linf:.0f}/255, "
        f"in {found.steps} steps",
        f"original, attacked, and the difference {AMPLIFIED} times: {triple}",
    ]
