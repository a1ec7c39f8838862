"""Damage what demur reads and is called with, and look for tracebacks, hangs and lost memory.

    python benchmarks/fuzz.py --minutes 4 --seed 1 --only files

Cases run in another process, one after another. A case may end with a valid result or with
`DemurError`. Everything else is a finding: another exception, a case of more than 20 seconds, a
process that dies, and a case that takes more memory than the limits allow. The limits of demur are
a sixteenth of their defaults here. A finding is printed with the command that repeats it. The exit
code is 1 if there is one.
"""

import argparse
import multiprocessing
import os
import signal
import sys
import time
import traceback
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType

import numpy as np

from fuzzing import attacks, commands, files, kills, modules
from fuzzing.outcomes import Part, seeded

PARTS: dict[str, Part] = {
    "files": files.part,
    "attacks": lambda: seeded(attacks.case),
    "modules": lambda: seeded(modules.case),
    "commands": commands.part,
    "kills": kills.part,
}
"""All parts of the fuzzer, by name."""

SECONDS = 20
"""Of one case, before it counts as a hang."""
SECONDS_OF_RUNS = 600
"""Of one case that carries out whole runs."""
MEGABYTES = 512
"""That one case may take."""
LIMITS = "0.0625"


@dataclass
class Tally:
    """What the cases of a part ended with."""

    cases: int = 0
    outcomes: dict[str, int] = field(default_factory=dict)
    findings: list[str] = field(default_factory=list)
    peak: float = 0.0


class HangError(BaseException):
    """A case that takes too long. No `except Exception` may catch it."""


def _hangs(signal_number: int, frame: FrameType | None) -> None:
    raise HangError


def work(part: str, seed: int, first: int, cases: int | None, results: Connection) -> None:
    """Try so many cases, or all until the process is ended; send number, outcome and memory."""
    os.environ["DEMUR_LIMITS"] = LIMITS
    case = PARTS[part]()
    signal.signal(signal.SIGALRM, _hangs)
    number = first
    while cases is None or number < first + cases:
        results.send(("begun", number, 0.0))
        before = _reset_peak()
        signal.alarm(_seconds(part))
        try:
            outcome: str = case(np.random.default_rng([seed, number]))
        except HangError:
            outcome = f"a hang\n{traceback.format_exc()}"
        except BaseException:  # a finding may be any exception, also one of a Rust library
            outcome = traceback.format_exc()
        finally:
            signal.alarm(0)
        results.send((outcome, number, _peak() - before))
        number += 1


def _seconds(part: str) -> int:
    return SECONDS_OF_RUNS if part == "kills" else SECONDS


def _reset_peak() -> float:
    Path("/proc/self/clear_refs").write_text("5")
    return _peak()


def _peak() -> float:
    """The largest resident memory since the last reset, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


def run(part: str, seed: int, minutes: float, first: int = 0, cases: int | None = None) -> Tally:
    """Try a part for some minutes, or for a number of cases."""
    tally = Tally()
    end = time.monotonic() + 60 * minutes
    spawn = multiprocessing.get_context("spawn")
    number = first
    while time.monotonic() < end and (cases is None or tally.cases < cases):
        receiver, sender = spawn.Pipe(duplex=False)
        left = None if cases is None else cases - tally.cases
        process = spawn.Process(target=work, args=(part, seed, number, left, sender), daemon=True)
        process.start()
        sender.close()
        number = _listen(receiver, tally, part, seed, number, end, cases)
        process.kill()
        process.join()
    return tally


def _listen(
    receiver: Connection,
    tally: Tally,
    part: str,
    seed: int,
    number: int,
    end: float,
    cases: int | None,
) -> int:
    """Count outcomes until the time is over or the process is lost; give the next case."""
    begun = False
    while time.monotonic() < end and (cases is None or tally.cases < cases):
        try:
            # A process that has just started imports torch first.
            patience = 2 * _seconds(part) if begun else 120 + _seconds(part)
            left = end - time.monotonic()
            lost = not receiver.poll(min(patience, left))
            if lost and left < patience:
                break  # the time is over: the case under way does not count
            said, number, memory = ("", number, 0.0) if lost else receiver.recv()
        except EOFError:
            lost = True
        if lost and not begun:
            sys.exit(f"the part {part} cannot be prepared")
        if lost:
            _found(tally, part, seed, number, "the process died or did not answer")
            return number + 1
        begun = True
        if said == "begun":
            continue
        tally.cases += 1
        tally.peak = max(tally.peak, memory)
        if said not in ("valid", "refused"):
            _found(tally, part, seed, number, said)
        elif memory > MEGABYTES:
            _found(tally, part, seed, number, f"it took {memory:.0f} MB")
        else:
            tally.outcomes[said] = tally.outcomes.get(said, 0) + 1
    return number


def _found(tally: Tally, part: str, seed: int, number: int, said: str) -> None:
    again = f"python benchmarks/fuzz.py --only {part} --seed {seed} --first {number} --cases 1"
    tally.findings.append(f"{said.rstrip()}\nrepeat it with: {again}")
    print(f"FINDING {len(tally.findings)} in {part}:\n{tally.findings[-1]}\n", flush=True)


def main() -> None:
    """Run the parts and print a row for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=1.0, help="of each part")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=list(PARTS), action="append", help="parts to run")
    parser.add_argument("--first", type=int, default=0, help="the number of the first case")
    parser.add_argument("--cases", type=int, help="at most so many cases of each part")
    given = parser.parse_args()
    rows = []
    for part in given.only or PARTS:
        tally = run(part, given.seed, given.minutes, given.first, given.cases)
        counts = ", ".join(f"{count:,} {name}" for name, count in sorted(tally.outcomes.items()))
        rows.append(
            f"{part}: {tally.cases:,} cases ({counts}), {len(tally.findings)} findings, "
            f"at most {tally.peak:.0f} MB for a case"
        )
    print("\n".join(rows))
    sys.exit(any(" 0 findings" not in row for row in rows))


if __name__ == "__main__":
    main()
