"""Certified consistency by randomized smoothing: radii, seeds by content, certificates."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from demur import REJECT, Classifier, DemurError, ThreatModel, load_model
from demur.attacks import PGD
from demur.certificates import Status, certified_radius, certify
from demur.defenses import CertifiedConsistency
from demur.defenses.smoothing_check import normal_quantile
from demur.goals import AnyError
from demur.networks import certified_cnn
from demur.studies.certified_rejection.smoothing import OnExpectation
from demur.training import GaussianNoise, fit
from models import Linear, images_of

PIXELS = 16


def linear(seed=0):
    """Two classes, split by a plane: the smoothed classifier's radius is the distance to it."""
    draw = torch.Generator().manual_seed(seed)
    normal = torch.randn(PIXELS, generator=draw)
    normal = normal / normal.norm()
    weights = torch.stack([normal, -normal])
    return Linear(weights, torch.tensor([-0.5, 0.5]) * normal.sum()), normal


def smoothed(network, delta=0.05, **options):
    options = {"sigma": 0.2, "draws": 400, "alpha": 0.001, **options}
    return CertifiedConsistency(network, 2, delta, "smoothing", **options).eval()


def test_radii_are_below_the_distance_to_a_plane_and_near_it():
    network, normal = linear()
    images = images_of(60, size=4)
    distance = ((images.flatten(1) - 0.5) @ normal).abs().double()
    answers, radii, _ = smoothed(network, draws=4000)._consistent.smoothed(images, "certify")
    assert bool((radii <= distance).all())  # alpha is .001 for each of 60 images
    near = (distance > 0.05) & (distance < 0.4)
    assert float((distance - radii)[near].max()) < 0.06
    right = Classifier(network, 2).predict(images)
    assert bool((answers == right)[radii > 0].all())


def test_the_noise_follows_from_the_content_alone():
    """R10: other batches, other orders, the same answers."""
    network, _ = linear()
    defense = smoothed(network)
    images = images_of(20, size=4)
    whole = defense.scores(images)
    assert torch.equal(defense.scores(images.flip(0), batch_size=3).flip(0), whole)
    assert not torch.equal(smoothed(network, seed=1).scores(images), whole)
    proofs = defense._consistent.smoothed(images, "certify")[1]
    assert not torch.equal(proofs, defense._consistent.smoothed(images, "predict")[1])


def test_an_image_is_accepted_if_its_radius_is_above_delta():
    network, _ = linear()
    images = images_of(40, size=4)
    defense = smoothed(network, 0.1)
    radii = defense.radii(images)
    accepted = defense.predict(images) != REJECT
    assert torch.equal(accepted, radii >= 0.1) and 0 < int(accepted.sum()) < 40
    found = CertifiedConsistency(
        network, 2, check="smoothing", false_rejection_rate=0.25, draws=400
    )
    labels = Classifier(network, 2).predict(images)
    found.fit(images, labels)
    assert float((found.predict(images) == REJECT).double().mean()) <= 0.25
    assert found.delta == pytest.approx(found.threshold) and found.delta > 0


def test_a_certificate_adds_delta_and_says_how_sure_it_is():
    network, normal = linear()
    images = images_of(40, size=4)
    labels = Classifier(network, 2).predict(images)
    distance = ((images.flatten(1) - 0.5) @ normal).abs().double()
    defense = smoothed(network, 0.1)
    threat = ThreatModel("l2", 0.2)
    result = PGD(steps=10)(defense, images, labels, threat)
    found = certify(defense, images, labels, threat, result=result)
    proven = found.status == Status.CERTIFIED
    assert 0 < int(proven.sum()) < 40 and bool((distance[proven] > 0.1).all())
    assert found.probability[proven].tolist() == [0.999] * int(proven.sum())
    assert set(found.by) == {"smoothing", ""} and found.contradictions <= 1
    small = certify(defense, images, labels, ThreatModel("linf", 0.2 / math.sqrt(PIXELS)))
    assert torch.equal(small.status == 0, (certify(defense, images, labels, threat)).status == 0)
    nothing = certify(defense, images, labels, ThreatModel("l2", 0.01, goal=AnyError()))
    assert Status.CERTIFIED not in nothing.status.tolist()
    wrong = certify(defense, images, 1 - labels, threat)
    assert Status.CERTIFIED not in wrong.status.tolist()
    with pytest.raises(DemurError, match="bounds its radii itself"):
        certified_radius(defense, images, labels, "l2")


def test_attacks_get_a_gradient_and_break_what_is_far_outside():
    network, _ = linear()
    images = images_of(12, size=4)
    labels = Classifier(network, 2).predict(images)
    result = PGD(steps=10)(smoothed(network, 0.05), images, labels, ThreatModel("l2", 2.0))
    assert int(result.success.sum()) > 6
    assert int(result.zero_gradients.sum()) < 0.2 * int(result.backwards.sum())


def test_a_surrogate_has_the_expectation_of_common_or_own_noise():
    network, normal = linear()
    defense = smoothed(network, 0.1)
    images = images_of(6, size=4)
    common, own = defense.surrogate(64), defense.surrogate(64, common=False)
    with torch.no_grad():
        both = common.module(images), own.module(images)
    assert all(one.shape == (6, 3) and bool((one[:, 2] == 0.1).all()) for one in both)
    # Its score is near sigma times the normalised distance where the softmax is nearly a step.
    sharp = nn.Sequential(network, nn.Linear(2, 2, bias=False))
    with torch.no_grad():
        sharp[1].weight.copy_(1000 * torch.eye(2))
    score = smoothed(sharp).surrogate(20000).module(images).detach()[:, :2].amax(1)
    distance = ((images.flatten(1) - 0.5) @ normal).abs()
    near = distance < 0.4
    assert float((score - distance)[near].abs().max()) < 0.02
    # Common noise is the same for each image: a copy in another batch has the same scores.
    assert torch.allclose(common.module(images[2:3]), both[0][2:3], atol=1e-6)
    moved = images + 1e-4
    assert float((common.module(moved) - both[0]).abs().max()) < 0.01
    with pytest.raises(DemurError, match="only the check smoothing has a surrogate"):
        CertifiedConsistency(network, 2, 0.1).surrogate()


def test_it_is_saved_with_its_noise(tmp_path):
    network = certified_cnn(2, size=4)
    defense = CertifiedConsistency(network, 2, 0.3, "smoothing", sigma=0.5, draws=50, seed=3)
    images = images_of(5, size=4)
    defense.save(tmp_path)
    again = load_model(tmp_path)
    assert torch.equal(again.scores(images), defense.scores(images))
    assert again.hyperparameters()["sigma"] == 0.5 and again.delta == 0.3


def test_requests_that_do_not_fit_are_refused():
    network, _ = linear()
    for options in ({"sigma": 0.0}, {"alpha": 1.0}, {"draws": 0}, {"delta": -1.0}):
        with pytest.raises(DemurError):
            smoothed(network, **options)
    with pytest.raises(DemurError, match="a length of at least 0"):
        smoothed(network).set_threshold(math.inf)
    assert smoothed(network, 5.0).delta == 5.0


def test_noise_at_training_is_the_same_when_it_resumes():
    images = torch.zeros(4, 1, 2, 2)
    noise = GaussianNoise(0.5)
    once, _ = noise(nn.Identity(), images, torch.zeros(4), 3)
    assert torch.equal(noise(nn.Identity(), images, torch.zeros(4), 3)[0], once)
    assert not torch.equal(noise(nn.Identity(), images, torch.zeros(4), 4)[0], once)
    module = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    fit(module, images, torch.tensor([0, 1, 0, 1]), epochs=1, batch_size=2, transform=noise)


def test_the_quantile_has_scipys_values_and_an_exact_gradient_far_in_the_tail():
    logs = torch.tensor([-0.6931, -1.0, -5.0, -20.0, -700.0, -1e4], dtype=torch.float64)
    logs.requires_grad_()
    found = normal_quantile(logs)
    assert torch.allclose(torch.special.log_ndtr(found), logs, rtol=1e-9)
    near = found[:4].detach()
    assert near.numpy() == pytest.approx(stats.norm.ppf(logs[:4].detach().exp().numpy()), abs=1e-6)
    found.sum().backward()
    slope = (stats.norm.logpdf(found.detach()) - stats.norm.logcdf(found.detach())).clip(-700)
    assert logs.grad.numpy() == pytest.approx(np.exp(-slope), rel=1e-6)


@pytest.mark.parametrize("common", [False, True])
def test_a_sure_network_does_not_blind_the_attack(common):
    """R14: where the softmax is 0 and 1 in float32, the expectation has gradients all the same."""
    network, _ = linear()
    sharp = nn.Sequential(network, nn.Linear(2, 2, bias=False)).eval()
    with torch.no_grad():
        sharp[1].weight.copy_(300 * torch.eye(2))
    images = images_of(8, size=4)
    labels = Classifier(sharp, 2).predict(images)
    defense = smoothed(sharp, 0.05)
    attack = OnExpectation(PGD(steps=20, keep_maximizing=True), draws=16, common=common)
    found = attack(defense, images, labels, ThreatModel("l2", 2.0))
    assert int(found.zero_gradients.sum()) == 0 < int(found.backwards.sum())
    assert int(found.success.sum()) >= 7
