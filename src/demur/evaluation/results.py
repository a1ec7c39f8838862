"""The files of a run: results.json and the gallery.

They are checked on reading, because a file may come from an untrusted source.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, model_validator
from pydantic.dataclasses import dataclass
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from demur.errors import DemurError
from demur.untrusted import ARRAYS, opened, read_bytes
from demur.writing import replacing, write_text

CHECKED = ConfigDict(allow_inf_nan=False)  # NaN and infinity are no figures

Share = Annotated[float, Field(ge=0, le=1)]


@dataclass(frozen=True, config=CHECKED)
class Measurement:
    """One cell of a table: what was measured, and what the paper says, in `unit`.

    `sd` is over `splits`; `low` and `high` bound the 95 % interval over the `n` images. A
    `measured` of None is a figure that is not there yet; `note` says why.
    """

    row: str
    column: str
    group: str = ""
    unit: str = ""
    paper: float | None = None
    paper_sd: float | None = None
    measured: float | None = None
    sd: float | None = None
    splits: int | None = None
    n: int | None = None
    low: float | None = None
    high: float | None = None
    note: str = ""

    @property
    def difference(self) -> float | None:
        """Measured minus paper."""
        return None if self.measured is None or self.paper is None else self.measured - self.paper

    @property
    def departs(self) -> int:
        """+1 or -1 where the figure lies more than two of the paper's sd above or below the
        paper's, else 0.
        """
        if (
            self.difference is None
            or self.paper_sd is None
            or abs(self.difference) <= 2 * self.paper_sd
        ):
            return 0
        return 1 if self.difference > 0 else -1


@dataclass(frozen=True, config=CHECKED)
class Table:
    """A titled table of figures, one a row; each (group, row, column) stands once."""

    title: str
    rows: list[Measurement]
    note: str = ""

    @model_validator(mode="after")
    def _places_differ(self) -> "Table":
        places = [(row.group, row.row, row.column) for row in self.rows]
        if twice := next((place for place in places if places.count(place) > 1), None):
            raise ValueError(f"it has two figures for {' / '.join(part for part in twice if part)}")
        return self


@dataclass(frozen=True, config=CHECKED)
class Series:
    """The shares of the three outcomes at each x of a curve, over `n` images."""

    name: str
    correct: list[Share]
    rejected: list[Share]
    wrong: list[Share]
    n: int | None = None


@dataclass(frozen=True, config=CHECKED)
class Curve:
    """Series of outcomes against one x (an attack's strength, a threshold)."""

    title: str
    x_label: str
    x: Annotated[list[float], Field(min_length=1)]
    series: list[Series]
    note: str = ""

    @model_validator(mode="after")
    def _lengths_agree(self) -> "Curve":
        for one in self.series:
            if {len(one.correct), len(one.rejected), len(one.wrong)} != {len(self.x)}:
                raise ValueError(f"the series {one.name!r} has not one share per x")
        return self


@dataclass(frozen=True, config=CHECKED)
class Data:
    """The images that were used."""

    name: str
    fingerprint: str = ""
    images: int | None = None
    classes: int | None = None
    rooted: bool = True
    """Whether they lie under a data root, which the command then has to name."""


@dataclass(frozen=True, config=CHECKED)
class CellCost:
    """What one cell of the experiment cost when it was computed."""

    cell: str
    seconds: float
    forwards: int = 0
    backwards: int = 0


@dataclass(frozen=True, config=CHECKED)
class Cost:
    """What the run cost, in all and cell by cell."""

    seconds: float
    cells: list[CellCost] = field(default_factory=list)


@dataclass(frozen=True, config=CHECKED)
class JobStep:
    """A step of the demo's main job: what it found, the command that does it, and its report.

    `link` is the path of a page below the folder of these results.
    """

    title: str
    text: str
    command: str = ""
    link: Annotated[str, Field(pattern=r"^(?:(?:[A-Za-z0-9_-]+/)*[A-Za-z0-9_-]+\.html)?$")] = ""


@dataclass(frozen=True, config=CHECKED)
class Results:
    """One run."""

    schema: Literal[1]
    experiment: str
    title: str
    profile: str
    seed: int
    data: Data
    tables: list[Table]
    source: str = ""
    summary: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    code: str = ""
    """Fingerprint of the code of the study. Version 1 had none."""
    device: str = ""
    device_asked: str = "auto"
    curves: list[Curve] = field(default_factory=list)
    cost: Cost | None = None
    warnings: list[str] = field(default_factory=list)
    steps: list[JobStep] = field(default_factory=list)
    """Of the main job, if the first table is about it."""


@dataclass(frozen=True, config=CHECKED)
class Picture:
    """What was done to one image of the gallery, and what the model made of it before and after."""

    label: str
    model: str
    attack: str
    attacker: str
    clean_decision: str
    clean_score: float
    decision: str
    score: float
    outcome: Literal["correct", "rejected", "wrong"]
    l2: float
    linf: float


_RESULTS = TypeAdapter(Results)
_PICTURES = TypeAdapter(list[Picture])


def write(results: Results, folder: Path) -> None:
    """Write results.json into a run's folder."""
    write_text(
        folder / "results.json",
        json.dumps(asdict(results), indent=1, ensure_ascii=False, allow_nan=False) + "\n",
    )


def read(folder: Path) -> Results:
    """Read results.json of a run's folder.

    Raises
    ------
    DemurError
        If the file is missing or no result of demur.
    """
    if folder.is_file():
        raise DemurError(f"{folder} is a file; the run's folder is wanted: {folder.parent}")
    path = folder / "results.json"
    remedy = f"Make it with: demur run STUDY --out {folder}"
    try:
        return _RESULTS.validate_json(read_bytes(path))
    except DemurError as error:
        raise DemurError(f"{error} {remedy}") from error
    except ValidationError as error:
        raise DemurError(
            f"{path} is not a demur result of schema 1 ({_fault(error)}). {remedy}"
        ) from error


def write_gallery(
    folder: Path, pictures: Sequence[Picture], original: Tensor, attacked: Tensor
) -> None:
    """Write gallery.safetensors into a run's folder: uint8 images (N, C, H, W) before and after the
    attack, and a description of each.
    """
    items = json.dumps([asdict(picture) for picture in pictures])
    with replacing(folder / "gallery.safetensors") as partial:
        save_file(
            {"original": original.contiguous(), "attacked": attacked.contiguous()},
            partial,
            metadata={"items": items},
        )


def read_gallery(folder: Path) -> tuple[list[Picture], Tensor, Tensor] | None:
    """Read gallery.safetensors of a run's folder: descriptions, and images before and after the
    attack. None without such a file.

    Raises
    ------
    DemurError
        If the file is no gallery: `original` and `attacked` uint8 (N, C, H, W) with C 1 or 3, and N
        descriptions.
    """
    path = folder / "gallery.safetensors"
    if not path.exists():
        return None
    with opened(path, ARRAYS):
        pass
    try:
        with safe_open(path, "pt") as file:
            original, attacked = file.get_tensor("original"), file.get_tensor("attacked")
            pictures = _PICTURES.validate_json((file.metadata() or {}).get("items", ""))
        _check_gallery(original, attacked, len(pictures))
    except (OSError, SafetensorError, ValueError) as error:
        reason = (
            _fault(error)
            if isinstance(error, ValidationError)
            else " ".join(str(error).split())[:200]
        )
        raise DemurError(
            f"{path} is not a gallery ({reason}). Delete it, or make it anew with: demur run STUDY"
        ) from error
    return (pictures, original, attacked) if pictures else None


def _check_gallery(original: Tensor, attacked: Tensor, count: int) -> None:
    if original.dtype != torch.uint8 or attacked.dtype != torch.uint8:
        raise ValueError("its images are not uint8")
    shape = original.shape
    if attacked.shape != shape or len(shape) != 4 or shape[1] not in (1, 3) or 0 in shape[2:]:
        raise ValueError(
            f"its images have the shapes {tuple(shape)} and {tuple(attacked.shape)}, "
            "not (N, 1 or 3, H, W) twice"
        )
    if len(original) != count:
        raise ValueError(f"it has {len(original)} images and {count} items")


def _fault(error: ValidationError) -> str:
    """Say the first fault that a check found, in one short line: where, and what."""
    first = error.errors(include_url=False, include_input=False)[0]
    place = ".".join(str(part) for part in first["loc"])
    return " ".join(f"{place}: {first['msg']}".removeprefix(": ").split())[:200]
