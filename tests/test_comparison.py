"""All defences on the same images, the demo of everything, and pages of several runs."""

import shutil

import pytest
import torch
from torch import nn

from command import check_refusal, demur
from demur import REJECT, Classifier, DemurError
from demur.commands import demo
from demur.commands import run as command
from demur.commands.run import STUDIES, run
from demur.defenses import EitherRejects
from demur.evaluation.profiles import load_profile
from demur.evaluation.results import JobStep, Measurement, Table, read, read_gallery
from demur.evaluation.shares import ATTACKED_BY, FRONT
from demur.report import compare
from demur.report.compare import MainJob
from demur.studies.comparison.plan import COMBINED, TITLE

PLAIN, STANDARD = "no defence", "adversarial training"
MODELS = (
    PLAIN,
    "background class",
    "localized adversarial training",
    "deep neural rejection",
    "Gaussian blur",
    COMBINED,
    STANDARD,
)

ROW = Measurement("before", "wrong", unit="%", measured=50.0)
MAIN = MainJob([JobStep("Audit", "Found.")], Table("Before and after hardening", [ROW]))

TINY = """
data = ["digits"]
train_images = 500
epochs = 2
batch_size = 32
attacked_epochs = 1
attack_steps = 2
box = 12
made_per_kind = 20
per_class = 15
gallery = 14
attack = { images = 12, eps = 0.1, steps = 4, ensemble_steps = 2, n_targets = 1, n_queries = 5 }
"""


@pytest.fixture(scope="module")
def profile(tmp_path_factory):
    path = tmp_path_factory.mktemp("profile") / "tiny.toml"
    path.write_text(TINY)
    return str(path)


@pytest.fixture(scope="module")
def folder(profile, tmp_path_factory):
    return run("comparison", profile, out=tmp_path_factory.mktemp("runs") / "whole")


def front(results):
    return {(row.group, row.row, row.column): row.measured for row in results.tables[0].rows}


@pytest.mark.slow
def test_every_defence_meets_every_attacker_in_three_outcomes(folder):
    found = front(read(folder))
    for attacker in ATTACKED_BY:
        for model in MODELS:
            assert sum(
                found[attacker, model, column] for column in ("correct", "rejected", "wrong")
            ) == pytest.approx(100)
    for model in MODELS:  # R13, R18
        assert all(
            found["strongest ensemble", model, "wrong"] >= found[attacker, model, "wrong"]
            for attacker in ATTACKED_BY[1:]
        )
    assert found["no attack", PLAIN, "rejected"] == found["no attack", STANDARD, "rejected"] == 0
    pictures, original, attacked = read_gallery(folder)
    assert {picture.model for picture in pictures} == set(MODELS) and len(original) == len(
        attacked
    ) == 14


@pytest.mark.slow
def test_a_run_is_resumed_from_its_cells_and_says_the_same(folder, profile):
    """R10."""
    before = read(folder)
    store = folder.parent / "demur-store"
    for path in sorted(store.glob("*.safetensors"), key=lambda one: one.stat().st_mtime)[-3:]:
        path.unlink()
    run("comparison", profile, out=folder)
    assert read(folder).tables == before.tables


class _Scores(nn.Module):
    def __init__(self, rows):
        super().__init__()
        self.rows = torch.tensor(rows)

    def forward(self, images):
        return self.rows


def test_what_either_rejects_is_rejected_and_classes_are_the_firsts():
    """Two classes: first rejects the second image, the other one the third."""
    first = Classifier(
        _Scores([[0.9, 0.2, 0.5], [0.1, 0.2, 0.5], [0.2, 0.9, 0.5], [0.2, 0.9, 0.5]]), 2
    )
    other = Classifier(
        _Scores([[1.0, 3.0, -1.0], [1.0, 0.0, -1.0], [0.0, 1.0, 4.0], [5.0, 1.0, 4.0]]), 2
    )
    both = EitherRejects(first, other)
    assert both.predict(torch.rand(4, 1, 2, 2)).tolist() == [0, REJECT, REJECT, 1]


def test_a_combined_reject_score_does_not_depend_on_the_sign_of_the_scores():
    """R23: the same decisions where all scores of both classifiers are negative."""
    draws = torch.randn(2, 200, 4, generator=torch.Generator().manual_seed(0))
    decided = []
    for constant in (0.0, 100.0, -100.0):
        first, other = (Classifier(_Scores((scores + constant).tolist()), 3) for scores in draws)
        both = EitherRejects(first, other)
        decided.append(both.predict(torch.rand(200, 1, 2, 2), batch_size=200))
    assert torch.equal(decided[0], decided[1])
    assert torch.equal(decided[0], decided[2])


@pytest.mark.slow
def test_a_page_of_several_runs_has_the_front_table_of_each(folder, profile, tmp_path):
    again = run("comparison", profile, out=tmp_path / "again", seed=1)
    page = compare([folder, again], tmp_path / "page")
    results = read(tmp_path / "page")
    assert (
        results.title == FRONT
        and len(results.tables) == 2
        and results.tables[0].rows == read(folder).tables[0].rows
    )
    text = page.read_text()
    assert "demur compare" in text and COMBINED in text
    compare([folder], tmp_path / "page")  # made anew
    assert len(read(tmp_path / "page").tables) == 1


@pytest.mark.slow
def test_what_cannot_be_compared_is_refused(folder, tmp_path):
    with pytest.raises(DemurError, match="at least one run"):
        compare([], tmp_path)
    with pytest.raises(DemurError, match="there is no file"):
        compare([tmp_path / "none"], tmp_path / "page")
    with pytest.raises(DemurError, match="is one of the runs"):
        compare([folder], folder)
    with pytest.raises(DemurError, match="holds a run"):
        compare([tmp_path / "none"], folder)
    assert read(folder).experiment == "comparison"


def test_every_experiment_has_the_front_table():
    assert set(STUDIES) == {
        "background-class",
        "background-extensions",
        "certified-rejection",
        "defence-transfer",
        "localized-training",
        "neural-rejection",
        "rejection-extensions",
        "smoothing",
        "smoothing-extensions",
        "comparison",
    }


@pytest.mark.slow
def test_the_demo_of_all_studies_runs_each_and_writes_one_page(folder, tmp_path, monkeypatch):
    asked = []

    def instead(experiment, profile, *, out, **_):
        asked.append((experiment, profile))
        return shutil.copytree(folder, out)

    monkeypatch.setattr(command, "run", instead)
    monkeypatch.setattr(demo, "main_job", lambda *_, **__: MAIN)
    done = demur("demo", "--studies", "--out", tmp_path / "demo")
    assert done.returncode == 0, done.stderr
    assert (
        asked[0] == ("comparison", "demo")
        and {name for name, _ in asked} == set(STUDIES)
        and len(asked) == len(STUDIES)
    )
    assert f"{TITLE} (1 of 10)" in done.stderr
    page = (tmp_path / "demo" / "report.html").read_text(encoding="utf-8")
    assert page.index('<figure class="table">') < page.index(
        'class="summary"'
    )  # what it is for comes first
    assert page.index("The main job") < page.index(TITLE) and all(
        (tmp_path / "demo" / name / "report.html").exists() for name, _ in asked
    )


@pytest.mark.slow
def test_the_demo_runs_the_comparison(folder, tmp_path, monkeypatch):
    asked = []

    def instead(study, profile, *, out, **_):
        asked.append((study, profile))
        return shutil.copytree(folder, out)

    monkeypatch.setattr(command, "run", instead)
    monkeypatch.setattr(demo, "main_job", lambda *_, **__: MAIN)
    done = demur("demo", "--out", tmp_path / "demo")
    assert done.returncode == 0, done.stderr
    assert asked == [("comparison", "demo")]
    assert TITLE in done.stderr


@pytest.mark.parametrize("name", ["demo", "desk", "paper"])
def test_the_profiles_that_come_along_fit(name):
    assert load_profile(STUDIES["comparison"], name).attack.eps == 0.1


def test_a_box_that_does_not_fit_is_refused(tmp_path):
    check_refusal(
        "comparison", TINY.replace("box = 12", "box = 40"), "a box of 40 pixels", tmp_path
    )
