"""The command line, as a user calls it."""

import io
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout

import pytest

from demur import cli


def demur(*words, cwd=None):
    """The command as a user calls it, but in this process: starting a new one takes seconds."""
    out, error = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(error), pytest.raises(SystemExit) as left:
        patch.setattr(sys, "argv", ["demur", *map(str, words)])
        if cwd:
            patch.chdir(cwd)
        cli.main()
    return subprocess.CompletedProcess(words, left.value.code or 0, out.getvalue(), error.getvalue())
