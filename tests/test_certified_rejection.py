"""The study of certified rejection, on the embedded digits."""

import polars as pl
import pytest
import torch

from command import check_refusal
from demur import Classifier, data
from demur.attacks import PGD
from demur.certificates import Prover
from demur.commands.run import STUDIES, run
from demur.evaluation.nodes import Train
from demur.evaluation.on_images import Certify
from demur.evaluation.profiles import load_profile
from demur.evaluation.results import read
from demur.evaluation.scoring import TrainingInputs
from demur.evaluation.shares import FRONT
from demur.evaluation.tables import lookup
from demur.goals import ForceReject
from demur.networks import certified_cnn
from demur.studies.certified_rejection.plan import plan
from demur.studies.certified_rejection.recipes import (
    ColumnAtRate,
    Consistency,
    Noisy,
    SmallCnn,
    Smoothed,
    Threshold,
)
from demur.studies.certified_rejection.smoothing import OnExpectation
from demur.studies.certified_rejection.tables import MATCHED, SMOOTHED, contradictions
from demur.threat import ThreatModel

STUDY = "certified-rejection"
TINY = """
data = ["digits"]
train_images = 600
test_images = 40
epochs = 2
batch_size = 32
deltas = [0.03]
rates = [0.1]
denial = 0.02
certified = { eps = 0.06, epochs = 4, ramp = 2, batch_size = 32 }
adversarial = { eps = 0.06, steps = 2, epochs = 1 }
attack = { images = 20, few = 10, eps = [0.05], steps = 3, n_targets = 1, n_queries = 10 }
papers = { made_per_kind = 20, per_class = 10 }
[smoothing]
epochs = 3
images = 20
attacked = 4
draws = 200
steps = 3
cases = [{ sigma = 0.25, delta = 0.15, eps = 0.3 }]
"""


def given(tmp_path, base=None):
    digits = data.load("digits").sample(300, 0)
    return TrainingInputs(digits, None, base, 0, "cpu", tmp_path / "checkpoint")


def test_a_threshold_and_a_check_reject_at_the_rate_that_is_asked_for(tmp_path):
    base = SmallCnn(2, 32).train(given(tmp_path))
    inputs = given(tmp_path, base)
    images = inputs.data.to_float()
    right = base.predict(images) == inputs.data.labels
    # Radii of a network without certified training are small: they have ties.
    for recipe, least in ((Threshold(0.1), 0.09), (Consistency("ibp", rate=0.1), 0.03)):
        model = recipe.train(inputs).eval()
        rejected = int((model.predict(images)[right] == -1).sum())
        assert least < rejected / int(right.sum()) <= 0.1
    assert inputs.notes["delta"] == model.threshold > 0


def test_the_threshold_of_a_learned_column_moves_to_the_rate_that_is_asked_for(tmp_path):
    made = SmallCnn(2, 32, eps=0.06, ramp=1, reject=True).train(given(tmp_path)).eval()
    assert made.rejects
    data = given(tmp_path).data
    classes = made.scores(data.to_float())[:, :10].argmax(1)
    right = classes == data.labels
    for rate in (0.05, 0.2):
        model = ColumnAtRate(rate).train(given(tmp_path, made)).eval()
        rejected = int((model.predict(data.to_float())[right] == -1).sum())
        assert rate * int(right.sum()) - 2 < rejected <= rate * int(right.sum())
    # From another threshold, the same.
    again = ColumnAtRate(0.2).train(given(tmp_path, model)).eval()
    assert again.threshold == pytest.approx(model.threshold, abs=1e-4)


def test_smoothing_is_attacked_through_an_expectation_and_scored_with_all_draws(tmp_path):
    base = Noisy(2, 32, 0.25, 10.0).train(given(tmp_path)).eval()
    model = Smoothed(0.25, 0.1, 200, 0.001).train(given(tmp_path, base)).eval()
    test = data.load("digits", "test").sample(6, 0)
    images, labels = test.to_float(), test.labels
    proven, radius = Prover(steps=0).certify(model, images, labels, ThreatModel("l2", 0.2))
    assert bool(proven.any()) and bool(radius.isnan().all())
    wide = ThreatModel("l2", 6.0)
    for common in (False, True):
        attack = OnExpectation(PGD(steps=5, keep_maximizing=True), draws=8, common=common)
        found = attack(model, images, labels, wide)
        again = attack(model, images, labels, wide)
        assert torch.equal(found.candidates, again.candidates)
        moved = (found.candidates - images).flatten(1).norm(dim=1)
        assert bool((moved > 1).all()) and bool((moved <= 6.001).all())
        assert torch.equal(found.success, (model.predict(found.images) != labels) & found.success)
        assert not bool(
            (attack(model, images, labels, ThreatModel("l2", 0.2)).success & proven).any()
        )


def test_certified_training_proves_more_than_plain_training(tmp_path):
    test = data.load("digits", "test").sample(60, 0)
    threat = ThreatModel("linf", 0.02)
    found = []
    for recipe in (SmallCnn(2, 32), SmallCnn(8, 32, eps=0.06, ramp=2)):
        model = recipe.train(given(tmp_path)).eval()
        proven, radius = Prover(("ibp",)).certify(model, test.to_float(), test.labels, threat)
        assert bool((radius[proven] > 0).all())
        found.append(int(proven.sum()))
    assert found[1] > found[0] + 20


def test_what_is_proven_by_a_check_is_what_its_network_has_at_a_smaller_size(tmp_path):
    network = SmallCnn(5, 32, eps=0.06, ramp=2).train(given(tmp_path)).eval()
    checked = Consistency("ibp", delta=0.02).train(given(tmp_path, network)).eval()
    test = data.load("digits", "test").sample(40, 0)
    images, labels = test.to_float(), test.labels
    own, _ = Prover(("ibp",)).certify(checked, images, labels, ThreatModel("linf", 0.05))
    smaller, _ = Prover(("ibp",)).certify(network, images, labels, ThreatModel("linf", 0.03))
    assert bool((own >= smaller).all()) and bool(own.any())


def test_an_image_that_is_certified_and_broken_is_found():
    kinds = {"model": pl.String, "image": pl.String, "eps": pl.Float64}
    rows = [("a", "1", 0.1), ("a", "2", 0.1), ("b", "1", 0.1)]
    both = pl.DataFrame(rows, schema=kinds, orient="row")
    attacked = both.with_columns(outcome=pl.Series(["wrong", "wrong", "correct"]))
    proven = both.with_columns(certified=pl.Series([True, False, True]))
    assert contradictions(attacked, proven) == (1, 3)
    other = proven.with_columns(eps=pl.lit(0.2))
    assert contradictions(attacked, other) == (0, 0)


def test_the_check_of_an_attack_is_not_certified(tmp_path):
    (tmp_path / "own.toml").write_text(TINY)
    study = plan(load_profile(STUDIES[STUDY], str(tmp_path / "own.toml")), None, 0)
    certified = {node.on.name for node in study.nodes if hasattr(node, "method")}
    models = {node.scored_on.name for node in study.nodes if hasattr(node, "attacker")}
    assert models - certified == {
        "CPR (unproven check), delta 0.1",
        "CPR (unproven check) at 10 % false rejection",
    }
    threats = [(node, node.threat) for node in study.nodes if getattr(node, "threat", None)]
    forced = {node.on.name for node, threat in threats if threat.goal == ForceReject()}
    assert "learned reject column" in forced and "certified training" not in forced
    few = [len(node.images) for node in study.nodes if getattr(node, "attacker", "") == "strongest"]
    assert set(few) == {10, 20}


def test_a_profile_without_some_tables_has_fewer_models(tmp_path):
    lines = [one for one in TINY.split("[smoothing]")[0].splitlines() if one]
    text = "\n".join(one for one in lines if not one.startswith(("adversarial", "papers")))
    text = text.replace("ramp = 2,", 'ramp = 2, column = false, methods = ["branching"],')
    (tmp_path / "own.toml").write_text(text)
    study = plan(load_profile(STUDIES[STUDY], str(tmp_path / "own.toml")), None, 0)
    assert {node.name for node in study.nodes if isinstance(node, Train)} == {
        "plain",
        "certified training",
        "certified consistency, delta 0.03",
        "certified consistency at 10 % false rejection",
    }
    provers = {node.on.name: node.method for node in study.nodes if isinstance(node, Certify)}
    assert provers["certified training"].methods == ("branching",)
    assert provers["plain"].methods == ("ibp", "crown-ibp")
    # Intervals alone prove that a check never rejects.
    forced = [
        node.method.methods
        for node in study.nodes
        if isinstance(node, Certify) and node.threat.goal == ForceReject()
    ]
    assert len(forced) == 2 and all("ibp" in one for one in forced)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (("test_images = 40", "test_images = 10"), "test_images is 10"),
        (("few = 10", "few = 30"), "attack.few cannot be more"),
        (("ramp = 2,", 'ramp = 2, methods = ["ibq"],'), "'ibp', 'crown-ibp'"),
    ],
)
def test_a_profile_that_does_not_fit_is_refused(tmp_path, changed, said):
    check_refusal(STUDY, TINY.replace(*changed), said, tmp_path)


@pytest.mark.parametrize("name", ["demo", "desk", "paper", "proven"])
def test_the_profiles_load(name):
    assert load_profile(STUDIES[STUDY], name).certified.eps > 0


@pytest.mark.slow
def test_a_study_without_some_tables_has_results(tmp_path):
    lines = [one for one in TINY.split("[smoothing]")[0].splitlines() if one]
    text = "\n".join(one for one in lines if not one.startswith(("adversarial", "papers")))
    (tmp_path / "own.toml").write_text(text.replace("ramp = 2,", "ramp = 2, column = false,"))
    results = read(run(STUDY, str(tmp_path / "own.toml"), out=tmp_path / "run"))
    assert not any("smoothing" in line for line in results.summary)
    rows = lookup(results.tables[0])[""]
    assert set(rows) == {"plain", "certified training", "certified consistency, delta 0.03"}


@pytest.mark.slow
def test_the_truth_lies_between_what_is_proven_and_what_is_not_broken(tmp_path):
    (tmp_path / "own.toml").write_text(TINY)
    folder = run(STUDY, str(tmp_path / "own.toml"), out=tmp_path / "run")
    results = read(folder)
    assert results.tables[-1].title == FRONT
    rows = lookup(results.tables[0])[""]
    assert rows["plain"]["proven"] <= 20
    assert rows["certified training"]["proven"] > 20
    row = rows["certified consistency, delta 0.03"]
    # What is proven never to be rejected is not rejected without an attack, either.
    assert row["never rejected within 0.02"] <= 100 - row["clean: rejected"]
    assert row["implied accuracy at 0.025"] <= row["not broken"]
    assert "implied accuracy at 0.025" not in rows["plain"]
    titles = {table.title: lookup(table) for table in results.tables}
    assert len(titles[MATCHED.format("0.05")]["10 % of the correct clean images rejected"]) == 4
    smooth = titles[SMOOTHED.format("0.3")][""]["smoothing, sigma 0.25, delta 0.15"]
    assert smooth["proven"] <= smooth["not broken"] + 1e-9
    assert any("No image is certified and broken" in line for line in results.summary)
    assert not any("certified and broken: a bound" in line for line in results.warnings)


@pytest.mark.slow
def test_a_network_breaks_nothing_that_is_certified(tmp_path):
    model = SmallCnn(6, 32, eps=0.06, ramp=2).train(given(tmp_path)).eval()
    assert isinstance(model, Classifier)
    test = data.load("digits", "test").sample(200, 1)
    images, labels = test.to_float(), test.labels
    threat = ThreatModel("linf", 0.05)
    proven, _ = Prover(("ibp", "crown-ibp"), steps=0).certify(model, images, labels, threat)
    broken = PGD(steps=40, restarts=2)(model, images, labels, threat).success
    assert not bool((proven & broken).any())
    assert int(proven.sum()) > 50
    untrained = Classifier(certified_cnn(10), 10).eval()
    assert not bool(Prover(("ibp",)).certify(untrained, images, labels, threat)[0].all())
