"""Certified consistency: its check is a sound bound, its gradient is exact, its delta is found."""

import copy

import pytest
import torch
from torch import nn

import demur
from demur import REJECT, Classifier, DemurError, ThreatModel, attacks, data, load_model, networks
from demur.bounds import UnsupportedLayerError
from demur.certificates import Status, certify
from demur.commands.harden import harden
from demur.defenses import CertifiedConsistency, GaussianBlur
from demur.files import fingerprint
from demur.loading.export import export, parity_images
from demur.networks import certified_cnn
from demur.training import certified_fit


@pytest.fixture(scope="module")
def trained():
    """A small network on digits, in a few seconds; the images that it did not learn from."""
    train, test = data.load("digits"), data.load("digits", "test")
    network = nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(1, 8, 4, stride=2), nn.BatchNorm2d(8))
    network.extend([nn.ReLU(), nn.Flatten(), nn.Linear(288, 32), nn.BatchNorm1d(32), nn.ReLU()])
    network.append(nn.Linear(32, 10))
    options = {"eps": 0.05, "epochs": 12, "batch_size": 64, "ramp": 4, "learning_rate": 5e-3}
    certified_fit(network, train.images, train.labels, **options)
    return network, test.to_float(), test.labels


def made(network, delta=0.02, **options):
    return CertifiedConsistency(network, 10, delta, **options).eval()


@pytest.mark.parametrize("check", ["ibp", "crown-ibp"])
def test_accepted_answers_are_constant_within_delta(check, trained):
    network, images, labels = trained
    defense = made(network, 0.03, check=check)
    images, labels = images[:60], labels[:60]
    answers = defense.predict(images)
    accepted = answers != REJECT
    assert int(accepted.sum()) > 30
    inner = Classifier(network, 10)
    result = attacks.PGD(steps=20)(
        inner, images[accepted], answers[accepted], ThreatModel("linf", 0.03)
    )
    assert not bool(result.success.any())
    again = certify(inner, images, labels, "linf:0.03", check)
    proven = again.status == Status.CERTIFIED
    right = answers == labels
    assert bool((proven <= accepted).all())
    # The check is in float32 and counts its rounding; so it accepts what is proven in float64.
    assert int((proven ^ (accepted & right)).sum()) <= 1


def test_an_attack_as_a_check_accepts_more_and_proves_nothing(trained):
    network, images, _ = trained
    unproven = made(network, 0.03, check="pgd", steps=5)
    assert not unproven.proven and made(network).proven
    accepted = unproven.predict(images[:80]) != REJECT
    sound = made(network, 0.03).predict(images[:80]) != REJECT
    assert bool((sound <= accepted).all()) and int(accepted.sum()) > int(sound.sum())
    assert int(accepted.sum()) < int((made(network, 0.0).predict(images[:80]) != REJECT).sum())


@pytest.mark.parametrize("check", ["ibp", "crown-ibp"])
def test_gradients_are_those_of_finite_differences(check, trained):
    network, images, _ = trained
    defense = copy.deepcopy(made(network, 0.02, check=check)).double()
    given = images[:2].double().clamp(0.1, 0.9).requires_grad_(True)
    scores = defense(given)
    assert torch.equal(scores[:, :10], defense.network(given))
    (gradient,) = torch.autograd.grad(scores[:, -1].sum(), given)
    draw = torch.Generator().manual_seed(0)
    for _ in range(3):
        step = 1e-7 * torch.randn(given.shape, generator=draw, dtype=torch.float64)
        with torch.no_grad():
            change = (defense(given + step) - defense(given - step))[:, -1].sum() / 2
        assert float(change) == pytest.approx(float((gradient * step).sum()), rel=1e-3, abs=1e-11)


def test_gradients_in_bfloat16_leave_the_bounds_in_float32(trained):
    network, images, _ = trained
    defense = made(network)
    with torch.autocast("cpu", torch.bfloat16):
        _, margin = defense._consistent.room(images[:8], 0.02)
    _, expected = defense._consistent.room(images[:8], 0.02)
    assert margin.dtype == torch.float32
    assert torch.allclose(margin, expected, rtol=1e-4, atol=1e-3)


def test_attacks_see_the_rejection_and_rarely_a_zero_gradient(trained):
    """R6, R18."""
    network, images, labels = trained
    defense = made(network, 0.02)
    found = attacks.APGD(steps=20)(defense, images[:60], labels[:60], ThreatModel("linf", 0.3))
    assert int(found.success.sum()) > 20
    assert int(found.zero_gradients.sum()) < 0.05 * int(found.backwards.sum())


@pytest.mark.parametrize("rate", [0.0, 0.05, 0.3])
def test_the_largest_delta_of_a_false_rejection_rate_is_found(rate, trained):
    network, images, labels = trained
    defense = CertifiedConsistency(network, 10, false_rejection_rate=rate)
    with pytest.raises(DemurError, match="not fitted"):
        defense.predict(images[:1])
    assert defense.delta is None
    defense.fit(images, labels)
    answers = defense.predict(images)
    right = Classifier(network, 10).predict(images) == labels
    share = float((answers == REJECT)[right].double().mean())
    assert share == pytest.approx(defense.false_rejection_rate_) and share <= rate
    defense.set_threshold(defense.delta + 0.002)
    wider = float((defense.predict(images) == REJECT)[right].double().mean())
    assert wider > rate


def test_it_is_saved_loaded_copied_and_hashed_by_its_content(tmp_path):
    images, labels = data.load("digits", "test").to_float()[:40], torch.zeros(40).long()
    defense = CertifiedConsistency(certified_cnn(10), 10, false_rejection_rate=0.2)
    labels = Classifier(defense.network, 10).predict(images)
    defense.fit(images, labels)
    before = fingerprint(defense)
    scores = defense.scores(images)
    defense.save(tmp_path)
    again = load_model(tmp_path)
    assert type(again) is CertifiedConsistency and again.delta == defense.delta
    assert torch.equal(again.scores(images), scores)
    assert again.hyperparameters() == defense.hyperparameters()
    assert again.learned() == defense.learned()
    assert fingerprint(defense) == before
    other = copy.deepcopy(defense)
    with torch.no_grad():
        other.network[0].weight.zero_()
    assert torch.equal(defense.scores(images), scores)
    assert not torch.equal(other.scores(images), scores)
    given = made(certified_cnn(10), 0.125, check="pgd", steps=3)
    given.save(tmp_path / "given")
    loaded = load_model(tmp_path / "given")
    assert (loaded.delta, loaded.check, loaded.fitted_) == (0.125, "pgd", True)


@pytest.mark.parametrize("form", ["pt2", pytest.param("onnx", marks=pytest.mark.slow)])
def test_the_check_is_in_the_exported_graph(form, trained, tmp_path):
    network, images, _ = trained
    defense = GaussianBlur(made(network, 0.03), 10, 0.5)
    rejected = defense.predict(images) == REJECT
    assert 0 < int(rejected.sum()) < len(images)
    shown = torch.cat([parity_images((1, 28, 28), 40), images[:60]])
    parity = export(defense, tmp_path / f"m.{form}", form, (1, 28, 28), shown)
    assert parity.equal == parity.n == 100 and parity.close


def test_what_does_not_fit_is_refused(trained):
    network, images, labels = trained
    for options, said in (
        ({}, "one of the two"),
        ({"delta": 0.1, "false_rejection_rate": 0.1}, "one of the two"),
        ({"delta": 2.0}, "a change of pixels"),
        ({"delta": float("nan")}, "a change of pixels"),
        ({"false_rejection_rate": 1.0}, r"in \[0, 1\)"),
        ({"delta": 0.1, "check": "crwn-ibp"}, "Did you mean 'crown-ibp'"),
        ({"delta": 0.1, "steps": 0}, "at least 1"),
    ):
        with pytest.raises(DemurError, match=said):
            CertifiedConsistency(network, 10, **options)
    with pytest.raises(DemurError, match="rejects already"):
        CertifiedConsistency(made(network), 10, 0.1)
    with pytest.raises(DemurError, match="without a reject column"):
        made(nn.Sequential(nn.Flatten(), nn.Linear(784, 11))).predict(images[:1])
    with pytest.raises(UnsupportedLayerError, match=r"1: the operation gelu"):
        made(nn.Sequential(nn.Flatten(), nn.GELU(), nn.Linear(784, 10))).predict(images[:1])
    wrong = CertifiedConsistency(network, 10, false_rejection_rate=0.1)
    right = Classifier(network, 10).predict(images)
    with pytest.raises(DemurError, match="wrong on all"):
        wrong.fit(images, (right + 1) % 10)
    assert not wrong.fitted_ and bool((right >= 0).all()) and len(labels) == len(right)


@pytest.mark.parametrize("gap", [2e-5, 2e-4, 0.02, 0.6])
def test_small_radii_are_found_too(gap):
    """Two pixels, and each is a score: the answer is constant within half of their difference."""
    images = torch.tensor([[[[0.2, 0.2 + gap]]]])
    found = CertifiedConsistency(nn.Flatten(), 2, delta=0.1).radii(images)
    assert float(found) == pytest.approx(gap / 2, rel=0.05)
    assert float(found) == float(found.float())


def test_harden_warns_of_a_delta_that_rejects_no_attack():
    """A network without certified training has a tiny delta; the rate is reached all the same."""
    given = (images := data.load("digits").images[:300], torch.arange(len(images)) % 10)
    network = networks.dnr_cnn(10, seed=0)
    found = harden(network, given, ["certified-consistency"], false_rejection_rate=0.05)
    assert 0 < found.classifier.delta < 1 / 510 and found.after.rejected > 0
    assert any("less than half a step" in note for note in found.notes)


@pytest.mark.slow
def test_harden_adds_it_and_sets_delta(trained, tmp_path):
    network, _, _ = trained
    for rule in ({"false_rejection_rate": 0.1}, {"max_wrong": 0.2}):
        found = harden(network, data.load("digits"), ["certified-consistency"], **rule)
        assert isinstance(found.classifier, CertifiedConsistency)
        assert found.classifier.rejects and found.classifier.delta > 0
    assert "delta" in str(found) or "held-out" in str(found)
    both = demur.harden(
        network,
        data.load("digits"),
        ["gaussian-blur", "certified-consistency"],
        settings={"epochs": 0, "sigma": 0.5},
    )
    assert both.classifier.delta is not None
