"""Losses of training: smoothing by consistency, and certified training of a reject column."""

import math

import pytest
import torch
from torch import nn

from demur import Classifier, DemurError, ThreatModel, data
from demur.attacks import PGD
from demur.bounds import Propagation, Region, trace
from demur.certificates import Status, certify
from demur.training import (
    CertifiedLoss,
    CertifiedRejectLoss,
    SmoothingLoss,
    certified_fit,
    fit,
)
from demur.training.certified import adam


class Sent(nn.Module):
    """Gives these scores, whatever the images."""

    def __init__(self, scores):
        super().__init__()
        self.scores = scores

    def forward(self, images):
        return self.scores


def small(outputs, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = [nn.AvgPool2d(4), nn.Flatten(), nn.Linear(49, 32), nn.BatchNorm1d(32), nn.ReLU()]
        return nn.Sequential(*layers, nn.Linear(32, outputs))


def test_the_loss_of_smoothing_is_the_formula():
    """Two copies with the softmax (.8, .2) and (.4, .6): all terms by hand."""
    scores = torch.tensor([[0.8, 0.2], [0.4, 0.6]]).log()
    found, mean = SmoothingLoss(0.3, weight=3.0, entropy=0.7)(
        Sent(scores), torch.zeros(1, 1, 1, 1), torch.tensor([0]), 0.0
    )
    clean = -(math.log(0.8) + math.log(0.4)) / 2
    first = 0.6 * math.log(0.6 / 0.8) + 0.4 * math.log(0.4 / 0.2)
    second = 0.6 * math.log(0.6 / 0.4) + 0.4 * math.log(0.4 / 0.6)
    spread = -0.6 * math.log(0.6) - 0.4 * math.log(0.4)
    assert found.item() == pytest.approx(clean + 3 * (first + second) / 2 + 0.7 * spread)
    assert mean.exp().tolist() == [pytest.approx([0.6, 0.4])]


def test_with_one_copy_and_no_entropy_it_is_cross_entropy_under_noise():
    images, labels = torch.rand(6, 1, 2, 2), torch.tensor([0, 1, 2, 0, 1, 2])
    module = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    torch.manual_seed(0)
    found, scores = SmoothingLoss(0.5, entropy=0.0, copies=1)(module, images, labels, 0.0)
    torch.manual_seed(0)
    noisy = images + 0.5 * torch.randn_like(images)
    assert torch.allclose(found, nn.functional.cross_entropy(module(noisy), labels))
    assert torch.allclose(scores, module(noisy).log_softmax(1))


def test_the_noise_has_the_deviation_that_is_asked_for():
    seen = []

    class Spy(nn.Module):
        def forward(self, images):
            seen.append(images)
            return images.flatten(1)[:, :2]

    SmoothingLoss(0.3)(Spy(), torch.zeros(500, 1, 4, 4), torch.zeros(500).long(), 0.0)
    assert float(seen[0].std()) == pytest.approx(0.3, rel=0.02) and seen[0].shape[0] == 1000
    first, second = seen[0].chunk(2)
    assert not torch.equal(first, second)


def test_training_for_smoothing_lowers_the_loss_and_is_right_under_noise():
    train, test = data.load("digits"), data.load("digits", "test")
    images, labels = test.to_float()[:100], test.labels[:100]
    shares = {}
    for sigma in (1e-6, 0.5):
        module = small(10)
        history = fit(
            module,
            train.images,
            train.labels,
            epochs=8,
            batch_size=32,
            loss=SmoothingLoss(sigma),
            optimizer=lambda parameters: adam(parameters, 5e-3),
        )
        assert history[-1].loss < 0.7 * history[0].loss and history[-1].accuracy > 0.6
        noise = torch.randn(20, *images.shape, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            answers = module((images + 0.5 * noise).flatten(0, 1)).argmax(1).view(20, -1)
        shares[sigma] = float((answers == labels).double().mean())
    assert shares[0.5] > shares[1e-6]


def test_a_training_for_smoothing_resumes_to_the_same_weights(tmp_path, monkeypatch):
    """R10."""
    digits = data.load("digits")
    given = (digits.images[:128], digits.labels[:128])
    options = {"epochs": 2, "batch_size": 32, "loss": SmoothingLoss(0.25)}

    class Stop(Exception):
        pass

    calls = []
    original = SmoothingLoss.__call__

    def stopped(self, *rest):
        calls.append(0)
        if len(calls) == 6:
            raise Stop
        return original(self, *rest)

    whole = small(10)
    fit(whole, *given, **options)
    monkeypatch.setattr("demur.training.loop.CHECKPOINT_SECONDS", -1.0)
    monkeypatch.setattr("demur.training.loop.CHECK_STEPS", 2)
    path = tmp_path / "checkpoint"
    with monkeypatch.context() as broken:
        broken.setattr(SmoothingLoss, "__call__", stopped)
        with pytest.raises(Stop):
            fit(small(10), *given, checkpoint=path, **options)
    assert path.exists()
    again = small(10)
    fit(again, *given, checkpoint=path, **options)
    for name, one in whole.state_dict().items():
        assert torch.equal(one, again.state_dict()[name]), name


def test_the_worst_scores_of_a_reject_column_are_the_bounds_of_each_eta():
    """An oracle: the same bounds one row at a time, for each image, class and eta."""
    digits = data.load("digits")
    images, labels = digits.to_float()[:8], digits.labels[:8]
    module = small(11, 1).eval()
    loss = CertifiedRejectLoss(0.03, warmup=0, ramp=0, kappa=0, regularizer=0, reject_weight=0.6)
    found, _ = loss(module, images, labels, 1.0)
    graph, _ = trace(module, images)
    propagation = Propagation(graph, module, Region.around(images, 0.03))
    propagation.forwards()
    worst = torch.zeros(2, 8, 10)
    for place, label in enumerate(labels.tolist()):
        for wrong in range(10):
            if wrong == label:
                continue
            bounds = []
            for eta in (0, 0.1, 0.5, 0.9):
                row = torch.zeros(8, 1, 11)
                row[:, 0, label] = 1 - eta
                row[:, 0, 10] = eta
                row[:, 0, wrong] -= 1
                bounds.append(propagation.lower_by_intervals(graph.output, row).lower[place, 0])
            worst[0, place, wrong] = -bounds[0]
            worst[1, place, wrong] = -max(bounds[1:])
    parts = [nn.functional.cross_entropy(one, labels) for one in worst]
    assert float(found) == pytest.approx(float(parts[0] + 0.6 * parts[1]), rel=1e-5)


def test_a_clean_image_counts_with_its_weight_and_its_class():
    digits = data.load("digits")
    images, labels = digits.to_float()[:16], digits.labels[:16]
    module = small(11).eval()
    given = {"warmup": 0, "ramp": 0, "kappa": 1, "regularizer": 0}
    found, scores = CertifiedRejectLoss(0.03, clean_weight=3.0, **given)(
        module, images, labels, 1.0
    )
    one, _ = CertifiedLoss(0.03, **given)(module, images, labels, 1.0)
    assert scores.shape == (16, 11) and float(found) == pytest.approx(3 * float(one), rel=1e-6)


def test_a_reject_column_is_used_and_what_it_proves_is_not_broken():
    train, test = data.load("digits"), data.load("digits", "test")
    images, labels = test.to_float()[:150], test.labels[:150]
    module = small(11)
    options = {"epochs": 10, "batch_size": 64, "ramp": 4, "learning_rate": 5e-3}
    certified_fit(module, train.images, train.labels, eps=0.2, reject=True, **options)
    model = Classifier(module, 10)
    threat = ThreatModel("linf", 0.05)
    result = PGD(steps=30)(model, images, labels, threat)
    found = certify(model, images, labels, threat, ("ibp",), result=result)
    proven = found.status == Status.CERTIFIED
    # A negative control: the same network without its reject column proves less.
    without = Classifier(nn.Sequential(module, Cut()), 10)
    less = certify(without, images, labels, threat, ("ibp",)).status == Status.CERTIFIED
    assert not bool((proven & result.success).any())
    assert bool((proven >= less).all()) and int(proven.sum()) > int(less.sum())


class Cut(nn.Module):
    """Leaves the last column out."""

    def forward(self, scores):
        return nn.functional.linear(scores, torch.eye(11)[:10])


def test_requests_that_do_not_fit_are_refused():
    for options in ({"sigma": 0.0}, {"sigma": 0.1, "weight": -1}, {"sigma": 0.1, "copies": 0}):
        with pytest.raises(DemurError):
            SmoothingLoss(**options)
    with pytest.raises(DemurError, match="must not be negative"):
        CertifiedRejectLoss(0.1, clean_weight=-1.0)
