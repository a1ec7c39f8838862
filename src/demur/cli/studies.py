"""The commands run, demo, compare and report."""

from pathlib import Path
from typing import Annotated

import typer

from demur.cli.app import app, out_console
from demur.cli.bars import progress
from demur.cli.options import Address, DataRoot, Device, Engine, Out, ReuseStale, Seed, StoreFolder
from demur.cli.tables import table_of
from demur.errors import DemurError
from demur.progress import message


@app.command()
def run(
    study: Annotated[
        str,
        typer.Argument(
            help="comparison, certified-rejection, background-class, background-extensions, "
            "localized-training, neural-rejection, rejection-extensions or smoothing"
        ),
    ],
    profile: Annotated[
        str,
        typer.Option(
            "--profile",
            metavar="demo|desk|paper",
            help="The scale, or the path of a profile (.toml).",
        ),
    ] = "demo",
    data_root: DataRoot = None,
    out: Out = None,
    device: Device = "auto",
    seed: Seed = 0,
    engine: Engine = "local",
    address: Address = None,
    store: StoreFolder = None,
    reuse_stale: ReuseStale = False,
) -> None:
    """Run a study, or resume it; write results.json and report.html into its folder, and print the
    tables.
    """
    # Heavy imports wait until they are needed: `demur --help` answers at once.
    from demur.commands import run as command
    from demur.evaluation.results import read
    from demur.hardware import keep_buffers
    from demur.report import render

    keep_buffers()
    with progress():
        folder = command.run(
            study,
            profile,
            data_root=data_root,
            out=out,
            device=device,
            seed=seed,
            engine=engine,
            address=address,
            store=store,
            reuse_stale=reuse_stale,
        )
    results = read(folder)
    page = render(folder)
    for table in results.tables:
        out_console.print(table_of(table.title, table.rows))
    for line in [*results.summary, *(f"Warning: {warning}" for warning in results.warnings)]:
        out_console.print(f"• {line}", markup=False, highlight=False)
    out_console.print(f"Report: {page}", markup=False, highlight=False, soft_wrap=True)


@app.command()
def demo(
    out: Out = None,
    device: Device = "auto",
    seed: Seed = 0,
    studies: Annotated[
        bool, typer.Option("--studies", help="Also run the studies of the four papers.")
    ] = False,
) -> None:
    """Compare the defences on the embedded digits, in about a minute and a half."""
    from demur.commands import run as command
    from demur.hardware import keep_buffers
    from demur.report import compare as write_comparison
    from demur.report import render

    keep_buffers()
    place = out or Path("runs") / "demo"
    if place.is_file():
        raise DemurError(f"{place} is a file; --out needs a folder.")
    chosen = list(command.STUDIES) if studies else ["comparison"]
    folders = []
    with progress():
        for number, study in enumerate(chosen, start=1):
            title = command.STUDIES[study].TITLE
            message(f"{title} ({number} of {len(chosen)})" if studies else title)
            folders.append(command.run(study, "demo", out=place / study, device=device, seed=seed))
            render(folders[-1])
    _show_comparison(write_comparison(folders, place))


@app.command()
def compare(
    folders: Annotated[list[Path], typer.Argument(metavar="RUN_DIR...", help="Folders of runs.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where the page goes.")] = Path(
        "runs/comparison"
    ),
) -> None:
    """Write one page of several runs: the three outcomes of each model under each attacker."""
    from demur.report import compare as write_comparison

    _show_comparison(write_comparison(folders, out))


def _show_comparison(page: Path) -> None:
    """Print what a comparison's page says, and where it is."""
    from demur.evaluation.results import read

    results = read(page.parent)
    for table in results.tables:
        out_console.print(table_of(table.title, table.rows))
    for line in results.summary:
        out_console.print(f"• {line}", markup=False, highlight=False)
    out_console.print(f"Report: {page}", markup=False, highlight=False, soft_wrap=True)


@app.command()
def report(
    folder: Annotated[
        Path, typer.Argument(metavar="RUN_DIR", help="A run's folder, with its results.json.")
    ],
) -> None:
    """Write report.html anew from a run's results."""
    from demur.report import render

    out_console.print(f"Report: {render(folder)}", markup=False, highlight=False, soft_wrap=True)
