"""Several runs on one page: the three outcomes of each model under each attacker."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from demur.errors import DemurError
from demur.evaluation import audit_results
from demur.evaluation.results import Cost, Data, JobStep, Results, Table, read, write
from demur.evaluation.shares import FRONT
from demur.report.html import COMPARISON, DEMO, render
from demur.writing import writing

SEVERAL = (
    "Figures of runs on different images, or within a different eps, are not comparable. "
    "Each table names its images and its eps."
)


@dataclass(frozen=True)
class MainJob:
    """What the demo did before the comparison: it stands on top of the page.

    Parameters
    ----------
    steps : sequence of JobStep
    table : Table
        Outcomes before and after.
    seconds : float
        What its attacks and self-tests cost.
    """

    steps: Sequence[JobStep]
    table: Table
    seconds: float = 0.0


def check_place(out: Path) -> None:
    """Raise DemurError if a folder holds the results of a run, which the page would replace."""
    if out.is_file():
        raise DemurError(f"{out} is a file; --out needs a folder.")
    if (out / "results.json").exists() and read(out).experiment not in (COMPARISON, DEMO):
        raise DemurError(f"{out} holds a run: the comparison needs a folder of its own.")


def compare(runs: Sequence[Path], out: Path, main: MainJob | None = None) -> Path:
    """Write results.json and report.html of several runs into `out`: the front table and summary of each.

    `main` stands on top of them.
    Raises: DemurError for no run, a missing run, an audit, a run without such a table, and if `out` is one of the runs.
    """
    if not runs:
        raise DemurError("name at least one run's folder.")
    if out.resolve() in {run.resolve() for run in runs}:
        raise DemurError(f"{out} is one of the runs: the comparison needs a folder of its own.")
    check_place(out)
    tables, summary, warnings, seconds = [], list[str](), list[str](), 0.0
    names, fingerprints, profiles = [], [], []
    for folder in runs:
        results = _study(folder)
        table = next((one for one in results.tables if one.title == FRONT), None)
        if table is None:
            raise DemurError(
                f"{folder} has no table {FRONT!r}: it was made by an earlier version of demur. "
                "Run it again; its cells are kept."
            )
        name = f"{results.title} ({results.profile}, {results.data.name})"
        tables.append(replace(table, title=name, note=f"{table.note} {_where(folder, out)}"))
        which = f"{results.title}: " if len(runs) > 1 else ""
        summary += [f"{which}{sentence}" for sentence in results.summary]
        warnings += [f"{which}{warning}" for warning in results.warnings]
        names.append(results.data.name)
        profiles.append(results.profile)
        fingerprints.append(results.data.fingerprint)
        seconds += results.cost.seconds if results.cost else 0
    if len(set(fingerprints)) > 1:
        tables[0] = replace(tables[0], note=f"{tables[0].note} {SEVERAL}")
    first = read(runs[0])
    merged = Results(
        schema=1,
        experiment=COMPARISON,
        title=FRONT,
        profile=" and ".join(dict.fromkeys(profiles)),
        seed=first.seed,
        data=Data(" and ".join(dict.fromkeys(names)), rooted=False),
        tables=_distinct(tables),
        summary=summary,
        config={"runs": [os.path.relpath(folder) for folder in runs]},
        versions=first.versions,
        device=first.device,
        device_asked=first.device_asked,
        cost=Cost(round(seconds, 3)),
        warnings=warnings,
    )
    if main is not None:
        merged = _with_main(merged, main, runs, out)
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    write(merged, out)
    return render(out)


def _study(folder: Path) -> Results:
    """Read the results of a study; of an audit, say what compares audits."""
    try:
        return read(folder)
    except DemurError as error:
        fault = error
    try:
        audit_results.read(folder)
    except DemurError:
        raise fault from None
    raise DemurError(
        f"{folder} is an audit; demur compare takes folders of demur run STUDY. To compare audits "
        f"of the same images, audit the second model with --baseline {folder}, or give the rules "
        "of demur gate a [gate.baseline]."
    )


def _with_main(merged: Results, main: MainJob, runs: Sequence[Path], out: Path) -> Results:
    """Put the main job on top, and link to the reports of the runs."""
    links = [
        JobStep(f"Compare: {read(run).title}", "Its own report.", link=f"{run.name}/report.html")
        for run in runs
    ]
    return replace(
        merged,
        experiment=DEMO,
        title="A small network, hardened, and all defences beside it",
        tables=[main.table, *merged.tables],
        steps=[*main.steps, *links],
        config={"out": os.path.relpath(out), **merged.config},
        cost=Cost(round(main.seconds + (merged.cost.seconds if merged.cost else 0), 3)),
    )


def _where(folder: Path, out: Path) -> str:
    return f"Its own report: {os.path.relpath(folder / 'report.html', out)}."


def _distinct(tables: Sequence[Table]) -> list[Table]:
    """Two runs of one experiment and profile get numbers."""
    titles = [table.title for table in tables]
    return [
        replace(table, title=f"{table.title}, {titles[: place + 1].count(table.title)}")
        if titles.count(table.title) > 1
        else table
        for place, table in enumerate(tables)
    ]
