"""The command line: parses, calls, and prints. The only part of demur that talks to the terminal."""

import os
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from demur.errors import DemurError, DemurWarning
from demur.progress import message, reporting

if TYPE_CHECKING:
    from demur.experiments.results import Figure

INTERRUPTED = 130

app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False)
data_app = typer.Typer(no_args_is_help=True, help="Data sets: what is there, whether it is sound, and how to get more.")
app.add_typer(data_app, name="data")

FILE_WIDTH = 240  # columns of a table that goes into a file or a pipe: nothing in it is broken in two
out_console = Console()
log_console = Console(stderr=True)

DataRoot = Annotated[
    Path | None, typer.Option("--data-root", metavar="DIR", envvar="DEMUR_DATA", help="Where data sets lie.", show_default=False)
]
Out = Annotated[Path | None, typer.Option("--out", metavar="DIR", help="The run's folder. Default: runs/EXPERIMENT-PROFILE.")]
Device = Annotated[str, typer.Option("--device", metavar="auto|cpu|cuda", help="Where to compute.")]
Seed = Annotated[int, typer.Option("--seed", metavar="N", help="Seed of everything that is drawn.")]


@app.callback()
def _root() -> None:
    """demur: image classifiers that may decline to answer, and the truth about them under attack."""


@app.command()
def run(
    experiment: Annotated[str, typer.Argument(help="background-class, localized-training, neural-rejection, smoothing or together")],
    profile: Annotated[
        str, typer.Option("--profile", metavar="demo|desk|paper", help="The scale, or the path of a profile (.toml).")
    ] = "demo",
    data_root: DataRoot = None,
    out: Out = None,
    device: Device = "auto",
    seed: Seed = 0,
) -> None:
    """Run an experiment, or resume it; write results.json and report.html into its folder, and print the tables."""
    # Heavy imports wait until they are needed: `demur --help` answers at once.
    from demur.experiments import run as carry_out
    from demur.experiments.results import read
    from demur.report import render

    with _progress():
        folder = carry_out(experiment, profile, data_root=data_root, out=out, device=device, seed=seed)
    results = read(folder)
    for table in results.tables:
        out_console.print(_table(table.title, table.rows))
    for line in [*results.summary, *(f"Warning: {warning}" for warning in results.warnings)]:
        out_console.print(f"• {line}", markup=False, highlight=False)
    out_console.print(f"Report: {render(folder)}", markup=False, highlight=False, soft_wrap=True)


@app.command()
def demo(out: Out = None, device: Device = "auto", seed: Seed = 0) -> None:
    """All four papers and their defences together, on the embedded digits, in a few minutes; says where the report is."""
    from demur.experiments import EXPERIMENTS
    from demur.experiments import run as carry_out
    from demur.report import compare as write_comparison
    from demur.report import render

    place = out or Path("runs") / "demo"
    if place.is_file():
        raise DemurError(f"{place} is a file; --out needs a folder.")
    folders = []
    with _progress():
        for number, experiment in enumerate(sorted(EXPERIMENTS, key=lambda name: name != "together"), start=1):
            message(f"{EXPERIMENTS[experiment].TITLE} ({number} of {len(EXPERIMENTS)})")
            folders.append(carry_out(experiment, "demo", out=place / experiment, device=device, seed=seed))
            render(folders[-1])
    _show_comparison(write_comparison(folders, place))


@app.command()
def compare(
    folders: Annotated[list[Path], typer.Argument(metavar="RUN_DIR...", help="Folders of runs.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where the page goes.")] = Path("runs/comparison"),
) -> None:
    """Write one page of several runs: which defence keeps what, and against whom, in three outcomes."""
    from demur.report import compare as write_comparison

    _show_comparison(write_comparison(folders, out))


def _show_comparison(page: Path) -> None:
    """Print what a comparison's page says, and where it is."""
    from demur.experiments.results import read

    results = read(page.parent)
    for table in results.tables:
        out_console.print(_table(table.title, table.rows))
    for line in results.summary:
        out_console.print(f"• {line}", markup=False, highlight=False)
    out_console.print(f"Report: {page}", markup=False, highlight=False, soft_wrap=True)


@app.command()
def attack(
    photo: Annotated[Path, typer.Argument(metavar="PHOTO", help="A photograph: a file of any usual format.")],
    network: Annotated[str, typer.Option("--network", metavar="NAME", help="resnet18, mobilenet_v2, inception_v3, ...")],
    target: Annotated[str, typer.Option("--target", metavar="CLASS", help="Of ImageNet's classes, by name, WordNet id or number.")],
    weights: Annotated[Path | None, typer.Option("--weights", metavar="FILE", help="The network's; else those in the data root.")] = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE", help="A .png file. Default: PHOTO-attacked.png, here.")] = None,
    step_size: Annotated[float, typer.Option("--step-size", help="Euclidean length of a step, on pixels in [0, 1].")] = 0.1,
    steps: Annotated[int, typer.Option("--steps", help="At most so many.")] = 1000,
    data_root: DataRoot = None,
    device: Device = "auto",
) -> None:
    """Attack a photograph until a network takes it for another class; write it, and it beside the original and the difference."""
    from demur.data import as_floats
    from demur.experiments.photograph import answer_on, attack_photograph
    from demur.hardware import pick_device
    from demur.report.pictures import AMPLIFIED, save_picture, save_triple

    place = out or Path(f"{photo.stem}-attacked.png")
    if place.suffix.lower() != ".png" or place.resolve() == photo.resolve():
        raise DemurError(f"--out {place}: the attacked picture must end in .png, and not take the place of the photograph.")
    chosen = pick_device(device)
    found = attack_photograph(photo, network, target, weights=weights, data_root=data_root, step_size=step_size, steps=steps, device=chosen)
    stored = save_picture(found.attacked, place)
    triple = place.with_name(f"{place.stem}-triple.png")
    save_triple(found.original, found.attacked, triple)
    answer, sure = answer_on(found.classifier, as_floats(stored[None]))
    name, before, after = found.target
    lines = [
        f"{photo}: {found.photo.size[1]}x{found.photo.size[0]} pixels{f', {found.photo.converted}' if found.photo.converted else ''}",
        f"seen by {network} in its size: the middle, {stored.shape[2]}x{stored.shape[1]} pixels",
        f"before: {found.before[0]} ({found.before[1]:.1%}); {name} ({before:.2%})",
        f"after, as {place} has it: {answer} ({sure:.1%}); {name} ({after:.2%})",
        f"moved by {found.l2:.3f} in L2, no pixel by more than {255 * found.linf:.0f}/255, in {found.steps} steps",
        f"original, attacked, and the difference {AMPLIFIED} times: {triple}",
    ]
    for line in lines:
        out_console.print(line, markup=False, highlight=False, soft_wrap=True)
    if not found.found:
        raise DemurError(f"{network} does not take it for {name} after {found.steps} steps: allow more --steps, or a larger --step-size.")


@app.command()
def report(folder: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="A run's folder, with its results.json.")]) -> None:
    """Write report.html anew from a run's results."""
    from demur.report import render

    out_console.print(f"Report: {render(folder)}", markup=False, highlight=False, soft_wrap=True)


@data_app.command("list")
def list_data(data_root: DataRoot = None) -> None:
    """Say which data sets are there, and which could be downloaded; and weights of networks for photographs."""
    from demur import data
    from demur.networks import weights

    _existing(data_root)
    out_console.print(f"Data sets under {data.data_root(data_root)}", markup=False, highlight=False, soft_wrap=True)
    for status in data.describe(data_root):
        absent = f"no; {status.megabytes:,} MB to download" if status.megabytes else "no, nor to download"
        there = absent if status.where is None else "embedded" if status.where == "embedded" else "there"
        part = f", a subset of {data.counted(status.subset_of)}" if status.subset_of else ""
        line = f"{status.name:18}{there:26}{data.counted(status.images)} images of {status.classes} classes{part}"
        out_console.print(line, highlight=False, soft_wrap=True)
        out_console.print(f"{'':18}{status.about}", style="dim", markup=False, highlight=False, soft_wrap=True)
    known = {name: "there" if weights.find(name, data_root) else "no" for name in weights.URLS}
    said = ", ".join(f"{name} {state}" for name, state in known.items())
    out_console.print(f"Weights of networks for photographs: {said}", markup=False, highlight=False, soft_wrap=True)
    out_console.print("Get one with: demur data get NAME. A path of an .npz file or of a folder of images by class works as a name, too.")


@data_app.command("check")
def check_data(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME]...", help="Data sets to check, by name or path; all if none is named.")
    ] = None,
    data_root: DataRoot = None,
) -> None:
    """Verify counts, checksums and ranges of the data sets that are there. Exits with 1 if one is bad."""
    from demur import data

    _existing(data_root)
    results = data.check(data_root, names or None)
    for result in results:
        style = {"ok": "green", "bad": "red"}.get(result.state, "dim")
        out_console.print(f"{result.state:8}{result.name:17} {result.reason}", style=style, markup=False, highlight=False, soft_wrap=True)
    if any(result.state == "bad" or (names and result.state == "missing") for result in results):
        raise typer.Exit(1)


def _existing(data_root: Path | None) -> None:
    """A folder that somebody names is there, or it is misspelt; the one in the cache need not be there yet."""
    if data_root and not data_root.expanduser().is_dir():
        raise DemurError(f"there is no folder {data_root}, where --data-root or DEMUR_DATA says that data sets lie.")


@data_app.command("get")
def get_data(name: Annotated[str, typer.Argument(metavar="NAME")], data_root: DataRoot = None) -> None:
    """Download a data set, or the weights of a network for photographs (resnet18, inception_v3, ...), into the data root."""
    from demur import data
    from demur.networks import weights

    with _progress():
        if name in weights.URLS:
            weights.download(name, data_root)
        else:
            data.get(name, data_root)
    out_console.print(f"{name} is in {data.data_root(data_root)}", markup=False, highlight=False, soft_wrap=True)


def main() -> None:
    """Run the command line. Bad input is one line on stderr and exit code 2; an interruption is exit code 130."""
    # What libraries warn their callers of is not for the user of a command.
    warnings.filterwarnings("ignore", module=r"lightning(\..*)?|torch(\..*)?")
    warnings.filterwarnings("ignore", category=DemurWarning)  # a run's results say it of each cell
    if not out_console.is_terminal and "COLUMNS" not in os.environ:
        out_console.width = FILE_WIDTH
    try:
        code = app(standalone_mode=False)
        if code == INTERRUPTED:  # typer catches Ctrl-C itself, and gives this
            raise KeyboardInterrupt
        sys.exit(code)
    except DemurError as error:
        _fail(str(error), 2)
    except typer.TyperException as error:
        message: str = error.format_message() if hasattr(error, "format_message") else str(error)
        if message.startswith("Usage:"):  # no command at all: the help is the answer
            out_console.print(message, markup=False, highlight=False)
            sys.exit(2)
        said = " ".join(message.split())
        _fail(f"{said}{'' if said.endswith(('.', '?', '!')) else '.'} See: demur --help", 2)
    except (KeyboardInterrupt, typer.Abort):
        _fail("interrupted. The same command goes on where it was.", INTERRUPTED)
    except BrokenPipeError:
        sys.exit(141)


def _fail(message: str, code: int) -> None:
    log_console.print(f"demur: {message}", style="red", markup=False, highlight=False, soft_wrap=True)
    sys.exit(code)


def _table(title: str, rows: "list[Figure]") -> Table:
    """A results table for the terminal: measured, and the paper's figure in brackets."""
    from demur.report import pivot

    columns, lines = pivot(rows)
    table = Table(
        title=title, title_justify="left", caption="\\[the paper's figure]" if any(row.paper is not None for row in rows) else None
    )
    grouped = any(line.group for line in lines)
    if grouped:
        table.add_column("", overflow="fold")
    table.add_column("", overflow="fold")
    for column in columns:
        table.add_column(column, justify="right", overflow="fold")
    above = None
    for line in lines:
        cells = [_cell(line.cells[column]) if column in line.cells else "" for column in columns]
        head = [line.group if line.group != above else ""] if grouped else []
        if above not in (None, line.group):
            table.add_section()
        above = line.group
        table.add_row(*head, line.row, *cells)
    return table


def _cell(figure: "Figure") -> str:
    from demur.report import number

    if figure.measured is None:
        text = figure.note or "—"
    else:
        text = number(figure.measured, figure.unit) + (f" ± {number(figure.sd, figure.unit)}" if figure.sd is not None else "")
    return text if figure.paper is None else f"{text} [{number(figure.paper, figure.unit)}]"


class _Bars:
    """Progress as rich bars where there is a terminal, else as a line for each finished piece of the outermost job."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._began = time.monotonic()

    def start(self, job: str, total: float) -> int:
        """Show a bar."""
        return self._progress.add_task("  " * len(self._progress.tasks) + job, total=total, note="")

    def advance(self, job: int, amount: float, note: str) -> None:
        """Move the bar."""
        self._progress.update(TaskID(job), advance=amount, note=note)
        outermost = self._progress.tasks[0]
        if outermost.id == job and amount and not log_console.is_terminal:
            self.message(f"{outermost.percentage:3.0f} %  {time.monotonic() - self._began:6.0f} s  {note}")

    def finish(self, job: int) -> None:
        """Take the bar away."""
        self._progress.remove_task(TaskID(job))

    def message(self, text: str) -> None:
        """Print a line above the bars."""
        log_console.print(text, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def _progress() -> Iterator[None]:
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    with (
        Progress(*columns, console=log_console, transient=True, disable=not log_console.is_terminal, speed_estimate_period=600) as progress,
        reporting(_Bars(progress)),
    ):
        yield


if __name__ == "__main__":
    main()
