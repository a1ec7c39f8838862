"""Verification of data sets: checksums, counts, labels and pixels."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from demur.data.catalogue import SOURCES, Layout, Source, missing
from demur.data.formats import NoSplitError
from demur.data.sources import counted, data_root, expect_path, load
from demur.errors import DemurError
from demur.untrusted import user_path


@dataclass(frozen=True)
class CheckResult:
    """Result of the verification of one data set.

    Parameters
    ----------
    name : str
        Name or path of the data set.
    state : {"ok", "missing", "bad"}
        Result.
    reason : str
        Counts of a good data set, or the fault of another one.
    """

    name: str
    state: Literal["ok", "missing", "bad"]
    reason: str


def verify(root: str | Path | None = None, names: Sequence[str] | None = None) -> list[CheckResult]:
    """Read data sets and verify their checksums, counts, labels and pixels.

    Nothing is known beforehand of a data set that is given by its path: its counts and ranges are
    reported.

    Parameters
    ----------
    root : str or Path, optional
        The data root, as in `data_root`.
    names : sequence of str, optional
        Names or paths, as in `load`. Default: all known data sets.

    Returns
    -------
    list of CheckResult
        One result for each name.

    Raises
    ------
    DemurError
        For a name that is neither a known data set nor a file or folder.

    Examples
    --------
    >>> verify(names=["digits"])[0].reason
    '1,438 + 359 images, 10 classes'
    """
    folder = data_root(root)
    return [
        _known(name, SOURCES[name], folder) if name in SOURCES else _path(name)
        for name in (SOURCES if names is None else names)
    ]


def _known(name: str, source: Source, root: Path) -> CheckResult:
    layout = source.layout(root)
    if layout is None:
        return CheckResult(name, "missing", missing(name, root))
    if fault := _fault(name, source, layout, root):
        return CheckResult(name, "bad", fault)
    counts = counted(layout.images)
    if layout is not source.layouts[0]:
        counts += f" (a subset of {counted(source.layouts[0].images)})"
    checksums = ", checksums match" if any(layout.files.values()) else ""
    return CheckResult(name, "ok", f"{counts} images, {source.classes} classes{checksums}")


def _fault(name: str, source: Source, layout: Layout, root: Path) -> str:
    """Name the first fault of a data set that is present; "" if there is none."""
    for split, count in layout.images.items():
        try:
            images = load(name, split, root)
        except DemurError as error:
            return str(error)
        if len(images) != count:
            return f"{split} has {len(images):,} images, not {count:,}."
        present = int((images.counts() > 0).sum())
        if present != source.classes:
            return f"{split} has images of {present} classes, not {source.classes}."
        low = int(images.images.min())
        high = int(images.images.max())
        if (low, high) != (0, 255):
            return f"{split} has pixels from {low} to {high}, not from 0 to 255."
    return ""


def _path(name: str) -> CheckResult:
    """Report the images of each split, their shape and range, and the counts of the classes."""
    expect_path(user_path(name), name)
    try:
        splits = {"train": load(name)}
        with suppress(NoSplitError):
            splits["test"] = load(name, "test")
    except DemurError as error:
        return CheckResult(name, "bad", str(error))
    first = splits["train"]
    channels, height, width = first.images.shape[1:]
    low = min(int(images.images.min()) for images in splits.values())
    high = max(int(images.images.max()) for images in splits.values())
    counts = first.counts()
    fewest, most = (
        f"{int(counts[label]):,} ({first.class_names[label]})"
        for label in (counts.argmin(), counts.argmax())
    )
    colour = "grey" if channels == 1 else "colour"
    reason = (
        f"{counted({split: len(images) for split, images in splits.items()})} images "
        f"of {width}x{height} {colour}, pixels from {low} to {high}; "
        f"{first.num_classes} classes, {fewest} to {most} images of each"
    )
    return CheckResult(name, "ok", reason)
