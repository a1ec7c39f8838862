"""The study of neural rejection, end to end at a tiny scale, on the embedded digits."""

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import polars as pl
import pytest
import torch

from demur import ThreatModel
from demur.attacks import PGD
from demur.commands.run import STUDIES, run
from demur.evaluation import engines
from demur.evaluation.nodes import Measure, Train
from demur.evaluation.on_images import Evaluate
from demur.evaluation.profiles import load_profile
from demur.evaluation.results import read, read_gallery
from demur.report import render
from demur.studies import neural_rejection
from demur.studies.neural_rejection.attackers import DoubleStart, other_classes
from demur.studies.neural_rejection.recipes import NetworkTraining, network_figures
from demur.studies.neural_rejection.tables import ATTACKERS, STRONGEST, _network
from demur.studies.reported import measured, read_reported

from command import check_refusal, without_pictures  # isort: skip
from plans import images, trained  # isort: skip
from plans import run as execute  # isort: skip

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


@pytest.fixture(scope="module")
def study(profile):
    return neural_rejection.plan(load_profile(neural_rejection, profile), None, 0)


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
    assert [len(curve.series) for curve in results.curves] == [9, 12, 4]
    pictures, original, attacked = read_gallery(folder)
    assert {picture.model for picture in pictures} == {"DNN", "NR", "DNR"}
    assert original.shape == attacked.shape
    assert results.summary and len(results.cost.cells) > 20
    page = render(folder).read_text()
    assert "demur run neural-rejection" in page and "NaN" not in without_pictures(page)


def test_every_figure_of_the_paper_has_its_place_in_a_table(folder):
    places = {(one.title, *place) for one in read(folder).tables for place in figures_of(one)}
    reported = read_reported("neural_rejection")
    assert len(reported) == 4
    for one in reported:
        assert (one.table, one.group, one.row, one.column) in places
        assert "Table 3" in one.source


def figures_of(one):
    return [(row.group, row.row, row.column) for row in one.rows]


def test_the_papers_figures_do_not_stand_beside_figures_of_other_data(folder):
    """Digits are not MNIST."""
    assert all(row.paper is None for one in read(folder).tables for row in one.rows)


def test_at_eps_0_a_rejection_is_an_error_and_from_there_on_it_is_not(folder):
    results = read(folder)
    whole, correct, rejected = (
        figures(results, title) for title in ("Correct or rejected", "Correct,", "Rejected")
    )
    for attacker in ATTACKERS:
        for model in ("NR", "DNR"):
            assert whole[attacker, model, "eps 0"] == correct[attacker, model, "eps 0"]
            for eps in ("eps 1", "eps 2", "eps 4"):
                together = correct[attacker, model, eps] + rejected[attacker, model, eps]
                assert whole[attacker, model, eps] == pytest.approx(together)


def test_the_strongest_ensemble_is_never_weaker_than_another_and_errors_never_fall_with_eps(folder):
    """R12, R13: image by image, so in every figure."""
    whole = figures(read(folder), "Correct or rejected")
    names = {row for _, row, _ in whole}
    assert len(names) == 7
    for model in names:
        for eps in ("eps 1", "eps 2", "eps 4"):
            strongest = whole[STRONGEST, model, eps]
            assert all(strongest <= whole[attacker, model, eps] + 1e-9 for attacker in ATTACKERS)
        curve = [whole[STRONGEST, model, eps] for eps in ("eps 1", "eps 2", "eps 4")]
        assert curve == sorted(curve, reverse=True)


def test_no_attacker_sends_more_than_eps(folder):
    """R1, on the records."""
    records = pl.read_parquet(folder / "records.parquet").filter(pl.col("eps").is_finite())
    assert records["attacker"].n_unique() == 3
    assert (records["l2"] <= records["eps"] * (1 + 1e-6)).all()


def test_the_records_name_the_attackers_and_the_repetitions(folder):
    records = pl.read_parquet(folder / "records.parquet")
    names = {"none", "defence-unaware", "defence-aware", "strongest"}
    assert set(records["attacker"]) == names
    attacked = records.filter(pl.col("split") == "attacked")
    assert (attacked["repeat"] == attacked["index"] // 6).all() and set(attacked["repeat"]) == {
        0,
        1,
    }
    front = figures(read(folder), "Outcomes of each model")
    groups = {"no attack", "defence-unaware", "defence-aware", "strongest ensemble"}
    assert {group for group, _, _ in front} == groups


def test_an_interrupted_run_ends_with_the_figures_of_an_uninterrupted_one(
    folder, profile, tmp_path, monkeypatch
):
    """R10. With a store of its own."""
    whole, count = engines.Local.next, [0]

    def interrupt(engine):
        count[0] += 1
        if count[0] == 40:
            raise KeyboardInterrupt
        return whole(engine)

    monkeypatch.setattr(engines.Local, "next", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run("neural-rejection", profile, out=tmp_path / "again")
    assert len(list((tmp_path / "demur-store").glob("*.safetensors"))) == 39
    again = read(run("neural-rejection", profile, out=tmp_path / "again"))
    before = read(folder)
    assert again.tables == before.tables
    assert again.curves == before.curves and again.summary == before.summary


def test_a_second_run_computes_nothing_again(folder, profile, monkeypatch):
    before = read(folder)

    def never(engine, number, task):
        raise AssertionError(task)

    monkeypatch.setattr(engines.Local, "submit", never)
    after = read(run("neural-rejection", profile, out=folder))
    assert before.tables == after.tables and before.curves == after.curves


def test_no_image_is_both_trained_on_and_attacked_or_a_threshold_set_on(study):
    """R17."""
    trainings = [one.on for one in study.nodes if isinstance(one, Evaluate)]
    fitted = next(one for one in trainings if isinstance(one, Train) and one.validation)
    shown = [one for one in study.nodes if isinstance(one, Evaluate)]
    tested = {image for one in shown if one.split != "validation" for image in one.images.hashes}
    parts = [set(fitted.data.hashes), set(fitted.validation.hashes), tested]
    assert not parts[0] & parts[1] and not parts[0] & parts[2] and not parts[1] & parts[2]


def test_the_models_share_one_network_and_all_are_attacked_on_the_same_images(study):
    shown = [one for one in study.nodes if isinstance(one, Evaluate) and one.split == "attacked"]
    assert len({one.images.fingerprint for one in shown}) == 1
    models = {one.scored_on.name: one.scored_on for one in shown}
    assert list(models)[:3] == ["DNN", "NR", "DNR"] and len(models) == 7
    assert models["NR"].base is models["DNR"].base is models["DNN"]
    assert {one.base.name for one in shown if one.scored_on.name == "DNR, retrained"} == {
        "DNN, retrained"
    }


def test_double_initialisation_starts_from_another_class(study):
    chosen = study.nodes[-1].images.subset(range(8))
    known = next(
        one.validation
        for node in study.nodes
        if isinstance(node, Evaluate) and isinstance(one := node.on, Train) and one.validation
    )
    others = other_classes(chosen.to_float(), chosen.labels, known, 0)
    labels = {
        image.numpy().tobytes(): int(label)
        for image, label in zip(known.to_float(), known.labels, strict=True)
    }
    assert all(
        labels[other.numpy().tobytes()] != int(label)
        for other, label in zip(others, chosen.labels, strict=True)
    )
    # Each image has its own draw, whatever the batch.
    alone = other_classes(chosen.to_float()[3:4], chosen.labels[3:4], known, 0)
    assert torch.equal(alone[0], others[3])


@pytest.mark.parametrize("term", ["", "density", "matching"])
def test_the_papers_attack_is_a_node_like_any_other(term, tmp_path):
    """It is found again by its fields; other known images make another attack."""
    model, shown = trained(), images(4)
    attack = DoubleStart(PGD(2, 0.5, restarts=2), images(40), term, "11")
    same = DoubleStart(PGD(2, 0.5, restarts=2), images(40), term, "11")
    other = DoubleStart(PGD(2, 0.5, restarts=2), images(41), term, "11")
    threat = ThreatModel("l2", 2.0)
    layered = [
        Evaluate(model, shown, threat, one, attacker="defence-aware")
        for one in (attack, same, other)
    ]
    outputs = execute(tmp_path, layered)
    assert outputs.key(layered[0]) == outputs.key(layered[1]) != outputs.key(layered[2])
    records = outputs.records()
    assert (records["l2"] <= 2 * (1 + 1e-6)).all() and records["backwards"].max() <= 4
    assert "ImageSet" not in records["attack"][0]


def test_a_training_notes_figures_and_repetitions_follow_each_other(tmp_path):
    """Also where both come from the store."""
    recipe = NetworkTraining(1, 32, 0.05)
    model = Train(recipe, images(64), 0, name="DNN")
    shown = Evaluate(model, images(5), None, per_repeat=2)
    first = execute(tmp_path, [model, shown])
    again = execute(tmp_path, [model, shown])
    assert again.records()["repeat"].to_list() == [0, 0, 1, 1, 2]
    for outputs in (first, again):
        loss, accuracy = measured(outputs, "DNN")
        assert (loss.row, loss.column, loss.unit) == ("training", "cross-entropy", "")
        assert (accuracy.column, accuracy.unit) == ("accuracy", "%")
        assert loss.n == accuracy.n == 64 and loss.measured > 0


def test_the_papers_figures_stand_beside_those_of_its_own_data(tmp_path):
    """As many images of MNIST as the paper has."""
    shown = images(64)
    model = Train(NetworkTraining(1, 32, 0.05), shown, 0, name="DNN")
    outputs = execute(tmp_path, [model, Measure(network_figures, (model, shown, shown), "DNN")])
    papers = load_profile(neural_rejection, "paper")
    fewer = load_profile(neural_rejection, "demo")
    found = {}
    for settings, name in ((papers, "mnist"), (papers, "digits"), (fewer, "mnist")):
        given = SimpleNamespace(train=replace(shown, name=name))
        known = SimpleNamespace(outputs=outputs, profile=settings, given=given, say=str)
        rows = _network(known).rows
        found[settings.train_images, name] = {(row.row, row.column): row.paper for row in rows}
    beside = found.pop((30_000, "mnist"))
    assert beside["training", "cross-entropy"] == 0.0684 and beside["test", "accuracy"] == 98.95
    assert beside["training, without dropout", "accuracy"] is None
    assert all(value is None for other in found.values() for value in other.values())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("eps = [0.0, 1.0, 2.0, 4.0]->eps = [1.0, 2.0]", "must increase from 0"),
        ("eps = 2.0, ensemble->eps = 3.0, ensemble", "half of it"),
        ("images = 8, steps = 5->images = 800, steps = 5", "thresholds.images"),
        ("train_images = 500->train_images = 50000", "more than the"),
        ("per_class = 20->per_class = 2000", "class"),
        ("repeats = 2->repeats = 2000", "attack.images times attack.repeats is 12000"),
        ("learning_rate->learning_rat", "did you mean 'learning_rate'"),
    ],
)
def test_a_profile_that_does_not_fit_is_refused_in_one_line(change, said, tmp_path):
    text = TINY.replace(*change.split("->"))
    assert text != TINY
    check_refusal("neural-rejection", text, re.escape(said), tmp_path)


@pytest.mark.parametrize("name", ["demo", "desk", "paper"])
def test_the_profiles_are_sound(name):
    profile = load_profile(STUDIES["neural-rejection"], name)
    assert profile.strongest.eps in profile.attack.eps
    assert Path(STUDIES["neural-rejection"].__file__).with_name(f"{name}.toml").exists()
