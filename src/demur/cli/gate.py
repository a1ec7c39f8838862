"""`demur gate`: the decision of an audit, as an exit code for CI."""

import os
from pathlib import Path
from typing import Annotated

import typer

from demur.cli.app import app, out_console


@app.command()
def gate(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="The folder of an audit, or its results.json.")
    ],
    rules: Annotated[Path, typer.Option("--rules", metavar="FILE", help="The rules (.toml).")],
    plan: Annotated[
        bool, typer.Option("--plan", help="Also print how many images each rule needs.")
    ] = False,
    junit: Annotated[
        Path | None, typer.Option("--junit", metavar="FILE", help="Write JUnit XML.")
    ] = None,
    markdown: Annotated[
        Path | None, typer.Option("--markdown", metavar="FILE", help="Write Markdown.")
    ] = None,
    badge: Annotated[
        Path | None,
        typer.Option("--badge", metavar="FILE", help="Write the JSON of a badge of shields.io."),
    ] = None,
) -> None:
    """Decide whether an audit keeps the rules. Exit codes: 0 passed, 1 a rule is proven broken, 2
    bad input, 3 inconclusive.
    """
    from demur.commands import gate as command

    summary = os.environ.get("GITHUB_STEP_SUMMARY")
    result = command.gate(
        run,
        rules,
        junit=junit,
        markdown=markdown,
        badge=badge,
        step_summary=Path(summary) if summary else None,
    )
    text = f"{result.text}\n{result.plan}" if plan else result.text
    out_console.print(text, markup=False, highlight=False, soft_wrap=True)
    raise typer.Exit(result.exit_code)
