"""The study of section VII of the background-class paper, on the embedded digits."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from command import check_refusal
from demur import Outcome, data, outcomes
from demur.attacks import PGD
from demur.commands.run import STUDIES, run
from demur.evaluation.profiles import load_profile
from demur.evaluation.records import read_parquet
from demur.evaluation.results import read
from demur.evaluation.scoring import TrainingInputs
from demur.evaluation.shares import FRONT
from demur.evaluation.tables import lookup
from demur.studies.background_class.recipes import Split
from demur.studies.background_extensions.plan import plan
from demur.studies.background_extensions.recipes import KINDS, MADE, OTHERS, Extended, Growth, made
from demur.threat import ThreatModel

STUDY = "background-extensions"
TINY = """
data = ["digits"]
keys = "01234567"
background = "89"
key_images = 300
epochs = 2
batch_size = 32
widths = [4]
made_per_kind = 30
strange = 20
attack = { images = 20, steps = 4, ensemble_steps = 2, n_targets = 1, n_queries = 5 }
grown = { rounds = 1, images = 40, steps = 4, epochs = 1 }
"""
SPLIT = Split(tuple("01234567"), ("8", "9"), 0.1, 0, key_images=400)


def given(tmp_path, seed=0):
    return TrainingInputs(data.load("digits"), None, None, seed, "cpu", tmp_path / "checkpoint")


def profile(tmp_path, text=TINY):
    (tmp_path / "own.toml").write_text(text)
    return load_profile(STUDIES[STUDY], str(tmp_path / "own.toml"))


@pytest.mark.parametrize("kind", MADE)
def test_made_images_have_the_shape_of_the_given_ones(kind):
    digits = data.load("digits", "test")
    found = made(kind, digits, 3, 0)
    assert found.shape == (3, *digits.image_shape)
    assert found.dtype == torch.uint8
    assert torch.equal(found, made(kind, digits, 3, 0))
    assert not torch.equal(found, made(kind, digits, 3, 1))


def test_growth_adds_what_the_model_accepted_as_a_wrong_class(tmp_path):
    threat = ThreatModel("linf", 0.25)
    growth = Growth(1, 100, 2, PGD(steps=10), threat)
    plain = Extended(SPLIT, 3, 32, width=8, kinds=(OTHERS,))
    inputs = given(tmp_path)
    before = plain.train(given(tmp_path))
    after = replace(plain, growth=growth).train(inputs)
    assert inputs.notes["round 1: accepted errors"] > 50
    assert inputs.notes["round 1: accepted errors"] <= 100
    # What is attacked on the model before growth is rejected after it.
    test = data.load("digits", "test").select_classes(tuple("01234567")).sample(100, 1)
    sent = PGD(steps=10)(before, test.to_float(), test.labels, threat).candidates
    rejected = [
        int((outcomes(model, sent, test.labels) == Outcome.REJECTED).sum())
        for model in (before, after)
    ]
    assert rejected[1] > rejected[0] + 50


def test_each_model_is_planned_once_and_with_its_undefended_twin(tmp_path):
    study = plan(profile(tmp_path), None, 0)
    names = {node.scored_on.name for node in study.nodes if hasattr(node, "attacker")}
    widths = {f"width {width}, {kind}background" for width in (4, 32) for kind in ("", "no ")}
    assert names == {*widths, *KINDS, "all kinds", "round 0", "round 1"}


def test_images_of_other_classes_are_kept_for_the_test(tmp_path):
    study = plan(profile(tmp_path), None, 0)
    measured = [node for node in study.nodes if hasattr(node, "function")]
    kinds = dict(measured[0].inputs[1:])
    recipe = measured[0].inputs[0].recipe
    _, _, used, _ = recipe.split.parts(data.load("digits"))
    trained = {image.numpy().tobytes() for image in used}
    assert set(kinds) == {*KINDS, "uniform noise"}
    assert not any(image.numpy().tobytes() in trained for image in kinds[OTHERS])


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("key_images = 300", "key_images = 3000", "key_images is 3000"),
        ("images = 20,", "images = 900,", "attack.images is 900"),
        ('background = "89"', 'background = "x"', "'x'"),
        ("epochs = 2", "epochs = 2\nbackground_share = 1e-9", "no background image"),
    ],
)
def test_a_profile_that_does_not_fit_is_refused(tmp_path, old, new, said):
    check_refusal(STUDY, TINY.replace(old, new, 1), said, tmp_path)


@pytest.mark.parametrize("name", ["demo", "desk", "paper"])
def test_the_profiles_load(name):
    assert load_profile(STUDIES[STUDY], name).attack.eps == 0.25


@pytest.mark.slow
def test_the_study_answers_its_three_questions(tmp_path):
    (tmp_path / "own.toml").write_text(TINY)
    folder = run(STUDY, str(tmp_path / "own.toml"), out=Path(tmp_path) / "run")
    results = read(folder)
    titles = [table.title for table in results.tables]
    assert titles[-1] == FRONT
    assert titles[:3] == [
        "Capacity: the width of the network",
        "Kinds of background under attack",
        "Background grown by attacks",
    ]
    assert sum(line.startswith(("Capacity", "Kinds", "Grown")) for line in results.summary) == 3
    kinds = lookup(results.tables[3])[""]
    assert set(kinds) == {*KINDS, "all kinds"}
    grown = lookup(results.tables[2])[""]
    records = read_parquet(folder / "records.parquet")
    own = records.filter((records["model"] == "round 1") & (records["attacker"] == "none"))
    share = 100 * (own["outcome"] == "correct").sum() / len(own)
    assert grown["round 1"]["no attack: correct"] == pytest.approx(share)
