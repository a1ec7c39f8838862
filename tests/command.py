"""The command line, as a user calls it; and what every experiment is asked by its tests."""

import io
import re
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout

import pytest

from demur import DemurError, cli
from demur.commands.run import run
from demur.evaluation.results import read


def demur(*words, cwd=None):
    """The command as a user calls it, but in this process: starting a new one takes seconds."""
    out, error = io.StringIO(), io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        redirect_stdout(out),
        redirect_stderr(error),
        pytest.raises(SystemExit) as left,
    ):
        patch.setattr(sys, "argv", ["demur", *map(str, words)])
        if cwd:
            patch.chdir(cwd)
        cli.main()
    return subprocess.CompletedProcess(
        words, left.value.code or 0, out.getvalue(), error.getvalue()
    )


def check_refusal(experiment, text, said, folder):
    """A profile of that text is refused with these words, and nothing is written."""
    (folder / "wrong.toml").write_text(text)
    with pytest.raises(DemurError, match=said):
        run(experiment, str(folder / "wrong.toml"), out=folder / "out")
    assert not (folder / "out").exists()


def check_interruption(experiment, profile, root, uninterrupted, out, monkeypatch, module, cell):
    """R10. A run that is interrupted at the third of the cells that `module.cell` makes ends with
    the figures of the uninterrupted one.
    """
    whole, count = getattr(module, cell), [0]

    def interrupt(*given, **named):
        count[0] += 1
        if count[0] == 3:
            raise KeyboardInterrupt
        return whole(*given, **named)

    monkeypatch.setattr(module, cell, interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(experiment, profile, data_root=root, out=out)
    monkeypatch.setattr(module, cell, whole)
    again = read(run(experiment, profile, data_root=root, out=out))
    assert again.tables == read(uninterrupted).tables and again.curves == read(uninterrupted).curves


def without_pictures(page):
    """The text of a page without its embedded pictures, which may hold any letters."""
    return re.sub(r"base64,[A-Za-z0-9+/=]+", "", page)
