"""The study of the smoothing paper's conclusion, on the embedded digits."""

import pytest
import torch
from torch import nn

from command import check_refusal
from demur import DemurError, data
from demur.attacks import PGD
from demur.commands.run import STUDIES, run
from demur.defenses import GaussianBlur
from demur.evaluation.profiles import load_profile
from demur.evaluation.results import read
from demur.evaluation.scoring import TrainingInputs
from demur.evaluation.shares import FRONT
from demur.evaluation.tables import lookup
from demur.studies.recipes import SmallNetwork
from demur.studies.smoothing_extensions.recipes import Separated, SeparatingLoss, contrastive
from demur.threat import ThreatModel

STUDY = "smoothing-extensions"
TINY = """
data = ["digits"]
train_images = 300
epochs = 1
batch_size = 32
gaussian = [1.0]
median = []
separation = { steps = 1 }
[attack]
images = 10
eps = 0.1
steps = 3
targeted_steps = 10
ensemble_steps = 2
n_targets = 1
n_queries = 5
"""


def by_hand(embedding, labels, temperature):
    """Khosla et al. 2020, eq. 2, term by term."""
    unit = (embedding / embedding.norm(dim=1, keepdim=True)).double()
    terms = []
    for i in range(len(labels)):
        others = [j for j in range(len(labels)) if j != i]
        total = sum(torch.exp(unit[i] @ unit[j] / temperature) for j in others)
        same = [j for j in others if labels[j] == labels[i]]
        if same:
            logs = [torch.log(torch.exp(unit[i] @ unit[j] / temperature) / total) for j in same]
            terms.append(-sum(logs) / len(same))
    return sum(terms) / len(terms)


def test_the_contrastive_term_is_that_of_the_paper():
    torch.manual_seed(0)
    embedding, labels = torch.randn(9, 5), torch.tensor([0, 0, 1, 1, 1, 2, 3, 3, 0])
    wanted = float(by_hand(embedding, labels, 0.5))
    assert float(contrastive(embedding, labels, 0.5)) == pytest.approx(wanted, rel=1e-5)
    assert float(contrastive(3 * embedding, labels, 0.5)) == pytest.approx(wanted, rel=1e-5)


def test_images_of_classes_that_come_once_have_no_term():
    embedding = torch.randn(3, 5, requires_grad=True)
    value = contrastive(embedding, torch.tensor([0, 1, 2]), 0.1)
    value.backward()
    assert float(value.detach()) == 0
    assert not bool(embedding.grad.any())


def test_the_term_needs_a_dense_layer():
    network = nn.Sequential(nn.Conv2d(1, 2, 8), nn.Flatten())
    with pytest.raises(DemurError, match="dense layer"):
        SeparatingLoss(1.0, 0.1)(network, torch.rand(2, 1, 8, 8), torch.tensor([0, 1]), 0.0)


def test_the_term_draws_the_embeddings_of_a_class_together(tmp_path):
    digits = data.load("digits")
    test = data.load("digits", "test")
    spread = []
    for loss in (None, SeparatingLoss(1.0, 0.1)):
        given = TrainingInputs(digits, None, None, 0, "cpu", tmp_path / "checkpoint")
        model = Separated(SmallNetwork(2, 32), loss).train(given).eval()
        seen = []
        last = [one for one in model.modules() if isinstance(one, nn.Linear)][-1]
        hook = last.register_forward_pre_hook(lambda _, given, seen=seen: seen.append(given[0]))
        accuracy = float((model.predict(test.to_float()) == test.labels).double().mean())
        hook.remove()
        assert accuracy > 0.9
        spread.append(float(contrastive(torch.cat(seen), test.labels, 0.1)))
    assert spread[1] < spread[0]


def test_a_filter_stays_before_the_network_that_is_trained_on_attacked_images(tmp_path):
    some = data.load("digits").sample(60, 0)
    given = TrainingInputs(some, None, None, 0, "cpu", tmp_path / "checkpoint")
    attack, threat = PGD(steps=1), ThreatModel("linf", 0.1)
    recipe = Separated(SmallNetwork(1, 30, sigma=1.0), SeparatingLoss(0.5, 0.1), attack, threat)
    model = recipe.train(given)
    assert isinstance(model, GaussianBlur) and model.sigma == 1.0


def test_a_profile_that_does_not_fit_is_refused(tmp_path):
    check_refusal(STUDY, TINY.replace("images = 10", "images = 1000"), "1000", tmp_path)


@pytest.mark.parametrize("name", ["demo", "desk", "paper"])
def test_the_profiles_load(name):
    assert load_profile(STUDIES[STUDY], name).separation.weight == 0.5


@pytest.mark.slow
def test_the_study_compares_four_trainings_behind_each_filter(tmp_path):
    (tmp_path / "own.toml").write_text(TINY)
    results = read(run(STUDY, str(tmp_path / "own.toml"), out=tmp_path / "run"))
    assert [table.title for table in results.tables] == ["Filters and trainings", FRONT]
    found = lookup(results.tables[0])
    assert len(found) == 4
    for rows in found.values():
        assert set(rows) == {"no filter", "Gaussian, 1"}
        for row in rows.values():
            assert row["strongest ensemble: correct"] <= row["PGD: correct"]
    front = lookup(results.tables[1])
    assert set(front["strongest ensemble"]) == set(front["no attack"])
