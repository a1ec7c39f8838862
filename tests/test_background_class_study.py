"""The study of the background class and the command line, end to end on small images."""

import io
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from PIL import Image
from rich.console import Console

from command import check_refusal, demur
from demur import DemurError, data
from demur.attacks import FGSM
from demur.classifier import REJECT, outcomes
from demur.cli.tables import table_of
from demur.commands.run import STUDIES, run
from demur.data import synthetic_backgrounds
from demur.defenses import BackgroundClass
from demur.evaluation.pictures import mixed
from demur.evaluation.profiles import load_profile
from demur.evaluation.records import ATTACKERS
from demur.evaluation.results import Measurement, read, read_gallery
from demur.evaluation.shares import ATTACKED_BY, FRONT
from demur.metrics import rates
from demur.networks import background_class_network
from demur.progress import Silent, reporting
from demur.studies.background_class import material, plan
from demur.studies.background_class.material import gather
from demur.studies.background_class.tables import LETTERS
from demur.studies.reported import read_reported

TINY = """
data = ["digits"]
keys = "0123456789"
background = "selected"
splits = 2
epochs = 2
attacked = 40
made_per_kind = 40
noise_draws = 2
gallery = 16
batch_size = 16
selection = { per_class = 30, folds = 2, repeats = 1, epochs = 3, cutoff = 0.3 }
curve = { images = 30, eps = [0.0, 0.1, 0.3] }
trade_off = { kept = [1, 5], key_images = 300, repeats = 1, epochs = 1 }
carlini = { per_class = 1, steps = 20, search_steps = 3 }
"""


@pytest.fixture(scope="module")
def profile(tmp_path_factory):
    path = tmp_path_factory.mktemp("profile") / "tiny.toml"
    path.write_text(TINY)
    return str(path)


@pytest.fixture(scope="module")
def folder(profile, tmp_path_factory):
    """An uninterrupted run."""
    return run("background-class", profile, out=tmp_path_factory.mktemp("runs") / "whole")


def without_times(folder: Path):
    results = json.loads((folder / "results.json").read_text())
    return {**results, "cost": [{**cell, "seconds": 0} for cell in results["cost"]["cells"]]}


LETTERED = """
data = ["{path}"]
keys = "0123456789"
background = "{letters}"
background_share = 0.5
splits = 2
epochs = 2
attacked = 30
noise_draws = 2
gallery = 16
batch_size = 16
selection = {{ per_class = 8, folds = 2, repeats = 1, epochs = 1, cutoff = 0.1 }}
curve = {{ images = 20, eps = [0.0, 0.1, 0.3], rejected = [0.1, 0.3, 0.5] }}
trade_off = {{ kept = [1, 40], key_images = 150, repeats = 1, epochs = 1 }}
carlini = {{ per_class = 1, steps = 10, search_steps = 2 }}
"""


@pytest.fixture(scope="module")
def lettered(tmp_path_factory):
    """A run on images of 6x6 pixels with the paper's classes, and one further letter."""
    place = tmp_path_factory.mktemp("lettered")
    names = np.array([*"0123456789", *LETTERS, "O"])
    drawn = np.random.default_rng(0)
    labels = np.repeat(np.arange(len(names)), 40)
    kinds = drawn.integers(0, 200, (len(names), 6, 6))
    images = (kinds[labels] + drawn.integers(0, 55, (len(labels), 6, 6))).astype(np.uint8)
    path = _npz(place / "own.npz", images=images, labels=labels, class_names=names)
    (place / "own.toml").write_text(LETTERED.format(path=path, letters=LETTERS))
    return run("background-class", str(place / "own.toml"), out=place / "run")


def table(folder, title):
    return next(one for one in read(folder).tables if one.title.startswith(title))


def test_the_papers_figures_stand_beside_those_of_its_classes(lettered):
    found = {
        (one.title, row.group, row.row, row.column): row
        for one in read(lettered).tables
        for row in one.rows
    }
    reported = read_reported("background_class")
    assert len(reported) == 26
    for one in reported:
        row = found.pop((one.table, one.group, one.row, one.column))
        assert (row.paper, row.paper_sd) == (one.value, one.sd) and row.measured is not None
    assert all(row.paper is None for row in found.values())
    assert "of the paper's 22" in read(lettered).summary[-1]


def test_the_selection_says_what_the_paper_keeps(lettered):
    notes = {row.row: row.note for row in table(lettered, "The selection").rows}
    assert set(notes) == {*LETTERS, "O"}
    assert "the paper drops it" in notes["O"] and "the paper keeps it" in notes["A"]


def test_attacked_images_have_three_outcomes_and_the_worst_is_of_each_image(lettered):
    """R18."""
    lines = {}
    for row in table(lettered, "Table V").rows:
        lines.setdefault((row.group, row.row), {})[row.column] = row.measured
        assert row.n <= 60 and row.splits == 2 and row.low <= row.measured <= row.high
    assert len(lines) == 26
    assert all(
        sum(line.values()) == pytest.approx(100) and set(line) == {"correct", "wrong", "rejected"}
        for line in lines.values()
    )
    assert all(line["rejected"] == 0 for (_, model), line in lines.items() if model == "Digits")
    for name in ("FGS eps 0.25", "FG eps 6.79"):
        worst = lines[f"{name}, worst of both reject-aware", "Digits + background"]
        for attacker in ("reject-aware, margin", "reject-aware, cross-entropy"):
            one = lines[f"{name}, {attacker}", "Digits + background"]
            assert worst["wrong"] >= one["wrong"]
    success = {
        (row.group, row.row, row.column): row.measured for row in table(lettered, "Table IV").rows
    }
    assert len(success) == 12
    aware = "reject-aware, worst of both", "Digits + background", "FGS"
    assert success[aware] == lines["FGS eps 0.25, worst of both reject-aware", aware[1]]["wrong"]


def test_the_front_table_names_the_attackers_and_so_do_the_records(lettered):
    lines = {(row.group, row.row, row.column): row for row in table(lettered, FRONT).rows}
    assert list(dict.fromkeys(group for group, _, _ in lines)) == list(ATTACKED_BY)
    worst = lines["strongest ensemble", "Digits + background", "wrong"].measured
    for attacker in ATTACKED_BY[1:3]:
        assert worst >= lines[attacker, "Digits + background", "wrong"].measured
    records = pl.read_parquet(lettered / "records.parquet")
    assert set(records["attacker"]) == set(ATTACKERS)
    assert records["base"].drop_nulls().unique().to_list() == ["Digits"]


def test_the_curves_start_at_the_clean_outcomes_and_end_at_many_rejections(lettered):
    """R2, R12: at eps 0 there is no attack. R21: a whole curve, not a single threshold."""
    by_eps, by_rate = read(lettered).curves
    assert by_eps.x == [0, 0.1, 0.3] and len(by_eps.series) == 6
    for model in ("Digits", "Digits + background"):
        own = [one for one in by_eps.series if one.name.startswith(f"{model}, ")]
        assert len({(one.correct[0], one.rejected[0]) for one in own}) == 1
        assert all(one.correct[-1] <= one.correct[0] for one in own)
    assert by_rate.x == [10, 30, 50] and "%" in by_rate.x_label
    assert re.search(r"set on 20 other clean test images", by_rate.note)
    clean = by_rate.series[0]
    assert clean.name == "clean images" and clean.rejected == sorted(clean.rejected)
    assert clean.rejected[-1] > clean.rejected[0]


def test_the_attacker_that_is_unaware_of_the_background_can_be_rejected(lettered):
    lines = {(row.group, row.row) for row in table(lettered, "Carlini").rows}
    unaware = "targeted, unaware of the background", "Digits + background"
    assert len(lines) == 5 and unaware in lines


def test_the_same_run_again_computes_nothing_and_another_seed_is_refused(lettered):
    profile = str(lettered.parent / "own.toml")
    before = (lettered / "results.json").read_bytes()
    store = lettered.parent / "demur-store"
    stored = {path: path.stat().st_mtime_ns for path in store.iterdir()}
    run("background-class", profile, out=lettered)
    assert (lettered / "results.json").read_bytes() == before
    assert {path: path.stat().st_mtime_ns for path in store.iterdir()} == stored
    with pytest.raises(DemurError, match="holds a run with another"):
        run("background-class", profile, out=lettered, seed=1)


@pytest.mark.slow
def test_a_run_that_lost_results_goes_on_with_the_same_figures(lettered, tmp_path):
    """R10: models, attacks and the selection are computed again alone."""
    store = tmp_path / "store"
    shutil.copytree(lettered.parent / "demur-store", store)
    for path in sorted(store.glob("*.safetensors"))[::5]:
        path.unlink()
    profile = str(lettered.parent / "own.toml")
    again = read(run("background-class", profile, out=tmp_path / "run", store=store))
    assert (again.tables, again.curves) == (read(lettered).tables, read(lettered).curves)


def test_what_would_leave_no_background_image_to_train_on_is_refused(lettered, tmp_path):
    text = (lettered.parent / "own.toml").read_text()
    for old, new, said in (
        ("background_share = 0.5", "background_share = 0.0001", "background_share"),
        ("per_class = 1,", "per_class = 90,", "carlini.per_class is 90"),
        ("images = 20", "images = 40", "curve.images is 40"),
        ("epochs = 2", "epochs = 2\nfg_eps = 0.25", "fgs_eps and fg_eps must differ"),
        ("folds = 2", "folds = 9", "too few for 9 folds"),
        ("per_class = 8", "per_class = 41", "cannot draw 41 images"),
        (f'background = "{LETTERS}"', 'background = "0"', "'0'"),
    ):
        check_refusal("background-class", text.replace(old, new), said, tmp_path)


def test_a_selection_that_keeps_nothing_says_what_to_do(lettered, tmp_path):
    text = (lettered.parent / "own.toml").read_text()
    text = text.replace(f'background = "{LETTERS}"', 'background = "selected"')
    (tmp_path / "own.toml").write_text(text.replace("cutoff = 0.1", "cutoff = 1.0"))
    store = lettered.parent / "demur-store"
    with pytest.raises(DemurError, match="at the cutoff of 1: lower it"):
        run("background-class", str(tmp_path / "own.toml"), out=tmp_path / "run", store=store)


def test_a_toy_says_so(folder):
    results = read(folder)
    assert results.summary[0].startswith("A toy") and "README" in results.summary[0]
    assert not any(re.match(r"R\d", line) for line in results.warnings)
    assert (results.experiment, results.seed) == ("background-class", 0)
    assert results.versions["demur"]
    assert results.cost.cells and sum(cell.backwards for cell in results.cost.cells) > 0
    assert all(row.paper is None for one in results.tables for row in one.rows)


def test_the_gallery_shows_stored_images_that_keep_to_their_eps(folder):
    """R1 on stored images."""
    pictures, original, attacked = read_gallery(folder)
    assert len(pictures) == len(original) > 8
    moved = (attacked.int() - original.int()).abs().flatten(1).amax(1) / 255
    for picture, reach in zip(pictures, moved.tolist(), strict=True):
        assert picture.linf == pytest.approx(reach)
        assert "L2" in picture.attack or reach <= 0.25 + 1e-9
        assert (picture.decision == "reject") == (picture.outcome == "rejected")
    turn = [(picture.model, picture.attack, picture.attacker) for picture in pictures[:12]]
    assert (
        len(set(turn)) == 12
        and [model for model, *_ in turn] == ["Digits + background"] * 6 + ["Digits"] * 6
    )


def test_the_gallerys_first_cards_show_every_outcome_that_there_is():
    """Also where one is rare, and comes late."""
    assert mixed(torch.tensor([2, 2, 0, 2, 0, 2, 1]), 0) == [6, 0, 2, 1, 4, 3, 5]
    assert mixed(torch.tensor([0, 2, 2]), 1) == [2, 0, 1]


def test_an_interrupted_run_resumes_with_the_same_bits(profile, folder, tmp_path):
    """R10: after Ctrl-C, a killed process and a corrupted cell, the results are the same."""
    out = tmp_path / "interrupted"
    words = [
        sys.executable,
        "-m",
        "demur.cli",
        "run",
        "background-class",
        "--profile",
        profile,
        "--out",
        str(out),
        "--store",
        str(tmp_path / "store"),
    ]
    store = tmp_path / "store"
    for stop, cells_before in ((signal.SIGINT, 2), (signal.SIGKILL, 8)):
        # A shell makes processes in the background, and their children, ignore Ctrl-C.
        heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
        process = subprocess.Popen(
            words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, preexec_fn=heard
        )
        deadline = time.monotonic() + 120
        while (
            len(list(store.glob("*.safetensors"))) < cells_before
            and process.poll() is None
            and time.monotonic() < deadline
        ):
            time.sleep(0.02)
        process.send_signal(stop)
        said = process.communicate(timeout=60)[1]
        assert not (out / "results.json").exists()
        if stop == signal.SIGINT:
            assert process.returncode == 130 and said.strip().splitlines()[-1].endswith(
                "The same command goes on where it was."
            )
            assert "Traceback" not in said
    cell = min(store.glob("*.safetensors"))
    cell.write_bytes(cell.read_bytes()[:-1])
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert done.stderr.startswith("Data: digits + made backgrounds, 1,638 images of 15 classes.\n")
    assert done.returncode == 0 and "damaged or belongs to another" in done.stderr
    assert without_times(out) == without_times(folder)
    assert (out / "gallery.safetensors").read_bytes() == (
        folder / "gallery.safetensors"
    ).read_bytes()
    assert (out / "report.html").exists() and "Table V" in done.stdout


def test_profiles_of_the_package_are_sound_and_faults_are_named(tmp_path):
    for name in ("demo", "desk", "paper"):
        load_profile(STUDIES["background-class"], name)
    with pytest.raises(DemurError, match="Did you mean 'desk'"):
        load_profile(STUDIES["background-class"], "dekk")
    for text, said in (
        (TINY.replace("splits = 2", "splits = 0"), "splits: Input should be greater"),
        (TINY + "\nspeed = 3", "speed: there is no such key"),
        (
            TINY.replace("splits", "splitz"),
            r": splitz: there is no such key \(did you mean 'splits'\?\); splits: it is missing\.$",
        ),
        (
            TINY.replace("folds", "foldz"),
            r"selection.foldz: .*'folds'\?\); selection.folds: it is missing",
        ),
        (TINY.replace('["digits"]', '"folder"'), r'data: a list of names is wanted: \["folder"\]'),
        (TINY.replace("eps = [0.0, 0.1, 0.3]", "eps = 0.3"), "curve.eps: Input should be a list"),
        ("data = [", "not TOML"),
    ):
        path = tmp_path / "bad.toml"
        path.write_text(text)
        with pytest.raises(DemurError, match=said):
            load_profile(STUDIES["background-class"], str(path))
    with pytest.raises(DemurError, match="there is no file"):
        load_profile(STUDIES["background-class"], str(tmp_path / "none.toml"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["run", "background-clas"], "Did you mean 'background-class'"),
        (["run", "background-class", "--profile", "dekk"], "Did you mean 'desk'"),
        (
            ["run", "background-class", "--profile", "desk", "--data-root", "{tmp}"],
            "demur data download emnist-bymerge",
        ),
        (["run", "background-class", "--device", "gpu"], "unknown device"),
        (["run", "background-class", "--seed", "many"], "--seed"),
        (["run", "background-class", "--seed", "-1"], "from 0 to 4294967295, not -1"),
        (["run"], "Missing argument 'study'. See: demur run --help"),
        (["report", "{tmp}"], "results.json"),
        (["report", "{tmp}/file"], "run's folder is wanted"),
        (["data", "download", "mnits"], "Did you mean 'mnist'"),
        (["data", "download", "emnist-merge", "--data-root", "{tmp}"], "emnist-bymerge"),
        (["frobnicate"], "No such command"),
        (["demo", "--out", "{tmp}/file"], "is a file"),
        (["data", "list", "--data-root", "{tmp}/none"], "does not exist"),
        (["data", "verify", "--data-root", "{tmp}/none"], "does not exist"),
        (["data", "verify", "{tmp}/none"], "no such file or folder"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2_and_nothing_is_written(words, said, tmp_path):
    (tmp_path / "file").write_text("")
    done = demur(*(word.format(tmp=tmp_path) for word in words), cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert (
        len(done.stderr.strip().splitlines()) == 1
        and done.stderr.startswith("demur: ")
        and said in done.stderr
    )
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_gpu_that_is_not_there_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = demur("demo", "--device", "cuda", cwd=tmp_path)
    assert done.returncode == 2 and "no CUDA GPU" in done.stderr and not list(tmp_path.iterdir())


def test_a_folder_that_holds_something_else_is_left_alone(profile, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    done = demur("run", "background-class", "--profile", profile, "--out", tmp_path)
    assert done.returncode == 2 and "not empty and holds no run" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder that is not writable")
def test_a_folder_that_cannot_be_written_is_said(profile):
    done = demur("run", "background-class", "--profile", profile, "--out", "/proc/demur")
    assert (
        done.returncode == 2
        and "cannot write" in done.stderr
        and len(done.stderr.strip().splitlines()) == 1
    )


def _npz(path, **arrays):
    np.savez(path, **arrays)
    return path


IMAGES, LABELS = np.zeros((40, 28, 28), np.uint8), np.arange(40) % 4
OWN = TINY.replace("made_per_kind = 40", "").replace('"0123456789"', '["0", "1"]')
BAD_SETS = {
    "no labels": ({"images": IMAGES}, "labels"),
    "floats outside [0, 1]": ({"images": IMAGES + 1.5, "labels": LABELS}, "[0, 1]"),
    "NaN": ({"images": np.full((40, 28, 28), np.nan), "labels": LABELS}, "NaN"),
    "wrong rank": ({"images": np.zeros((40, 784), np.uint8), "labels": LABELS}, "shape"),
    "one class": ({"images": IMAGES, "labels": LABELS * 0}, "class"),
    "no images": ({"images": IMAGES[:0], "labels": LABELS[:0]}, "no images"),
    "not square": (
        {"images": np.zeros((800, 28, 32), np.uint8), "labels": np.arange(800) % 4},
        "square images",
    ),
    "too few images": ({"images": IMAGES, "labels": LABELS}, "curve.images"),
    "labels out of range": (
        {"images": IMAGES, "labels": LABELS, "class_names": np.array(["0", "1"])},
        "label",
    ),
}


@pytest.mark.parametrize("fault", [*BAD_SETS, "truncated"])
def test_a_bad_data_set_is_one_line_and_nothing_is_written(fault, tmp_path):
    arrays, said = BAD_SETS.get(fault, ({"images": IMAGES, "labels": LABELS}, "set.npz"))
    path = _npz(tmp_path / "set.npz", **arrays)
    if fault == "truncated":
        path.write_bytes(path.read_bytes()[:2000])
    (tmp_path / "own.toml").write_text(OWN.replace('data = ["digits"]', f'data = ["{path}"]'))
    out = tmp_path / "out"
    done = demur("run", "background-class", "--profile", tmp_path / "own.toml", "--out", out)
    assert (
        done.returncode == 2
        and len(done.stderr.strip().splitlines()) == 1
        and said in done.stderr
        and not out.exists()
    )


@pytest.mark.slow
def test_an_own_data_set_with_long_class_names_runs_and_the_papers_figures_are_not_beside_it(
    tmp_path,
):
    digits = data.load("digits")
    names = np.array(["zero", "one", "two", "others"])
    keep = (digits.labels < 4).nonzero().flatten()
    path = _npz(
        tmp_path / "own.npz",
        images=digits.images[keep, 0, 2:26:3, 2:26:3].numpy(),
        labels=digits.labels[keep].numpy(),
        class_names=names,
    )
    text = OWN.replace('data = ["digits"]', f'data = ["{path}"]').replace(
        '["0", "1"]', '["zero", "one", "two"]'
    )
    text = text.replace('background = "selected"', 'background = ["others"]').replace(
        "attacked = 40", "attacked = 20"
    )
    (tmp_path / "own.toml").write_text(
        text.replace("images = 30", "images = 20")
        .replace("kept = [1, 5]", "kept = [1, 5, 8]")
        .replace("splits = 2", "splits = 1")
        .replace("eps = [0.0, 0.1, 0.3]", "eps = [0.0, 0.1]")
    )
    results = read(run("background-class", str(tmp_path / "own.toml"), out=tmp_path / "out"))
    assert all(row.paper is None for table in results.tables for row in table.rows)
    said = [
        table.title + table.note + "".join(row.column for row in table.rows)
        for table in results.tables
    ] + results.summary
    assert not re.search("toy|digits|letters", " ".join(said))
    trade = next(table for table in results.tables if table.title.startswith("Trade-off"))
    assert any("(1 kind)" in cell.cell for cell in results.cost.cells) and not any(
        "(1 kinds)" in cell.cell for cell in results.cost.cells
    )
    assert {row.row for row in trade.rows} == {"1 kind"} and {row.splits for row in trade.rows} == {
        1
    }  # no cell counts twice


def _rows(images):
    return {image.numpy().tobytes() for image in images}


@pytest.mark.parametrize(
    "kind", ["npz", "npz with splits", "npz with a train split only", "folder called digits"]
)
def test_backgrounds_are_made_of_the_own_data_that_is_named_and_of_none_of_its_images_in_use(
    kind, tmp_path, monkeypatch
):
    """The folder's name must not lead to the embedded digits.

    No synthetic background comes from an image that is trained or tested on.
    """
    digits = data.load("digits").sample(200, seed=0)
    own = digits.images.flip(3)  # in no other set
    path = tmp_path / ("digits" if "folder" in kind else "own.npz")
    test = data.load("digits", "test").images.flip(3)
    if "folder" in kind:
        for number, (image, label) in enumerate(zip(own, digits.labels.tolist(), strict=True)):
            (path / str(label)).mkdir(parents=True, exist_ok=True)
            Image.fromarray(image[0].numpy()).save(path / str(label) / f"{number}.png")
    elif kind == "npz":
        np.savez(path, images=own, labels=digits.labels)
    else:
        others = {"test_images": test, "test_labels": data.load("digits", "test").labels}
        np.savez(
            path, train_images=own, train_labels=digits.labels, **({} if "only" in kind else others)
        )
    (tmp_path / "own.toml").write_text(
        TINY.replace('"digits"', f'"{path}"')
        .replace("images = 30", "images = 10")
        .replace("30,", "10,")
    )
    sources = []
    monkeypatch.setattr(
        material,
        "synthetic_backgrounds",
        lambda *given: (sources.append(given[3]), synthetic_backgrounds(*given))[1],
    )
    found = gather(load_profile(STUDIES["background-class"], str(tmp_path / "own.toml")), None, 0)
    used = _rows(found.images.select_classes("0123456789").images)
    source = _rows(sources[0].images)
    assert (
        found.taken == f"Data: {path} + made backgrounds, {len(found.images)} images of 15 classes."
    )
    assert (
        found.data.name == f"{path} + made backgrounds"
        and not found.data.rooted
        and not found.embedded
    )
    assert found.images.num_classes == 15
    assert not used & source
    if kind == "npz with splits":
        assert used == _rows(own) and source == _rows(test)
    else:
        assert used | source == _rows(own) and len(source) == 40


def test_a_data_set_that_is_not_the_profiles_first_is_said(tmp_path):
    (tmp_path / "own.toml").write_text(TINY.replace('["digits"]', '["emnist-bymerge", "digits"]'))
    settings = load_profile(STUDIES["background-class"], str(tmp_path / "own.toml"))
    study = plan(settings, tmp_path, 0)
    said = (
        "Data: digits + made backgrounds, 1,638 images of 15 classes; "
        f"emnist-bymerge, named first, is not in {tmp_path}."
    )
    assert study.taken == said


class Interrupting(Silent):
    """Raises what Ctrl-C raises, after so many steps of training."""

    def __init__(self, after):
        self.after, self.jobs = after, {}

    def start(self, job, total):
        self.jobs[len(self.jobs)] = job
        return len(self.jobs) - 1

    def advance(self, job, amount, note):
        if self.jobs[job] == "training":
            self.after -= amount
            if self.after < 0:
                raise KeyboardInterrupt


def test_a_run_that_is_stopped_inside_a_cell_goes_on_from_its_checkpoint(
    profile, folder, tmp_path, monkeypatch
):
    """R10: through the store and the training loop."""
    monkeypatch.setattr("demur.training.loop.CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr("demur.training.loop.CHECK_STEPS", 2)
    out, store, stops = tmp_path / "stopped", tmp_path / "demur-store", 0
    for after in (3, 9, 20):
        with pytest.raises(KeyboardInterrupt), reporting(Interrupting(after)):
            run("background-class", profile, out=out)
        stops += bool(list(store.glob("*.checkpoint")))
    assert stops == 3
    run("background-class", profile, out=out)
    assert not list(store.glob("*.checkpoint")) and without_times(out) == without_times(folder)


def test_data_commands_list_and_verify(tmp_path):
    listed = demur("data", "list", "--data-root", tmp_path)
    assert (
        listed.returncode == 0
        and "562 MB to download" in listed.stdout
        and "embedded" in listed.stdout
    )
    checked = demur("data", "verify", "--data-root", tmp_path)
    assert checked.returncode == 0 and "missing" in checked.stdout
    assert demur("data", "verify", "mnist", "--data-root", tmp_path).returncode == 1
    assert demur("data", "verify", "digits").stdout.startswith("ok")
    (tmp_path / "cifar10.npz").write_bytes(b"")
    assert (
        "25,000 + 5,000 images of 10 classes, a subset of 50,000 + 10,000\n"
        in demur("data", "list", "--data-root", tmp_path).stdout
    )
    assert (
        "4 classes"
        in demur("data", "verify", _npz(tmp_path / "own.npz", images=IMAGES, labels=LABELS)).stdout
    )


def test_the_terminals_table_loses_no_letter_where_it_is_narrow():
    long = "a_rather_long_label_without_any_break"
    rows = [
        Measurement(long, column, group=f"group_{long}", unit="%", measured=12.34, sd=1.23)
        for column in ("correct", "rejected", "wrong")
    ]
    text = io.StringIO()
    Console(file=text, width=60).print(table_of("Title", rows))
    letters = re.sub(r"[^a-z_]", "", text.getvalue())
    assert (
        "…" not in text.getvalue()
        and "..." not in text.getvalue()
        and letters.count("_") == 2 * long.count("_") + 1
    )


def test_the_report_can_be_made_anew(profile, folder):
    for _ in range(2):
        done = demur("report", folder)
        assert done.returncode == 0 and str(folder / "report.html") in done.stdout.replace("\n", "")
        text = (folder / "report.html").read_text()
        assert (
            f"demur run background-class --profile {profile}</code>" in text
            and "paper’s own" not in text
        )
        assert "Table V: attacked images" in text
        (folder / "report.html").unlink()


def _halved(images):
    """Every second row and column."""
    return replace(images, images=images.images[..., ::2, ::2].contiguous())


@pytest.mark.slow
def test_a_background_class_learns_to_decline():
    """On embedded digits: key images are answered, images of the background's kind declined."""
    digits = _halved(data.load("digits"))
    made = (
        data.synthetic_backgrounds(digits, 120, seed=0)
        .select_classes(["photo crops", "patch shuffle"])
        .images
    )
    shuffled = made[torch.randperm(len(made), generator=torch.Generator().manual_seed(0))]
    classifier = BackgroundClass(background_class_network(11, size=14), num_classes=10)
    classifier.fit(digits.images, digits.labels, shuffled[40:], epochs=4, batch_size=16)
    assert len(classifier.history_) == 4
    test = _halved(data.load("digits", "test"))
    clean = rates(outcomes(classifier, test.to_float(), test.labels))
    assert clean.accuracy > 0.93 and clean.rejection_rate < 0.05
    assert float((classifier.predict(data.to_float(shuffled[:40])) == REJECT).float().mean()) > 0.9
    attacked = FGSM()(classifier, test.to_float()[:50], test.labels[:50], "linf:0.25")
    assert bool((classifier.predict(attacked.images[attacked.success]) != REJECT).all())  # R19


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"background": torch.zeros(0, 1, 28, 28, dtype=torch.uint8)}, "at least one"),
        ({"background": torch.zeros(4, 3, 28, 28, dtype=torch.uint8)}, "do not fit key"),
        ({"background": torch.zeros(4, 1, 28, 28)}, "do not fit key"),
        ({"labels": torch.full((20,), 10)}, "0..9"),
        ({"network": 10}, r"needs \(1, 11\)"),
    ],
)
def test_what_does_not_make_a_background_class_is_refused(change, said):
    given = {
        "images": torch.zeros(20, 1, 28, 28, dtype=torch.uint8),
        "labels": torch.arange(20) % 10,
    }
    given |= {"background": torch.zeros(4, 1, 28, 28, dtype=torch.uint8), **change}
    classifier = BackgroundClass(background_class_network(given.pop("network", 11)), num_classes=10)
    with pytest.raises(DemurError, match=said):
        classifier.fit(**given, epochs=1)


@pytest.mark.slow
@pytest.mark.real_data
def test_on_real_letters_the_background_class_costs_little_and_detects_some(data_root):
    """The paper's finding: digits are answered, letters rejected, and FGS is detected in part."""
    everything = data.load("emnist-merge", root=data_root)
    digits = everything.select_classes("0123456789").sample(12_000, seed=0)
    letters = everything.select_classes("TtUdEPfFXHCnhAKMVWeRrN").sample(7_000, seed=0).images
    train, test = digits.split(0.1, seed=0)
    classifier = BackgroundClass(background_class_network(11), num_classes=10)
    classifier.fit(train.images, train.labels, letters[1000:], epochs=2)
    clean = rates(outcomes(classifier, test.to_float(), test.labels))
    assert clean.accuracy > 0.95 and clean.rejection_rate < 0.04
    assert float((classifier.predict(data.to_float(letters[:1000])) == REJECT).float().mean()) > 0.9
    few = test.sample(400, seed=0)
    result = FGSM()(classifier, few.to_float(), few.labels, "linf:0.25")
    under = rates(outcomes(classifier, result.candidates, few.labels))
    assert under.accuracy < 0.3 and under.error_rate == pytest.approx(
        float(result.success.float().mean()), abs=0.02
    )
