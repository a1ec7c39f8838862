"""The page: what the results say, arranged for the template. Everything from a run folder is text and escaped."""

import base64
import hashlib
import json
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from demur.evaluation.results import Curve, Measurement, Results, Table, read
from demur.report import gallery as galleries
from demur.report.figures import describe, panel
from demur.report.gallery import Gallery
from demur.report.pivot import OUTCOMES, Line, number, pivot
from demur.writing import write_text

COMPARISON = "compare"
"""The experiment name of a page of several runs: the command that makes it, and no study."""

DEMO = "demo"
"""The experiment name of the page of `demur demo`: a comparison with the main job on top."""

FACETS = ("outcome", "model", "attack", "attacker")

_TEMPLATES = PackageLoader("demur.report", ".")
ENVIRONMENT = Environment(
    loader=_TEMPLATES,
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def render(run_folder: Path) -> Path:
    """Write report.html into a run folder from its results.json and, if there is one, its gallery.safetensors.

    Raises: DemurError if results.json is missing or either file is not ours, or the folder cannot be written to.
    """
    results = read(run_folder)
    text = page(results, galleries.read(run_folder))
    path = run_folder / "report.html"
    write_text(path, text)
    return path


def page(results: Results, gallery: Gallery | None) -> str:
    """Give the whole page as text."""
    script = asset("script.js")
    return ENVIRONMENT.get_template("template.html").render(
        run=results,
        # Its tables come first: they are what it is for.
        comparison=results.experiment in (COMPARISON, DEMO),
        command=_command(results),
        tables=[_table(table) for table in results.tables],
        curves=[
            curve_view(curve, f"curve{place}")
            for place, curve in enumerate(results.curves, start=1)
        ],
        gallery=gallery,
        facets=facets(gallery) if gallery else {},
        config=list(_flat(results.config)),
        outcomes=OUTCOMES,
        spread=any(row.sd is not None for table in results.tables for row in table.rows),
        papers=any(row.paper is not None for table in results.tables for row in table.rows),
        shares=_shares,
        style=asset("style.css"),
        script=script,
        # The page may run this script only, and load nothing: a browser then enforces what the escaping intends.
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii"),
    )


@dataclass(frozen=True)
class _TableView:
    """A pivoted table: columns with the unit their figures share, lines by group, and the notes under it."""

    title: str
    note: str
    columns: list[tuple[str, str]]
    groups: list[tuple[str, list[Line]]]
    notes: list[str]
    bars: bool

    @property
    def departs(self) -> bool:
        """Whether any figure is marked."""
        return any(
            figure.departs
            for _, lines in self.groups
            for line in lines
            for figure in line.cells.values()
        )

    @property
    def stacks(self) -> bool:
        """Whether a phone shows it line by line instead of as a table."""
        return self.bars or len(self.columns) > 1


def _table(table: Table) -> _TableView:
    names, lines = pivot(table.rows)
    units = {
        name: {line.cells[name].unit for line in lines if name in line.cells} for name in names
    }
    return _TableView(
        title=table.title,
        note=table.note,
        columns=[(name, units[name].pop() if len(units[name]) == 1 else "") for name in names],
        groups=[
            (group, list(members)) for group, members in groupby(lines, key=lambda line: line.group)
        ],
        notes=list(
            dict.fromkeys(row.note for row in table.rows if row.note and row.measured is not None)
        ),
        bars=any(_shares(line, of) for line in lines for of in ("measured", "paper")),
    )


def _shares(line: Line, of: str) -> list[tuple[str, float]]:
    """Give the outcomes of a line as percentages of a bar; none unless correct and wrong are both known."""
    figures = [
        line.cells[name] for name in OUTCOMES if name in line.cells and line.cells[name].unit == "%"
    ]
    found = [(figure.column, getattr(figure, of)) for figure in figures]
    known = [(name, min(100.0, max(0.0, value))) for name, value in found if value is not None]
    return known if {"correct", "wrong"} <= dict(known).keys() else []


@dataclass(frozen=True)
class _CurveView:
    """A curve with its panels: one a series, or none where a single x makes no curve."""

    curve: Curve
    panels: list[Markup]
    descriptions: list[str]


def curve_view(curve: Curve, prefix: str) -> _CurveView:
    """Draw a curve. Ids in the drawing begin with `prefix`, since a page has many."""
    drawn = len(set(curve.x)) > 1
    return _CurveView(
        curve,
        panels=[panel(curve, one, f"{prefix}-{i}") for i, one in enumerate(curve.series, start=1)]
        if drawn
        else [],
        descriptions=[describe(curve, one) for one in curve.series],
    )


def facets(gallery: Gallery) -> dict[str, list[str]]:
    """What the gallery can be filtered by: the facets with more than one value, in order of appearance."""
    values = {
        facet: list(dict.fromkeys(getattr(card.item, facet) for card in gallery.cards))
        for facet in FACETS
    }
    values["outcome"] = [name for name in OUTCOMES if name in values["outcome"]]
    return {facet: known for facet, known in values.items() if len(known) > 1}


def _command(results: Results) -> str:
    """Give the command that repeats the run, quoted: copying it must not run text of an untrusted file."""
    if results.experiment == COMPARISON:
        return shlex.join(["demur", "compare", *map(str, results.config.get("runs", []))])
    options = [] if results.experiment == DEMO else ["--profile", results.profile]
    options += ["--data-root", "ROOT"] if results.data.rooted else []
    options += ["--seed", str(results.seed)] if results.seed else []
    options += ["--device", results.device_asked] if results.device_asked != "auto" else []
    if results.experiment == DEMO:
        more = ["--studies"] if len(results.config.get("runs", [])) > 1 else []
        place = ["--out", str(results.config.get("out", ""))]
        return shlex.join(["demur", "demo", *more, *options, *place])
    return shlex.join(["demur", "run", results.experiment, *options])


def _flat(config: dict[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    """Give a nested configuration as (dotted name, value) pairs."""
    for name, value in config.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{above}{name}.")
        else:
            yield (
                f"{above}{name}",
                value if isinstance(value, str) else json.dumps(value, ensure_ascii=False),
            )


def asset(name: str) -> Markup:
    """Give a file of this package that goes into the page unchanged."""
    return Markup(_TEMPLATES.get_source(ENVIRONMENT, name)[0])


def _signed(value: float, unit: str = "") -> str:
    return f"{'+' if value > 0 else ''}{number(value, unit)}"


def _duration(seconds: float) -> str:
    """Write a time as people say it."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"


def _basis(figure: Measurement) -> str:
    """Say what a measured figure rests on: its interval, the number of images, the number of splits."""
    parts = []
    if figure.low is not None and figure.high is not None:
        parts.append(
            f"95 % over these images {number(figure.low, figure.unit)}–{number(figure.high, figure.unit)}"
        )
    if figure.n is not None:
        parts.append(f"n {figure.n:,}")
    if figure.splits is not None:
        parts.append(f"{figure.splits} split{'s' if figure.splits != 1 else ''}")
    return ", ".join(parts)


ENVIRONMENT.filters.update(number=number, signed=_signed, duration=_duration, basis=_basis)
