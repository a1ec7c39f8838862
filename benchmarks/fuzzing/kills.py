"""Runs that are killed at random moments, and then resumed: their figures must not change."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from functools import cache
from pathlib import Path

import numpy as np

from fuzzing.outcomes import Case, FindingError, Outcome

PROFILE = """
data = ["digits"]
train_images = 100
epochs = 1
batch_size = 32
attacked_epochs = 1
attack_steps = 2
box = 12
made_per_kind = 10
per_class = 5

[attack]
images = 12
eps = 0.1
steps = 5
ensemble_steps = 2
n_targets = 1
n_queries = 5
"""
CALL = "from demur.cli import main; main()"
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
LIMIT = 300
"""Seconds of a run that is not killed."""


def part() -> Case:
    """Carry out an undisturbed run, and give the function of a case: one kill and one resume."""
    undisturbed()
    return try_kill


@cache
def undisturbed() -> tuple[str, float]:
    """Give the figures of a run that is not killed, and the seconds that it takes."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        figures = _finished(Path(folder))
        return figures, time.monotonic() - began


def try_kill(rng: np.random.Generator) -> Outcome:
    """Kill a run by a random signal after a random time, resume it, and compare its figures.

    A run that ends before the signal is no case: it is drawn again with a shorter time.
    """
    figures, longest = undisturbed()
    chosen = SIGNALS[rng.integers(len(SIGNALS))]
    delay = float(rng.uniform(0, longest))
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "0"
        attempt = 0
        while (said := _killed(place, chosen, delay)) is None:
            attempt += 1
            place = Path(folder) / str(attempt)
            delay = float(rng.uniform(0, delay))
        about = f"{chosen.name} after {delay:.2f} s"
        if "Traceback" in said and delay > 0.3:  # before that, Python has not begun demur
            raise FindingError(f"{about}: {said[-1500:]}")
        if _finished(place) != figures:
            raise FindingError(f"{about}: the figures of the resumed run differ")
        left = [path for path in place.rglob(".unfinished-*") if path.parent == place / "run"]
        if len(left) > 1:
            raise FindingError(f"{about}: {len(left)} temporary files are left: {left}")
    return "valid"


def _killed(folder: Path, chosen: signal.Signals, delay: float) -> str | None:
    """Start a run, end it by a signal, and give what it said; None where it ended by itself."""
    process = _start(folder)
    try:
        said = process.communicate(timeout=delay)[1]
    except subprocess.TimeoutExpired:
        process.send_signal(chosen)
        said = process.communicate(timeout=LIMIT)[1]
        return said if process.returncode != 0 else None
    if process.returncode != 0:
        raise FindingError(f"a run that is not killed ended with {process.returncode}: {said}")
    return None


def _start(folder: Path) -> "subprocess.Popen[str]":
    folder.mkdir(exist_ok=True)
    (folder / "tiny.toml").write_text(PROFILE)
    return subprocess.Popen(
        [
            *(sys.executable, "-c", CALL, "run", "comparison"),
            *("--profile", str(folder / "tiny.toml"), "--out", str(folder / "run")),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
        env={**os.environ, "DEMUR_STORE": str(folder / "store")},
        # A shell makes processes in the background, and their children, ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def _finished(folder: Path) -> str:
    """Run to the end, and give all figures: what is in the tables, but no times."""
    process = _start(folder)
    said = process.communicate(timeout=LIMIT)[1]
    if process.returncode != 0:
        raise FindingError(f"a run that is not killed ended with {process.returncode}: {said}")
    results = json.loads((folder / "run" / "results.json").read_text())
    return json.dumps([results["tables"], results["summary"], results["curves"]], sort_keys=True)
