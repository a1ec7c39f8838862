"""`demur replay` and `demur show`: the counterexamples of an audit."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import torch
from torch import nn

from demur.classifier import Classifier, outcomes_of
from demur.commands.audit_subject import load as load_subject
from demur.commands.audit_subject import normalisation, shape_of
from demur.data.images import to_float
from demur.data.messages import printable
from demur.errors import DemurError, ModuleError, one_line
from demur.evaluation.audit_results import read
from demur.evaluation.counterexamples import FOLDER, Counterexamples, load
from demur.evaluation.records import OUTCOMES
from demur.hardware import pick_device
from demur.report.pictures import save_triple


@dataclass(frozen=True)
class Replay:
    """What another model makes of the counterexamples of an audit.

    Attributes
    ----------
    table : polars.DataFrame
        A row for each threat: `n`, and the shares `correct`, `rejected` and `wrong`.
    outcomes : polars.DataFrame
        The records of the counterexamples, with the new `prediction` and `outcome`.
    notes : tuple of str
        What may explain the figures besides the model.
    """

    table: pl.DataFrame
    outcomes: pl.DataFrame
    notes: tuple[str, ...] = ()


def replay(
    audit: str | Path,
    model: str | Path | nn.Module,
    *,
    device: str = "auto",
    batch_size: int = 128,
    model_options: Mapping[str, Any] | None = None,
) -> Replay:
    """Score the broken images of an audit on a model.

    It takes seconds, and makes no new attack: an image that the model withstands here may still be
    broken by an attack on this model.

    Parameters
    ----------
    audit : path
        The folder of an audit.
    model : str, path or nn.Module
        As in `demur.audit`.
    device : {"auto", "cpu", "cuda"}
    batch_size : int, default 128
    model_options : mapping, optional
        Options of `demur.load_model`.

    Returns
    -------
    Replay

    Raises
    ------
    DemurError
        If the audit has no counterexamples, or the model does not take its images.
    """
    kept = load(Path(audit))
    if not len(kept.records):
        raise DemurError(f"the audit {audit} broke no image: there is nothing to replay.")
    options = {**shape_of(model, kept.original), **(model_options or {})}
    classifier = load_subject(model, options, lambda: tuple(kept.original.shape[1:])).classifier
    classifier.to(pick_device(device))
    labels = torch.tensor(kept.records["label"].to_list(), dtype=torch.int64)
    if int(labels.max()) >= classifier.num_classes:
        raise DemurError(
            f"the audit has images of class {int(labels.max())}; this model has "
            f"{classifier.num_classes} classes."
        )
    predictions = _predictions(classifier, kept, batch_size)
    found = outcomes_of(predictions, labels)
    rows = kept.records.with_columns(
        prediction=pl.Series(predictions.tolist(), dtype=pl.Int64),
        outcome=pl.Series([OUTCOMES[one] for one in found.tolist()], dtype=pl.Enum(OUTCOMES)),
    )
    shares = [(pl.col("outcome") == name).mean().alias(name) for name in OUTCOMES]
    table = rows.group_by("threat", maintain_order=True).agg(pl.len().alias("n"), *shares)
    return Replay(table, rows, _differences(audit, classifier))


def _differences(audit: str | Path, classifier: Classifier) -> tuple[str, ...]:
    """Say where the audited model normalised its images otherwise."""
    before = read(audit).model.get("normalisation")
    now = normalisation(classifier)
    if before is None or before == now:
        return ()
    return (
        f"This model normalises images with {_said(now)}, the audited one with {_said(before)}. "
        "If that is not meant, give the same --mean and --std as for the audit.",
    )


def _said(known: Mapping[str, Any]) -> str:
    if not known:
        return "no mean and std"
    parts = (f"{name} {', '.join(f'{one:g}' for one in known[name])}" for name in ("mean", "std"))
    return printable(" and ".join(parts), 200)


def _predictions(classifier: Classifier, kept: Counterexamples, size: int) -> torch.Tensor:
    parts = []
    for start in range(0, len(kept.attacked), size):
        images = to_float(kept.attacked[start : start + size])
        try:
            parts.append(classifier.predict(images, size))
        except ModuleError as error:
            raise DemurError(
                f"the model does not take the images of the audit, "
                f"{tuple(images.shape[1:])}: {one_line(error, 300)}"
            ) from error
    return torch.cat(parts)


def broken_images(audit: str | Path) -> pl.DataFrame:
    """List the images that `show` can show.

    Parameters
    ----------
    audit : path
        The folder of an audit.

    Returns
    -------
    polars.DataFrame
        A row for each image, in the order of the data: `image` (its hash), `index` (its number),
        `label` and `threats` (those that broke it, a list).

    Raises
    ------
    DemurError
        If the folder holds no audit with counterexamples.
    """
    rows = load(Path(audit)).records.sort("index", maintain_order=True)
    return rows.group_by("image", "index", "label", maintain_order=True).agg(
        pl.col("threat").unique(maintain_order=True).alias("threats")
    )


def show(audit: str | Path, image: str, out: Path | None = None) -> list[str]:
    """Show the counterexamples of one image.

    Parameters
    ----------
    audit : path
        The folder of an audit.
    image : str
        The beginning of its hash, or its number in the data.
    out : path, optional
        A .png file: the original, the attacked image and the difference. Default: IMAGE.png in the
        folder of the counterexamples.

    Returns
    -------
    list of str
        Sentences.

    Raises
    ------
    DemurError
        If the audit did not break such an image, or several images begin like that.
    """
    folder = Path(audit)
    kept = load(folder)
    named = pl.col("image").str.starts_with(image)
    if image.isdecimal() and int(image) in kept.records["index"].to_list():
        named = pl.col("index") == int(image)
    rows = kept.records.with_row_index("place").filter(named)
    if rows.is_empty():
        some = ", ".join(kept.records["image"].unique(maintain_order=True).head(3))
        raise DemurError(
            f"the audit {folder} broke no image {image!r}. "
            + (f"It broke, for example: {some}." if some else "It broke no image.")
        )
    if rows["image"].n_unique() > 1:
        raise DemurError(f"{rows['image'].n_unique()} broken images begin with {image!r}.")
    first = rows.row(0, named=True)
    place = out or folder / FOLDER / f"{first['image']}.png"
    if place.suffix.lower() != ".png":
        raise DemurError(f"--out {place}: a picture must end in .png.")
    number = int(first["place"])
    save_triple(kept.original[number], kept.attacked[number], place)
    lines = [f"image {first['image']}, number {first['index']} of {first['dataset']}"]
    lines += [_line(row) for row in rows.iter_rows(named=True)]
    lines.append(f"original, attacked and the difference: {place}")
    lines.append(f"the audit: {printable(read(folder).command or folder, 2000)}")
    return lines


def _line(row: Mapping[str, Any]) -> str:
    text = {name: printable(row[name] or "") for name in ("threat", "by", "attack")}
    answer = "rejected" if row["prediction"] == -1 else f"class {row['prediction']}"
    stored = "" if row["stored_outcome"] == "wrong" else f", {row['stored_outcome']} in 8 bits"
    return (
        f"{text['threat']}: class {row['label']} became {answer}{stored}, by "
        f"{text['by'] or text['attack']}; Linf {row['linf']:.4g}, L2 {row['l2']:.4g}"
    )
