"""The writing boundary: files are whole or not there, and printing never loses a result.

The names of tests have the numbers of defects of version 1.
"""

import json
import os
import resource
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from command import demur
from demur import DemurError
from demur.commands import run as study_run
from demur.data.photos import read_photo
from demur.evaluation.folder import claimed
from demur.evaluation.keys import LIBRARIES, Environment
from demur.evaluation.profiles import load_profile
from demur.evaluation.records import write_parquet
from demur.evaluation.results import Data, Measurement, Results, Table, write
from demur.evaluation.shares import FRONT
from demur.evaluation.store import NodeResult, Store
from demur.report.pictures import is_own, save_picture, save_triple
from demur.studies import comparison
from demur.training import checkpoint
from demur.writing import check_writable, replacing, write_text

NOISE = torch.rand(100_000, generator=torch.Generator().manual_seed(0))
CALL = "from demur.cli import main; main()"


@contextmanager
def disk_of(size: int) -> Iterator[None]:
    """Let no file grow beyond `size` bytes, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def process(*words: str, **options: object) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own."""
    shared = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "timeout": 120}
    return subprocess.run([sys.executable, "-c", CALL, *words], **{**shared, **options})


def results_of(title: str) -> Results:
    """Results with one table, whose row has a name that is markup."""
    table = Table(title, [Measurement("[/]", "column • §", "", "%", measured=1.0, n=3)], note="")
    return Results(
        schema=1,
        experiment="comparison",
        title=title,
        profile="demo",
        seed=0,
        data=Data("digits"),
        tables=[table],
        summary=["a sentence • with a bullet"],
    )


WRITERS: dict[str, Callable[[Path], object]] = {
    "text": lambda path: write_text(path, "x" * 400_000),
    "store": lambda path: Store(path.parent).write(
        NodeResult("key", {}, {"noise": NOISE}, 1.0), {}
    ),
    "checkpoint": lambda path: checkpoint.save(path, "key", {"noise": NOISE}),
    "parquet": lambda path: write_parquet(pl.DataFrame({"noise": NOISE.numpy()}), path),
    "picture": lambda path: save_picture(
        torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 200, 200), np.uint8)),
        path.with_suffix(".png"),
    ),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_d13_a_full_disk_is_one_line_and_leaves_nothing(kind, tmp_path):
    """R10: the file is not there, no temporary file is left, and the message says what to do."""
    with disk_of(20_000), pytest.raises(DemurError, match=r"cannot write .*(space|folder)") as said:
        WRITERS[kind](tmp_path / "file")
    assert "\n" not in str(said.value)
    assert list(tmp_path.iterdir()) == []
    WRITERS[kind](tmp_path / "file")
    assert len(list(tmp_path.iterdir())) == 1


def test_d13_a_full_disk_keeps_the_old_file(tmp_path):
    write_text(tmp_path / "results.json", "old")
    with disk_of(20_000), pytest.raises(DemurError):
        write_text(tmp_path / "results.json", "x" * 400_000)
    assert (tmp_path / "results.json").read_text() == "old"


def test_errors_that_are_none_of_writing_pass(tmp_path):
    with pytest.raises(RuntimeError, match="a fault"), replacing(tmp_path / "file"):
        raise RuntimeError("a fault of the caller")


@pytest.mark.parametrize("mask", [0o077, 0o022, 0o002])
def test_d36_files_have_the_permissions_of_the_umask(mask, tmp_path):
    before = os.umask(mask)
    try:
        write_text(tmp_path / "file", "text")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o666 & ~mask


def test_d18_files_are_on_the_disk_before_they_have_their_name(tmp_path, monkeypatch):
    """What resuming relies on is synchronised: first the file, then the names of the folder."""
    synchronised = []
    real = os.fsync

    def fsync(handle: int) -> None:
        synchronised.append(str(Path(f"/proc/self/fd/{handle}").readlink()))
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    write_text(tmp_path / "file", "text")
    assert synchronised[0].startswith(str(tmp_path / ".unfinished-"))
    assert synchronised[1:] == [str(tmp_path)]


def test_d18_leftovers_of_a_killed_process_do_not_block_a_resume(tmp_path):
    with claimed(tmp_path, {"a": 1}):
        pass
    (tmp_path / "run.json").unlink()
    (tmp_path / ".unfinished-0123456789ab.run.json").write_text("{")
    with claimed(tmp_path, {"a": 1}):
        assert json.loads((tmp_path / "run.json").read_text()) == {"a": 1}


def test_d18_an_empty_mark_does_not_block_a_resume(tmp_path):
    (tmp_path / "run.json").write_text("")
    with claimed(tmp_path, {"a": 1}):
        assert json.loads((tmp_path / "run.json").read_text()) == {"a": 1}
    with pytest.raises(DemurError, match="another configuration"), claimed(tmp_path, {"a": 2}):
        pass


def test_d18_a_folder_of_other_files_is_still_refused(tmp_path):
    (tmp_path / "photo.jpg").write_text("")
    with pytest.raises(DemurError, match="holds no run"), claimed(tmp_path, {"a": 1}):
        pass


def test_d35_a_long_path_is_one_line(tmp_path):
    with pytest.raises(DemurError, match="File name too long") as said:
        write_text(tmp_path / ("a" * 300), "text")
    assert len(str(said.value)) < 400


def test_d41_a_folder_that_cannot_be_written_is_refused_before_computing(tmp_path, monkeypatch):
    """Neither the run's folder nor the store may fail only when the first result is there."""
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(study_run, "execute", lambda *_, **__: pytest.fail("it computed"))
    for places in ({"out": tmp_path / "file" / "run"}, {"store": tmp_path / "file" / "store"}):
        with pytest.raises(DemurError, match=r"cannot write|is a file|Not a directory"):
            study_run.run("comparison", **{"out": tmp_path / "run", **places})


def test_check_writable_leaves_nothing(tmp_path):
    check_writable(tmp_path / "new")
    assert list((tmp_path / "new").iterdir()) == []


def test_d41_keys_have_the_libraries_and_the_kind_of_processor():
    assert "scipy" in LIBRARIES
    assert Environment.here("cpu").processor == torch.backends.cpu.get_cpu_capability()


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_d14_a_seed_out_of_range_is_refused_before_any_work(seed, tmp_path):
    with pytest.raises(DemurError, match=f"from 0 to 4294967295, not {seed}"):
        study_run.run("comparison", seed=seed, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "fault",
    ["seed = inf", "curve = " + "9" * 5_000, "curve = " + "[" * 5_000, "a = [0, nan]"],
    ids=["inf", "long integer", "brackets", "nan"],
)
def test_d15_a_faulty_profile_is_one_line(fault, tmp_path):
    (tmp_path / "own.toml").write_text(fault)
    with pytest.raises(DemurError, match=r"own\.toml"):
        load_profile(comparison, str(tmp_path / "own.toml"))


def test_d4_pictures_of_others_are_not_replaced(tmp_path):
    """`demur attack` names its second file itself, so it must look what is there."""
    pixels = torch.zeros(3, 8, 8, dtype=torch.uint8)
    save_triple(pixels, pixels, tmp_path / "own-triple.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "cat-triple.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    assert is_own(tmp_path / "own-triple.png")
    assert not is_own(tmp_path / "cat-triple.png")
    before = (tmp_path / "cat-triple.png").read_bytes()
    photo = str(tmp_path / "x.png")
    options = ("--network", "resnet18", "--target", "3", "--out")
    said = demur("attack", photo, *options, tmp_path / "cat.png")
    assert said.returncode == 2
    assert "cat-triple.png exists, and demur did not write it" in said.stderr
    said = demur("attack", str(tmp_path / "cat-triple.png"), *options, tmp_path / "cat.png")
    assert said.returncode == 2
    assert (tmp_path / "cat-triple.png").read_bytes() == before
    assert read_photo(tmp_path / "x.png").size == (8, 8)


@pytest.mark.slow
def test_d5_whatever_breaks_printing_the_page_is_there(tmp_path):
    """Markup in a name, an ASCII terminal, a full output and a closed pipe."""
    write(results_of(FRONT), tmp_path / "run")
    words = ("compare", str(tmp_path / "run"), "--out", str(tmp_path / "page"))
    page = tmp_path / "page" / "report.html"

    said = process(*words)
    assert said.returncode == 0 and "[/]" in said.stdout and page.exists()

    page.unlink()
    said = process(*words, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert said.returncode == 0 and page.exists() and "Traceback" not in said.stderr

    page.unlink()
    with Path("/dev/full").open("w") as full:
        said = process(*words, stdout=full)
    assert said.returncode == 2 and page.exists()
    assert "cannot print: No space left on device" in said.stderr
    assert len(said.stderr.splitlines()) == 1

    page.unlink()
    reader, writer = os.pipe()
    os.close(reader)
    said = process(*words, stdout=writer)
    os.close(writer)
    assert said.returncode == 141 and page.exists() and said.stderr == ""


def test_d5_a_name_that_is_markup_is_printed_letter_by_letter(tmp_path):
    write(results_of(FRONT), tmp_path / "run")
    for _ in range(2):
        said = demur("compare", tmp_path / "run", "--out", tmp_path / "page")
        assert said.returncode == 0, said.stderr
        assert (tmp_path / "page" / "report.html").exists()


@pytest.mark.slow
def test_messages_that_cannot_be_written_end_no_work(tmp_path):
    with Path("/dev/full").open("w") as full:
        said = process("data", "list", stderr=full)
    assert said.returncode == 0 and "digits" in said.stdout


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.1, 0.3, 0.6, 1.0, 1.5, 2.0])
def test_d33_an_early_interruption_is_no_traceback(delay, tmp_path):
    """R10: an interruption of an import ends as one of the work does."""
    process = subprocess.Popen(
        [sys.executable, "-c", CALL, "run", "comparison", "--out", str(tmp_path / "run")],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        # A shell makes processes in the background, and their children, ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    with pytest.raises(subprocess.TimeoutExpired):
        process.communicate(timeout=delay)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[1]
    # Python itself ends by the signal where the interruption came inside `exec`.
    assert process.returncode in (130, -signal.SIGINT)
    assert "demur: interrupted" in said or delay < 0.2  # before Python ran a line of demur
    assert "Traceback" not in said or delay < 0.2


def test_d40_the_documents_say_what_the_seal_is_for():
    assert "damage, not against malice" in " ".join((Store.__doc__ or "").split())


def test_a_store_finds_a_damaged_result(tmp_path):
    store = Store(tmp_path)
    store.write(NodeResult("key", {"a": 1}, {"noise": NOISE}, 1.0), {})
    save_file({"noise": NOISE + 1}, tmp_path / "key.safetensors", {"key": "key", "seal": "0"})
    assert store.read("key") is None
