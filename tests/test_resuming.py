"""Runs that are killed, run out of disk, or share a store."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import polars as pl
import pytest
from polars.testing import assert_frame_equal

HERE = Path(__file__).parent
IMAGES = 60

pytestmark = pytest.mark.slow


def start(store, records):
    environment = {**os.environ, "PYTHONPATH": str(HERE)}
    words = [sys.executable, str(HERE / "plans.py"), str(store), str(records), str(IMAGES)]
    return subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finish(process):
    _output, error = process.communicate(timeout=300)
    return process.returncode, error.decode()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    begin = time.monotonic()
    code, error = finish(start(folder / "store", folder / "records.parquet"))
    assert code == 0, error
    return pl.read_parquet(folder / "records.parquet"), time.monotonic() - begin


def test_a_run_that_is_killed_at_random_moments_ends_with_the_same_records(whole, tmp_path):
    """R10. SIGKILL, SIGTERM and SIGINT, 20 times in all."""
    expected, seconds = whole
    draw = random.Random(0)
    killed = 0
    store = tmp_path / "store"
    records = tmp_path / "records.parquet"
    for number in range(20):
        if number % 5 == 0:  # from nothing, four times
            shutil.rmtree(store, ignore_errors=True)
            records.unlink(missing_ok=True)
        process = start(store, records)
        kind = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)[number % 3]
        try:
            process.wait(draw.uniform(0.3, 1.0) * seconds)
        except subprocess.TimeoutExpired:
            killed += 1
            process.send_signal(kind)
        finish(process)
        if number % 5 == 4:
            code, error = finish(start(store, records))
            assert code == 0, error
            assert_frame_equal(pl.read_parquet(records), expected)
    assert killed >= 10


def test_two_runs_may_share_a_store(whole, tmp_path):
    expected, _ = whole
    both = [start(tmp_path / "store", tmp_path / f"{number}.parquet") for number in range(2)]
    for process in both:
        code, error = finish(process)
        assert code == 0, error
    for number in range(2):
        assert_frame_equal(pl.read_parquet(tmp_path / f"{number}.parquet"), expected)


def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path):
    """On a tmpfs of 1 MB, where mounting is allowed."""
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(small)]
    if subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("mounting a tmpfs is not allowed here")
    try:
        words = ["-m", "demur.cli", "run", "comparison", "--out", str(small / "run")]
        done = subprocess.run(
            [sys.executable, "-c", "from demur.cli import main; main()", *words[2:]],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 2
        errors = [line for line in done.stderr.splitlines() if line.startswith("demur: ")]
        assert len(errors) == 1
        assert "No space left on device" in errors[0]
        assert "Traceback" not in done.stderr
    finally:
        subprocess.run(["umount", str(small)], check=True)
