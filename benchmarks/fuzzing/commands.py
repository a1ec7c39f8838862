"""Wrong and odd command lines: each ends with an exit code, and with one line if it is refused."""

import contextlib
import io
import os
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from demur.cli.app import log_console, out_console
from demur.cli.running import run
from fuzzing.outcomes import Case, FindingError, Outcome

FILE = "{file}"
FOLDER = "{folder}"
"""Places in the commands: an existing file, and an existing folder without a run."""

COMMANDS: list[list[str]] = [
    ["data", "list", "--data-root", FOLDER],
    ["data", "verify", "digits"],
    ["data", "verify", FOLDER],
    ["data", "download", "nothing", "--data-root", FOLDER],
    # The run's folder is a file, so that no run begins.
    ["run", "comparison", "--profile", "demo", "--out", FILE, "--seed", "1"],
    ["run", "smoothing", "--profile", FILE, "--out", FILE, "--engine", "local"],
    ["demo", "--out", FILE, "--seed", "1"],
    ["compare", FOLDER, "--out", FOLDER],
    ["report", FOLDER],
    ["gate", FOLDER, "--rules", FILE, "--junit", FILE],
    ["show", FOLDER, "--image", "0", "--out", FILE],
    ["replay", FOLDER, "py:" + FILE, "--img-size", "28", "--mean", "0.5"],
    ["audit", "py:" + FILE + ":build", "--data", FOLDER, "--threat", "linf:8/255"],
    ["audit", FOLDER, "--data", FOLDER, "--num-samples", "5", "--expect-accuracy", "0.5+-0.1"],
    ["audit", FILE, "--data", "digits", "--arch", "resnet18", "--profile", "quick"],
    ["audit", "torchvision:nothing", "--data", FILE, "--reject-score", "energy"],
    ["attack", FILE, "--network", "resnet18", "--target", "3", "--out", "x.png"],
]
"""Commands that begin no long work, whatever their words are changed to."""

WORDS = [
    *("", " ", "-", "--", "-1", "0", "nan", "inf", "1e999", "9" * 400, "0x10", "None", "[]", "{}"),
    *("..", "../..", "~", "~nobody/x", "/dev/null", "/dev/zero", "/proc/self/mem", "a" * 300),
    *("\x1b[31mred", "[/]", "[bold]x", "a\nb", "a\tb", "é", "🙂", "%s", "{0}", "$HOME", "*"),
    *("linf:8/0", "linf:-1", "l7:1", "linf:nan", "l2:", ":", "linf:1/", "l0:1e9", "linf:8/255/3"),
    *("timm:", "py:", "py:x:y", "hf-hub:", "torchvision:resnet18;", "onnx:x", "x" * 5000),
    *("--version", "--help", "--limits", "--no-such-option", "--data", "--threat", "--seed"),
    FILE,
    FOLDER,
]


def part() -> Case:
    """Give the function of a case."""
    return try_command


def try_command(rng: np.random.Generator) -> Outcome:
    """Change a command at random, and call it."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        (place / "file").write_bytes(rng.bytes(int(rng.integers(0, 40))))
        (place / "folder").mkdir()
        words = [_filled(word, place) for word in _changed(rng)]
        with contextlib.chdir(place):
            code, out, said = call(words)
    judge(words, code, out, said)
    return "valid" if code == 0 else "refused"


def _changed(rng: np.random.Generator) -> list[str]:
    words = list(COMMANDS[rng.integers(len(COMMANDS))])
    for _ in range(int(rng.integers(0, 4))):
        place = int(rng.integers(1, len(words) + 1))
        other = WORDS[rng.integers(len(WORDS))]
        change = rng.integers(4)
        if change == 0:
            words.insert(place, other)
        elif change == 1 and place < len(words):
            del words[place]
        elif change == 2 and place < len(words):
            words.insert(place, words[place])
        elif place < len(words) and words[place] != "--out":
            # The folder of a run stays a file: without it, work would begin.
            words[place] = other if words[place - 1] != "--out" else FILE
    if words[0] in ("run", "demo"):
        words += ["--out", FILE]
    return words


def _filled(word: str, place: Path) -> str:
    return word.replace(FILE, str(place / "file")).replace(FOLDER, str(place / "folder"))


def call(words: list[str]) -> tuple[int, str, str]:
    """Call the command line in this process; give exit code, standard output and error."""
    out = io.StringIO()
    said = io.StringIO()
    argv = sys.argv
    limits = os.environ.get("DEMUR_LIMITS")
    sys.argv = ["demur", *words]
    consoles: list[Any] = [out_console, log_console]
    try:
        out_console.file = out
        log_console.file = said
        with warnings.catch_warnings(), contextlib.redirect_stdout(out):
            return run(), out.getvalue(), said.getvalue()
    except SystemExit as left:  # of --help and --version
        return int(left.code or 0), out.getvalue(), said.getvalue()
    finally:
        sys.argv = argv
        for console in consoles:
            console.file = None
            console.quiet = False
        os.environ.pop("DEMUR_LIMITS", None)
        if limits is not None:
            os.environ["DEMUR_LIMITS"] = limits


def judge(words: list[str], code: int, out: str, said: str) -> None:
    """Raise FindingError unless a call ended as the documents say."""
    about = f"{words}: exit code {code}, {out[-300:]!r}, {said[-600:]!r}"
    if code not in (0, 1, 2):
        raise FindingError(f"an odd exit code: {about}")
    if "Traceback" in out + said or "\x1b" in out + said:
        raise FindingError(f"a traceback or an escape sequence: {about}")
    lines = [line for line in said.splitlines() if line.startswith("demur: ")]
    if code == 2 and "Usage:" not in out and len(lines) != 1:
        raise FindingError(f"a refusal is not one line: {about}")
    if lines and len(lines[0]) > 2100:
        raise FindingError(f"a refusal of {len(lines[0])} letters: {about[:500]}")
