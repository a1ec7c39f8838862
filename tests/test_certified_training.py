"""Certified training: the loss is a bound, the ramp, and resuming."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from demur import Classifier, DemurError, data
from demur.attacks import PGD
from demur.bounds import Propagation, Region, trace
from demur.certificates import Status, certify
from demur.networks import certified_cnn, certified_cnn7
from demur.threat import ThreatModel
from demur.training import CertifiedLoss, certified_fit, fit
from demur.training.certified_loss import regularisers


def network(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = [nn.AvgPool2d(2), nn.Conv2d(1, 6, 4, stride=2), nn.BatchNorm2d(6), nn.ReLU()]
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(216, 10))


def some(count=256):
    found = data.load("digits")
    return found.images[:count], found.labels[:count]


def test_training_makes_images_provable():
    train, test = data.load("digits"), data.load("digits", "test")
    made = {}
    for eps in (0.001, 0.06):
        made[eps] = network()
        options = {"epochs": 6, "batch_size": 64, "ramp": 2, "learning_rate": 5e-3}
        history = certified_fit(made[eps], train.images, train.labels, eps=eps, **options)
        assert len(history) == 6 and history[-1].accuracy > 0.8
        assert not made[eps].training
    shares = {
        eps: int(
            (
                certify(
                    Classifier(one, 10),
                    test.to_float()[:100],
                    test.labels[:100],
                    "linf:0.04",
                    "ibp",
                ).status
                == Status.CERTIFIED
            ).sum()
        )
        for eps, one in made.items()
    }
    assert shares[0.06] > shares[0.001] + 5


@pytest.mark.parametrize("method", ["ibp", "crown-ibp"])
def test_the_loss_is_above_that_of_any_attack(method):
    images, labels = some(64)
    images = images / 255
    module = network(1)
    loss = CertifiedLoss(eps=0.02, warmup=0, ramp=1, kappa=0, regularizer=0, method=method)
    state = {name: one.clone() for name, one in module.state_dict().items()}
    for epoch in (1.0, 0.5):  # the whole eps by intervals, and a part by the mixture
        module.train()
        found, scores = loss(module, images, labels, epoch)
        module.load_state_dict(state)
        module.train()
        assert torch.equal(scores, module(images))
        module.load_state_dict(state)
        share = loss.progress(epoch)
        module.eval()
        attacked = PGD(steps=10, loss="cross_entropy").maximize(
            Classifier(module, 10), images, labels, ThreatModel("linf", 0.02 * share)
        )
        module.load_state_dict(state)
        module.train()
        module(images)  # statistics of the clean images
        with torch.no_grad():
            one = nn.functional.cross_entropy(_with_statistics(module, images, attacked), labels)
        kappa = 1 - share
        clean = nn.functional.cross_entropy(scores, labels)
        assert float(found) >= float(kappa * clean + (1 - kappa) * one) - 1e-5


def _with_statistics(module, clean, images):
    """Scores of images, with batch norms of the statistics of others."""
    values, others = images, clean
    for layer in module:
        if isinstance(layer, nn.BatchNorm2d):
            variance, mean = torch.var_mean(others, (0, 2, 3), correction=0)
            parts = (mean, variance, layer.weight, layer.bias, False, 0.0, layer.eps)
            values = nn.functional.batch_norm(values, *parts)
            others = nn.functional.batch_norm(others, *parts)
        else:
            values, others = layer(values), layer(others)
    return values


def test_the_ramp_starts_after_the_warm_up_and_is_smooth():
    loss = CertifiedLoss(eps=0.3, warmup=1, ramp=7)
    values = [loss.progress(0.01 * step) for step in range(1000)]
    assert values[:100] == [0.0] * 100 and values[-1] == 1.0
    steps = [after - before for before, after in pairwise(values)]
    assert min(steps) >= 0 and max(steps) < 0.0025
    assert CertifiedLoss(eps=0.3, warmup=0, ramp=0).progress(0.1) == 1.0


def test_regularisers_are_zero_for_tight_and_balanced_layers():
    module = nn.Sequential(nn.Flatten(), nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    with torch.no_grad():
        module[1].weight.copy_(torch.tensor([[1.0, 0.0], [0.0, -1.0]]))
        module[1].bias.zero_()
    images = torch.full((1, 1, 1, 2), 0.5)

    def value():
        graph, _ = trace(module, images)
        propagation = Propagation(graph, module, Region.around(images, 0.1))
        propagation.forwards()
        return float(regularisers(propagation))

    assert value() == pytest.approx(0, abs=1e-6)
    with torch.no_grad():
        module[1].weight.copy_(torch.tensor([[4.0, 0.0], [0.0, -4.0]]))
    assert value() == pytest.approx((0.5 - 0.25) / 0.5, rel=1e-4)  # four times as wide
    with torch.no_grad():
        module[1].weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    assert value() == pytest.approx(1)  # all active, with equal spread


def test_a_training_resumes_to_the_same_weights(tmp_path, monkeypatch):
    images, labels = some()
    options = {"eps": 0.05, "epochs": 3, "batch_size": 64, "ramp": 1}
    whole = network()
    certified_fit(whole, images, labels, **options)

    class Stop(Exception):
        pass

    original = CertifiedLoss.__call__
    calls = []

    def stopped(self, module, given, true, epoch):
        calls.append(epoch)
        if len(calls) == 7:
            raise Stop
        return original(self, module, given, true, epoch)

    monkeypatch.setattr("demur.training.loop.CHECKPOINT_SECONDS", -1.0)
    monkeypatch.setattr("demur.training.loop.CHECK_STEPS", 2)
    path = tmp_path / "checkpoint"
    part = network()
    with monkeypatch.context() as broken:
        broken.setattr(CertifiedLoss, "__call__", stopped)
        with pytest.raises(Stop):
            certified_fit(part, images, labels, checkpoint=path, **options)
    assert path.exists()
    again = network()
    seen = []

    def counted(self, module, given, true, epoch):
        seen.append(epoch)
        return original(self, module, given, true, epoch)

    monkeypatch.setattr(CertifiedLoss, "__call__", counted)
    certified_fit(again, images, labels, checkpoint=path, **options)
    assert len(seen) == 6
    for name, one in whole.state_dict().items():
        assert torch.equal(one, again.state_dict()[name]), name


def test_a_loss_of_ones_own_takes_the_place_of_cross_entropy():
    images, labels = some(64)

    def loss(module, given, true, epoch):
        scores = module(given)
        return (scores - nn.functional.one_hot(true, 10)).square().mean(), scores

    module = network()
    first, last = fit(
        module, images, labels, epochs=2, batch_size=16, loss=loss, max_gradient_norm=1.0
    )
    assert last.loss < first.loss < 2


def test_requests_that_do_not_fit_are_refused():
    for options in ({"eps": 0.0}, {"eps": 2.0}, {"eps": 0.1, "kappa": 2}, {"eps": 0.1, "ramp": -1}):
        with pytest.raises(DemurError):
            CertifiedLoss(**options)
    with pytest.raises(DemurError, match="unknown method"):
        CertifiedLoss(eps=0.1, method="crown")
    with pytest.raises(DemurError, match="dropout in training mode"):
        module = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(784, 10))
        certified_fit(module, *some(64), eps=0.1, epochs=1, batch_size=32)
    for build in (certified_cnn, certified_cnn7):
        with pytest.raises(DemurError, match="certified training needs"):
            build(10, size=7)


@pytest.mark.parametrize("method", ["ibp", "crown-ibp"])
def test_bfloat16_computes_nearly_the_same_loss_and_gradients(method):
    images, labels = some(64)
    images = images / 255
    found = {}
    for precision in ("float32", "bfloat16"):
        module = network(2).train()
        loss = CertifiedLoss(0.05, 0, 1, regularizer=0.5, method=method, precision=precision)
        value, scores = loss(module, images, labels, 0.6)
        value.backward()
        assert value.dtype == scores.dtype == torch.float32
        gradient = torch.cat([one.grad.flatten() for one in module.parameters()])
        assert gradient.dtype == torch.float32
        found[precision] = (value.detach(), gradient)
    (one, first), (other, second) = found.values()
    assert not torch.equal(one, other)  # the products are in another precision
    torch.testing.assert_close(one, other, rtol=0.02, atol=0)
    assert float(torch.cosine_similarity(first, second, dim=0)) > 0.99


def test_an_unknown_precision_is_named():
    with pytest.raises(DemurError, match="precision"):
        CertifiedLoss(0.1, precision="float16")
    with pytest.raises(DemurError, match="precision"):
        certified_fit(network(), *some(64), eps=0.1, epochs=1, precision="float16")
