"""The commands run, demo, compare and report."""

from pathlib import Path
from typing import Annotated

import typer

from demur.cli.app import app, out_console
from demur.cli.bars import progress
from demur.cli.options import Address, DataRoot, Device, Engine, Out, ReuseStale, Seed, StoreFolder
from demur.cli.tables import table_of


@app.command()
def run(
    study: Annotated[
        str,
        typer.Argument(
            help="comparison, certified-rejection, background-class, background-extensions, "
            "defence-transfer, localized-training, neural-rejection, rejection-extensions, "
            "smoothing or smoothing-extensions"
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
    """Show the main job on embedded digits: a small network is trained, audited, hardened, audited
    again, gated and exported. Then compare all defences. An interrupted demo goes on.
    """
    from demur.commands.demo import demo as command
    from demur.commands.run import STUDIES
    from demur.hardware import keep_buffers

    keep_buffers()
    names = list(STUDIES) if studies else ["comparison"]
    with progress():
        page = command(out or Path("runs") / "demo", device=device, seed=seed, names=names)
    _show_comparison(page)


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
    for step in (one for one in results.steps if one.command):
        out_console.print(f"• {step.title}: {step.text}", markup=False, highlight=False)
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
