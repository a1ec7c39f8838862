"""Options that several commands have."""

from pathlib import Path
from typing import Annotated

import typer

DataRoot = Annotated[
    Path | None,
    typer.Option(
        "--data-root",
        metavar="DIR",
        envvar="DEMUR_DATA",
        help="Where data sets lie.",
        show_default=False,
    ),
]
Out = Annotated[
    Path | None,
    typer.Option("--out", metavar="DIR", help="The run's folder. Default: runs/STUDY-PROFILE."),
]
Device = Annotated[str, typer.Option("--device", metavar="auto|cpu|cuda", help="Where to compute.")]
Seed = Annotated[int, typer.Option("--seed", metavar="N", help="Seed of everything that is drawn.")]

Engine = Annotated[str, typer.Option("--engine", metavar="local|ray", help="Where tasks run.")]
Address = Annotated[
    str | None,
    typer.Option("--address", metavar="ADDRESS", help="Of a Ray cluster. Default: this machine."),
]
StoreFolder = Annotated[
    Path | None,
    typer.Option(
        "--store",
        metavar="DIR",
        help="Computed results, which runs may share. Default: DEMUR_STORE, or the folder "
        "demur-store beside the run's folder; store/ in that of an audit.",
    ),
]
ReuseStale = Annotated[
    bool,
    typer.Option("--reuse-stale", help="Use results that earlier code computed; tables say so."),
]
