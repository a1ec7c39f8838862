"""The study of the rejection paper's conclusion, on the embedded digits."""

from functools import partial

import pytest
import torch

from command import check_refusal
from demur import Classifier, DemurError, data, outcomes
from demur.classifier import Outcome
from demur.commands.run import STUDIES, run
from demur.evaluation.profiles import load_profile
from demur.evaluation.results import read
from demur.evaluation.scoring import TrainingInputs
from demur.evaluation.shares import FRONT
from demur.evaluation.tables import lookup
from demur.networks import background_class_network, dnr_cnn
from demur.studies.rejection_extensions.generator import AdvGAN, changed, generator_network
from demur.studies.rejection_extensions.plan import plan
from demur.studies.rejection_extensions.recipes import Grid, Machines, Made
from demur.threat import ThreatModel
from demur.training import fit

STUDY = "rejection-extensions"
TINY = """
data = ["digits"]
train_images = 500
validation_images = 100
epochs = 2
batch_size = 32
learning_rate = 0.05
per_class = 10
C = 10.0
search = { per_class = 5, C = [1.0], gamma = [0.001, 0.01] }
generator = { images = 64, epochs = 1, rounds = [1] }
[attack]
images = 10
eps = 1.5
steps = 3
ensemble_steps = 2
n_targets = 1
n_queries = 5
densities = [1.0]
"""


@pytest.fixture(scope="module")
def trained():
    digits = data.load("digits")
    network = background_class_network(10)
    fit(network, digits.images, digits.labels, epochs=3, batch_size=32)
    return Classifier(network, 10).eval()


@pytest.mark.parametrize("threat", ["l2:1.5", "linf:0.1"])
def test_a_generator_changes_images_within_the_threat(threat):
    parsed = ThreatModel.parse(threat)
    images = data.load("digits", "test").to_float()[:8]
    torch.manual_seed(0)
    sent = changed(generator_network(1), images, parsed).detach()
    difference = (sent - images).flatten(1)
    order = 2 if parsed.norm == "l2" else torch.inf
    assert float(difference.norm(order, dim=1).max()) <= parsed.eps
    assert float(sent.min()) >= 0 and float(sent.max()) <= 1


@pytest.mark.slow
def test_a_trained_generator_breaks_images_that_noise_leaves(trained):
    digits = data.load("digits", "test").sample(60, 0)
    known = data.load("digits").sample(200, 0)
    attack = partial(AdvGAN(known, epochs=8, batch_size=20), trained)
    found = attack(digits.to_float(), digits.labels, "l2:3")
    clean = outcomes(trained, digits.to_float(), digits.labels) == Outcome.WRONG
    assert int(found.success.sum()) > int(clean.sum()) + 15
    again = attack(digits.to_float(), digits.labels, "l2:3")
    assert torch.equal(found.images, again.images)
    # What a generator makes of an image does not depend on the other attacked images.
    alone = attack(digits.to_float()[:1], digits.labels[:1], "l2:3")
    assert torch.allclose(found.candidates[:1], alone.candidates, atol=1e-5)


@pytest.mark.parametrize("threat", ["l1:3", "l2"])
def test_a_generator_needs_a_size_in_l2_or_linf(trained, threat):
    digits = data.load("digits", "test").sample(2, 0)
    with pytest.raises(DemurError, match="L2 or Linf"):
        AdvGAN(digits)(trained, digits.to_float(), digits.labels, threat)


def test_machines_learn_from_made_images_and_from_a_grid(tmp_path):
    digits = data.load("digits")
    train, validation = digits.split(0.2, 0)
    base = Classifier(dnr_cnn(10), 10)
    inputs = TrainingInputs(train, validation, base, 0, "cpu", tmp_path / "none")
    plain = Machines(("15",), 10, 10.0, 0.01, 0.02)
    made = Made(AdvGAN(train.sample(32, 0), 1), ThreatModel("l2", 1.5), 2, 20)
    larger = Machines(("15",), 10, 10.0, 0.01, 0.02, made=made)
    support = [len(one.train(inputs).machines_[0].support) for one in (plain, larger)]
    assert support[1] > support[0]
    grid = Machines(("12", "15"), 10, 10.0, 0.01, 0.02, grid=Grid(5, (1.0,), (0.001, 0.1)))
    model = grid.train(inputs)
    assert set(model.gamma) <= {0.001, 0.1}
    assert inputs.notes["layer 7: C"] == 1.0


def test_a_profile_that_does_not_fit_is_refused(tmp_path):
    text = TINY.replace("train_images = 500", "train_images = 2000")
    check_refusal(STUDY, text, "2164 together", tmp_path)


def test_no_image_is_in_two_sets(tmp_path):
    (tmp_path / "own.toml").write_text(TINY)
    study = plan(load_profile(STUDIES[STUDY], str(tmp_path / "own.toml")), None, 0)
    network = study.nodes[0]
    attacked = next(node for node in study.nodes if hasattr(node, "attacker"))
    machines = next(node for node in study.nodes if getattr(node, "validation", None))
    sets = [network.data, machines.validation, attacked.images]
    contents = [{image.numpy().tobytes() for image in one.images} for one in sets]
    assert not contents[0] & contents[1] and not contents[0] & contents[2]
    assert not contents[1] & contents[2]


@pytest.mark.parametrize("name", ["demo", "desk", "paper"])
def test_the_profiles_load(name):
    assert load_profile(STUDIES[STUDY], name).attack.eps == 1.5


@pytest.mark.slow
def test_the_study_answers_its_questions(tmp_path):
    (tmp_path / "own.toml").write_text(TINY)
    folder = run(STUDY, str(tmp_path / "own.toml"), out=tmp_path / "run")
    results = read(folder)
    models, density, chosen, front = results.tables
    assert front.title == FRONT
    assert len(lookup(models)[""]) == 8
    assert set(lookup(density)) == {"NR, layer 8", "DNR, layers 5, 7 and 8"}
    assert {row.column for row in chosen.rows} == {"C", "gamma"}
    for row in lookup(models)[""].values():
        single = [row[f"{name}: wrong"] for name in ("PGD", "generator", "PGD on the network")]
        assert row["strongest ensemble: wrong"] >= max(single)
