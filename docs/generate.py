"""Write the parts of the documents that follow from the code and from results/.

    python docs/generate.py    # rewrites what stands between markers

A part begins with a marker and ends with `<!-- end -->`. What stands outside is written by hand.

`<!-- table: TITLE -->`, on the page of a study
    The table of this title in results/STUDY-desk/results.json.
`<!-- summary -->`, `<!-- warnings -->`, on the page of a study
    The sentences of the same file.
`<!-- keys: STUDY TABLE -->`, in profiles.md
    The keys of a table of a profile, without TABLE those outside of all tables. The description of
    a field, `Field(description="MEANING | UNIT")`, gives the words; a third part names a default
    that has no value. Words of a field without a description stay as they are on the page.
"""

import re
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from demur.evaluation.results import Results, read
from demur.report import number, pivot

ROOT = Path(__file__).resolve().parents[1]
PAGES = (
    "background-class",
    "background-extensions",
    "defence-transfer",
    "localized-training",
    "neural-rejection",
    "rejection-extensions",
    "smoothing",
    "profiles",
)
PART = re.compile(
    r"<!-- (table|summary|warnings|keys)(?:: (.*?))? -->\n(.*?)<!-- end -->", re.DOTALL
)


def generated(page: str, text: str) -> str:
    """Give the text of a page with all generated parts made anew."""
    results = None if page == "profiles" else read(ROOT / "results" / f"{page}-desk")

    def made(found: re.Match[str]) -> str:
        kind, name, old = found.groups()
        if kind == "keys":
            lines = keys(name, old)
        else:
            assert results is not None
            lines = table(results, name) if kind == "table" else sentences(results, kind)
        head = found[0].split("\n", 1)[0]
        return "\n".join([head, "", *lines, "", "<!-- end -->"])

    return PART.sub(made, text)


def table(results: Results, title: str) -> list[str]:
    """Give a table of results and its note: measured, and the paper's figure in brackets."""
    found = {one.title: one for one in results.tables}[title]
    columns, lines = pivot(found.rows)
    grouped = any(line.group for line in lines)
    units = {
        name: {one.unit for line in lines for one in _cell(line.cells, name)} for name in columns
    }
    shown = [f"{name} (%)" if units[name] == {"%"} else name for name in columns]
    head = ["", *([""] if grouped else []), *shown]
    rows = [f"| {' | '.join(head)} |", "|" + "---|" * (1 + grouped) + "---:|" * len(columns)]
    for line in lines:
        first = [line.group, line.row] if grouped else [line.row]
        cells = [figure(one) for name in columns for one in _cell(line.cells, name) or [None]]
        rows.append(f"| {' | '.join([*first, *cells])} |")
    return [*rows, *(["", found.note] if found.note else [])]


def _cell(cells: dict[str, Any], name: str) -> list[Any]:
    return [cells[name]] if name in cells else []


def figure(one: Any) -> str:
    """Write a figure as the terminal does."""
    if one is None:
        return ""
    text = one.note.strip() or "—"
    if one.measured is not None:
        text = number(one.measured, one.unit)
        text += "" if one.sd is None else f" ± {number(one.sd, one.unit)}"
    if one.paper is None:
        return text
    paper = number(one.paper, one.unit)
    paper += "" if one.paper_sd is None else f" ± {number(one.paper_sd, one.unit)}"
    return f"{text} [{paper}]"


def sentences(results: Results, kind: str) -> list[str]:
    """Give the sentences of a study, or its warnings, as a list."""
    said = results.summary if kind == "summary" else results.warnings
    return [f"- {one}" for one in said]


def tables_of(model: type[BaseModel], name: str = "") -> Iterator[tuple[str, dict[str, FieldInfo]]]:
    """Give the name of each table of a profile with its own keys."""
    inner = {}
    for key, field in model.model_fields.items():
        kinds = (field.annotation, *get_args(field.annotation))
        models = [one for one in kinds if isinstance(one, type) and issubclass(one, BaseModel)]
        if models:
            inner[key] = models[0]
    yield name, {key: one for key, one in model.model_fields.items() if key not in inner}
    for key, part in inner.items():
        yield from tables_of(part, f"{name}.{key}".lstrip("."))


def keys(place: str, old: str) -> list[str]:
    """Give the table of the keys of a part of a profile, such as "smoothing attack"."""
    study, _, name = place.partition(" ")
    module = import_module(f"demur.studies.{study.replace('-', '_')}")
    fields = dict(tables_of(module.Profile))[name]
    return ["| key | meaning | unit | default |", "|---|---|---|---|", *rows_of(fields, old)]


def rows_of(fields: Mapping[str, FieldInfo], old: str) -> list[str]:
    """Give a row for each field; `old` is the table on the page."""
    cells = [line.strip("|").split(" | ") for line in old.splitlines() if line.startswith("| `")]
    known = {row[0].strip(" `"): [cell.strip(" |") for cell in row[1:]] for row in cells}
    rows = []
    for key, field in fields.items():
        words = [*known.get(key, []), "", "", ""][:3]
        if field.description:
            parts = [part.strip() for part in field.description.split(" | ")]
            words = [*parts, *words[len(parts) :]]
        meaning, unit, said = words
        default = _default(field, said)
        rows.append(f"| `{key}` | {meaning} | {unit} | {default} |".replace("  ", " "))
    return rows


def _default(field: FieldInfo, said: str) -> str:
    """Write the default of a field; what has no value is said in words."""
    value = field.default
    if field.is_required():
        return ""
    if isinstance(value, tuple) and value:
        return ", ".join(_written(one) for one in value)
    if isinstance(value, int | float):
        return said if said and said.split(":")[0] == repr(value) else repr(value)
    return f'`"{value}"`' if value else said


def _written(one: str | float) -> str:
    if isinstance(one, str):
        return one
    return f"{one:g}" if one == round(one, 6) else repr(one)


def main() -> None:
    """Rewrite the pages."""
    for page in PAGES:
        path = ROOT / "docs" / f"{page}.md"
        path.write_text(generated(page, path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
