"""The neural-rejection experiment, end to end at a tiny scale, on the embedded digits."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from demur import DemurError, Outcome
from demur.commands.run import STUDIES, run
from demur.evaluation.profiles import load_profile
from demur.evaluation.results import read, read_gallery
from demur.experiments.neural_rejection import attackers, models
from demur.report import render

TINY = """
data = ["digits"]
train_images = 500
validation_images = 60
epochs = 12
batch_size = 64
learning_rate = 0.05
gallery = 6
machines = { per_class = 20, C = 10.0, combiner_C = 10.0 }
attack = { images = 6, repeats = 2, eps = [0.0, 1.0, 2.0, 4.0], steps = 12, step_size = 0.3 }
strongest = { steps = 12, eps = 2.0, ensemble_steps = 3, n_targets = 1, n_queries = 10 }
thresholds = { images = 8, steps = 5, rates = [0.01, 0.05, 0.1] }
retraining = { attacked = 60, eps = 2.0, steps = 10, epochs = 1 }
adversarial = { eps = 1.0, steps = 2, epochs = 1 }
"""


@pytest.fixture(scope="module")
def profile(tmp_path_factory):
    path = tmp_path_factory.mktemp("profile") / "tiny.toml"
    path.write_text(TINY)
    return str(path)


@pytest.fixture(scope="module")
def folder(profile, tmp_path_factory):
    return run("neural-rejection", profile, out=tmp_path_factory.mktemp("runs") / "whole")


def table(results, title):
    return next(one for one in results.tables if one.title.startswith(title))


def figures(results, title):
    return {(row.group, row.row, row.column): row.measured for row in table(results, title).rows}


def test_a_run_leaves_its_tables_curves_and_pictures(folder):
    """Table 3, Figures 7, 8, 10, 11 and 12, and the measures of references that the paper lacks."""
    results = read(folder)
    titles = [one.title for one in results.tables]
    for wanted in (
        "The network (Table 3)",
        "The machines",
        "Clean",
        "Correct or rejected",
        "Rejected",
        "The attacks compared",
        "Other measures",
    ):
        assert any(title.startswith(wanted) for title in titles), wanted
    assert [curve.title.split(" (")[0] for curve in results.curves] == [
        "Security evaluation",
        "After adversarial training",
        "Outcomes against false rejection",
    ]
    assert (
        len(results.curves[0].series) == 9
        and len(results.curves[1].series) == 12
        and len(results.curves[2].series) == 4
    )
    pictures, original, attacked = read_gallery(folder)
    assert {picture.model for picture in pictures} == {
        "DNN",
        "NR",
        "DNR",
    } and original.shape == attacked.shape
    assert results.summary and len(results.cost.cells) > 20
    page = render(folder).read_text()
    assert "demur run neural-rejection" in page and "NaN" not in page


def test_at_eps_0_a_rejection_is_an_error_and_from_there_on_it_is_not(folder):
    results = read(folder)
    whole, correct, rejected = (
        figures(results, title) for title in ("Correct or rejected", "Correct,", "Rejected")
    )
    for attacker in attackers.ATTACKERS:
        for model in ("NR", "DNR"):
            assert whole[attacker, model, "eps 0"] == correct[attacker, model, "eps 0"]
            for eps in ("eps 1", "eps 2", "eps 4"):
                together = correct[attacker, model, eps] + rejected[attacker, model, eps]
                assert whole[attacker, model, eps] == pytest.approx(together)


def test_the_strongest_ensemble_is_never_weaker_than_another_and_errors_never_fall_with_eps(folder):
    """R12, R13: image by image, so in every figure."""
    whole = figures(read(folder), "Correct or rejected")
    names = {row for _, row, _ in whole}
    for model in names:
        for eps in ("eps 1", "eps 2", "eps 4"):
            strongest = whole[attackers.STRONGEST, model, eps]
            assert all(
                strongest <= whole[attacker, model, eps] + 1e-9 for attacker in attackers.ATTACKERS
            )
        curve = [whole[attackers.STRONGEST, model, eps] for eps in ("eps 1", "eps 2", "eps 4")]
        assert curve == sorted(curve, reverse=True)


def test_no_attacker_sends_more_than_eps(folder):
    """R1, on what the cells keep."""
    checked = 0
    for path in (folder / "cells").glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            config = json.loads(file.metadata()["config"])
            if config["cell"] != "unaware":
                continue
            sent, eps = file.get_tensor("sent"), config["settings"]["eps"]
        moved = (sent - sent[0]).flatten(2).double().norm(dim=2)
        assert (
            bool((moved <= torch.tensor(eps)[:, None] * (1 + 1e-6)).all())
            and 0 <= float(sent.min()) <= float(sent.max()) <= 1
        )
        checked += 1
    assert checked == 3  # three networks


def test_a_run_is_resumed_from_its_cells_and_says_the_same(folder, profile):
    before = read(folder)
    cells = sorted((folder / "cells").iterdir(), key=lambda path: path.stat().st_mtime)
    cells[-1].unlink()
    run("neural-rejection", profile, out=folder)
    after = read(folder)
    assert (
        before.tables == after.tables
        and before.curves == after.curves
        and before.summary == after.summary
    )


def test_no_image_is_both_trained_on_and_attacked_or_a_threshold_set_on(profile):
    """R17."""
    material = models.prepare(load_profile(STUDIES["neural-rejection"], profile), None, 0)
    parts = [
        {image.numpy().tobytes() for image in part.images}
        for part in (material.train, material.validation, material.test)
    ]
    assert not parts[0] & parts[1] and not parts[0] & parts[2] and not parts[1] & parts[2]


def test_double_initialisation_starts_from_another_class(profile):
    material = models.prepare(load_profile(STUDIES["neural-rejection"], profile), None, 0)
    images = material.test.sample(30, 0)
    others = attackers.other_classes(images, material.validation, 0)
    known = {
        image.numpy().tobytes(): int(label)
        for image, label in zip(
            material.validation.to_float(), material.validation.labels, strict=True
        )
    }
    assert all(
        known[other.numpy().tobytes()] != int(label)
        for other, label in zip(others, images.labels, strict=True)
    )


def test_the_worst_is_wrong_if_any_attacker_makes_it_so(profile):
    settings = load_profile(STUDIES["neural-rejection"], profile)
    count = len(settings.attack.eps)

    class Found:
        def __init__(self, outcome):
            self.tensors = {"outcomes": torch.full((count, 4), int(outcome))}

    distance = torch.tensor([0.0, 1.0, 3.0, torch.inf])
    rejected_at = torch.tensor([torch.inf, 0.0, 1.5, 1.5])
    worst = attackers.worst(
        settings, Found(Outcome.CORRECT), Found(Outcome.CORRECT), distance, rejected_at
    )
    assert worst[0].tolist() == [Outcome.CORRECT] * 4  # at eps 0 there is no attack
    assert worst[1:].tolist() == [
        [Outcome.WRONG, Outcome.WRONG, Outcome.CORRECT, Outcome.CORRECT],
        [Outcome.WRONG, Outcome.WRONG, Outcome.REJECTED, Outcome.REJECTED],
        [Outcome.WRONG, Outcome.WRONG, Outcome.WRONG, Outcome.REJECTED],
    ]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("eps = [0.0, 1.0, 2.0, 4.0]->eps = [1.0, 2.0]", "must increase from 0"),
        ("eps = 2.0, ensemble->eps = 3.0, ensemble", "half of it"),
        ("images = 8, steps = 5->images = 800, steps = 5", "thresholds.images"),
        ("train_images = 500->train_images = 50000", "more than the"),
        ("per_class = 20->per_class = 2000", "class"),
        ("repeats = 2->repeats = 2000", "test images"),
        ("learning_rate->learning_rat", "did you mean 'learning_rate'"),
    ],
)
def test_a_profile_that_does_not_fit_is_said(change, said, tmp_path):
    path = tmp_path / "bad.toml"
    path.write_text(TINY.replace(*change.split("->")))
    with pytest.raises(DemurError, match=re.escape(said)):
        run("neural-rejection", str(path), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["demo", "desk", "paper"])
def test_the_profiles_are_sound(name):
    profile = load_profile(STUDIES["neural-rejection"], name)
    assert profile.strongest.eps in profile.attack.eps
    assert Path(STUDIES["neural-rejection"].__file__).with_name(f"{name}.toml").exists()
