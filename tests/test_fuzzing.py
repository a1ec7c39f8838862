"""A short run of each part of the fuzzer. `benchmarks/fuzz.py --minutes N` goes on."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CASES = {"files": 1500, "attacks": 150, "modules": 60, "commands": 400}


@pytest.mark.slow
@pytest.mark.parametrize("part", CASES)
def test_no_case_ends_with_a_traceback_a_hang_or_a_wrong_result(part):
    """R1, R3: each case ends with a valid result or with an error of one line."""
    options = ("--only", part, "--cases", str(CASES[part]), "--seed", "7", "--minutes", "10")
    done = subprocess.run(
        [sys.executable, "benchmarks/fuzz.py", *options],
        **{"cwd": ROOT, "capture_output": True, "text": True, "check": False, "timeout": 900},
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
    )
    assert done.returncode == 0, done.stdout[-5000:]
