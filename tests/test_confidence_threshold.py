"""Rejection by confidence against plain definitions in float64; calibration; attacks. R6, R17."""

import math

import numpy as np
import pytest
import scipy.special
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from demur import REJECT, Classifier, DemurError, Outcome, ThreatModel, data, load_model, outcomes
from demur.attacks import Evade, ForceReject, Strongest
from demur.defenses import ConfidenceThreshold
from demur.training import fit
from models import images_of

SCORES = ["max-prob", "margin", "energy"]


class Logits(nn.Module):
    """Scores are the pixels, stretched: images in [0, 1] give logits in [-reach, reach]."""

    def __init__(self, reach):
        super().__init__()
        self.reach = reach

    def forward(self, images):
        return (2 * images.flatten(1) - 1) * self.reach


def plain(score, logits):
    """The confidence by its definition, in float64."""
    logits = np.asarray(logits, dtype=np.float64)
    if score == "max-prob":
        return scipy.special.softmax(logits, axis=1).max(1)
    if score == "energy":
        return scipy.special.logsumexp(logits, axis=1)
    ordered = np.sort(logits, axis=1)
    return ordered[:, -1] - ordered[:, -2]


def drawn(classes, seed, count=64):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand((count, classes), generator=generator)


def small(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = nn.AvgPool2d(2), nn.Flatten(), nn.Linear(196, 64), nn.ReLU(), nn.Linear(64, 10)
        return nn.Sequential(*layers)


@pytest.fixture(scope="module")
def digits():
    """A network trained on one half of the training digits; the other half is held out."""
    train, test = data.load("digits", "train"), data.load("digits", "test")
    half = len(train) // 2
    network = small()
    fit(network, train.images[:half], train.labels[:half], epochs=20, batch_size=32)
    return network, train.subset(range(half, len(train))), test


@given(
    st.sampled_from(SCORES),
    st.integers(2, 12),
    st.integers(0, 999),
    st.sampled_from([1.0, 5.0, 30.0, 300.0]),
    st.floats(0.001, 0.999),
)
def test_the_decision_is_that_of_the_plain_definition_and_class_scores_do_not_change(
    score, classes, seed, reach, place
):
    images = drawn(classes, seed)
    network = Logits(reach)
    logits = network(images)
    confidence = plain(score, logits)
    threshold = float(np.quantile(confidence, place))
    if score == "max-prob":
        threshold = min(threshold, 1 - 1e-6)
    defense = ConfidenceThreshold(network, classes, score=score, threshold=threshold)
    scores = defense.scores(images)
    assert torch.equal(scores[:, :classes], logits) and scores.shape == (64, classes + 1)
    expected = np.where(confidence < threshold, REJECT, logits.argmax(1).numpy())
    clear = np.abs(confidence - threshold) > 1e-12 * max(1, abs(threshold))
    assert (defense.predict(images).numpy() == expected)[clear].all()
    assert clear.sum() >= 60 or score == "max-prob"


@given(
    st.sampled_from(SCORES),
    st.integers(0, 999),
    st.floats(0.01, 0.99),
    st.floats(0.01, 0.99),
)
def test_a_larger_threshold_rejects_the_same_images_and_more(score, seed, one, other):
    images = drawn(5, seed)
    defense = ConfidenceThreshold(Logits(4.0), 5, score=score, threshold=min(one, other))
    few = defense.predict(images) == REJECT
    defense.set_threshold(max(one, other))
    many = defense.predict(images) == REJECT
    assert bool((many | ~few).all())


@given(st.sampled_from(SCORES), st.integers(0, 999), st.floats(0, 0.9), st.booleans())
def test_fit_rejects_at_most_the_asked_share_and_no_less_without_ties(score, seed, rate, ties):
    """R17: the image at the threshold is accepted, and so is each image that equals it."""
    images = drawn(4, seed, count=50)[:, None, None, :]
    if ties:
        images = (3 * images).round() / 3
    defense = ConfidenceThreshold(Logits(6.0), 4, score=score)
    defense.fit(images, torch.zeros(50, dtype=torch.int64), false_rejection_rate=rate)
    rejected = int((defense.predict(images) == REJECT).sum())
    assert rejected <= rate * 50 + 1e-9
    assert rejected == round(50 * defense.false_rejection_rate_)
    if not ties:
        assert rejected == int(rate * 50 + 1e-9)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("reach", [1.0, 1e3, 1e6])
def test_gradients_are_finite_and_not_zero_where_the_softmax_saturates(score, reach):
    """R6: the softmax itself is 1 there, with a zero gradient (negative control)."""
    images = drawn(6, 3).requires_grad_()
    network = Logits(reach)
    defense = ConfidenceThreshold(network, 6, score=score, threshold=0.5)
    scores = defense(images)
    (scores[:, -1] - scores[:, :-1].amax(1)).sum().backward()
    assert bool(images.grad.isfinite().all())
    assert bool((images.grad.flatten(1) != 0).any(1).all())
    if reach == 1e6:
        again = images.detach().requires_grad_()
        network(again).softmax(1).amax(1).sum().backward()
        assert not again.grad.any()


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("classes", [2, 5])
def test_a_rejected_image_shows_an_attacker_the_way_to_a_wrong_class(score, classes):
    """R14: the true class is still the best one. A flat loss there would mask the gradient."""
    images = torch.tensor([[0.6, 0.55, 0.2, 0.2, 0.2][:classes]], requires_grad=True)
    defense = ConfidenceThreshold(Logits(3.0), classes, score=score, threshold=0.999)
    if score == "energy":
        defense.set_threshold(50.0)
    scores = defense(images)
    assert scores.argmax(1) == classes
    Evade().loss(scores, torch.tensor([0]), classes).sum().backward()
    assert images.grad[0, 1] > 0.1 and images.grad[0, 0] < -0.1


def test_gradients_agree_with_finite_differences():
    images = drawn(5, 1, count=4).double().requires_grad_()
    for score in SCORES:
        defense = ConfidenceThreshold(Logits(3.0), 5, score=score, threshold=0.5)
        assert torch.autograd.gradcheck(defense, images)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_large_score_does_not_swallow_a_small_rejection(dtype):
    """8192 + 1e-6 is 8192 in float32: the decision must be a rejection nevertheless."""

    class Fixed(nn.Module):
        def forward(self, images):
            return torch.tensor([[8192, 8128, 0.0]], dtype=dtype).expand(len(images), 3)

    images = torch.rand(2, 1, 2, 2)
    for threshold, rejected in ((64 + 1e-6, True), (64.0, False), (64 - 1e-6, False)):
        defense = ConfidenceThreshold(Fixed(), 3, score="margin", threshold=threshold)
        assert bool((defense.predict(images) == REJECT).all()) == rejected


def test_a_saturated_network_is_calibrated():
    """All probabilities are 1 in float64; the order of the images by confidence is not lost."""
    images = drawn(3, 5, count=200)[:, None, None, :]
    defense = ConfidenceThreshold(Logits(1e6), 3)
    defense.fit(images, torch.zeros(200, dtype=torch.int64), false_rejection_rate=0.1)
    rejected = defense.predict(images) == REJECT
    margins = plain("margin", Logits(1e6)(images))
    assert int(rejected.sum()) == 20
    assert margins[rejected.numpy()].max() < margins[~rejected.numpy()].min()


@pytest.mark.parametrize("score", SCORES)
def test_batches_set_the_same_threshold_as_all_images_at_once(digits, score):
    network, held_out, _ = digits
    images, labels = held_out.images, held_out.labels
    whole = ConfidenceThreshold(network, 10, score=score).fit(images, labels, 0.05)
    parts = ConfidenceThreshold(network, 10, score=score)
    assert parts.fit(images, labels, 0.05, batch_size=64).threshold == pytest.approx(
        whole.threshold, rel=1e-5
    )
    loader = DataLoader(TensorDataset(images, labels), batch_size=100)
    streamed = ConfidenceThreshold(network, 10, score=score).fit(loader, false_rejection_rate=0.05)
    assert streamed.threshold == pytest.approx(whole.threshold, rel=1e-5)
    assert streamed.false_rejection_rate_ == pytest.approx(0.05, abs=1 / len(images))


def test_images_are_read_one_batch_at_a_time():
    alive = []

    def batches():
        for seed in range(5):
            images = images_of(8, size=2, seed=seed)
            alive.append(len(images))
            yield images, torch.zeros(8, dtype=torch.int64)

    defense = ConfidenceThreshold(nn.Flatten(), 4, score="margin").fit(batches())
    assert alive == [8] * 5 and defense.fitted_


@pytest.mark.parametrize("score", SCORES)
def test_rejection_catches_errors_and_noise_on_digits(digits, score):
    network, held_out, test = digits
    defense = ConfidenceThreshold(network, 10, score=score)
    defense.fit(held_out.images, held_out.labels, false_rejection_rate=0.05)
    found = outcomes(defense, test.to_float(), test.labels)
    bare = outcomes(Classifier(network, 10), test.to_float(), test.labels)
    rejected = found == Outcome.REJECTED
    assert rejected.float().mean() < 0.15
    assert torch.equal(found[~rejected], bare[~rejected])
    wrong = bare == Outcome.WRONG
    if int(wrong.sum()):
        assert rejected[wrong].float().mean() > 2 * rejected.float().mean()


@pytest.mark.parametrize("score", SCORES)
def test_the_strongest_attack_evades_it_and_forces_rejections(digits, score):
    """R14: the attack knows the threshold, so that what it finds is accepted."""
    network, held_out, test = digits
    defense = ConfidenceThreshold(network, 10, score=score)
    defense.fit(held_out.images, held_out.labels, false_rejection_rate=0.05)
    images, labels = test.to_float()[:8], test.labels[:8]
    correct = outcomes(defense, images, labels) == Outcome.CORRECT
    images, labels = images[correct], labels[correct]
    attack = Strongest(steps=15, n_queries=50, n_targets=1)
    for goal, wanted in ((Evade(), Outcome.WRONG), (ForceReject(), Outcome.REJECTED)):
        result = attack(defense, images, labels, ThreatModel("linf", 0.3, goal=goal))
        assert result.success.float().mean() > 0.9
        found = outcomes(defense, result.images[result.success], labels[result.success])
        assert bool((found == wanted).all())
        none = attack(defense, images, labels, ThreatModel("linf", 0.0, goal=goal))
        assert not none.success.any()


@pytest.mark.parametrize("score", SCORES)
def test_it_is_saved_and_loaded_with_its_threshold(digits, score, tmp_path):
    network, held_out, test = digits
    images = test.to_float()[:50]
    defense = ConfidenceThreshold(network, 10, score=score)
    defense.fit(held_out.images, held_out.labels, false_rejection_rate=0.2)
    defense.save(tmp_path)
    again = load_model(tmp_path, small(1))
    assert torch.equal(again.scores(images), defense.scores(images))
    assert again.threshold == defense.threshold and again.score == score
    assert again.false_rejection_rate_ == defense.false_rejection_rate_
    assert again.hyperparameters() == defense.hyperparameters()
    again.set_threshold(0.75)
    again.save(tmp_path)
    assert load_model(tmp_path, small(1)).threshold == pytest.approx(0.75, rel=1e-15)


def test_the_threshold_does_not_move_with_the_precision_of_the_network(digits):
    network = digits[0]
    defense = ConfidenceThreshold(network, 10, threshold=0.9)
    before = defense.threshold
    assert before == pytest.approx(0.9, rel=1e-15)
    defense.to(torch.float64).to(torch.float32)
    assert defense.threshold == before
    assert ConfidenceThreshold(network, 10, score="margin", threshold=-2.5).threshold == -2.5


def test_probabilities_are_those_of_the_network(digits):
    network, _, test = digits
    images = test.to_float()[:9]
    defense = ConfidenceThreshold(network, 10, threshold=0.9)
    assert torch.equal(defense.predict_proba(images), Classifier(network, 10).predict_proba(images))


def test_a_refit_that_fails_keeps_the_threshold():
    images, labels = images_of(8, size=2), torch.zeros(8, dtype=torch.int64)
    defense = ConfidenceThreshold(nn.Flatten(), 4, score="energy").fit(images, labels)
    before = defense.threshold
    with pytest.raises(DemurError, match="labels must lie"):
        defense.fit(images, labels + 4)
    assert defense.threshold == before and defense.fitted_
    fresh = ConfidenceThreshold(nn.Flatten(), 4)
    with pytest.raises(DemurError, match="labels must lie"):
        fresh.fit(images, labels + 4)
    with pytest.raises(DemurError, match=r"not fitted.*or give a threshold"):
        fresh.predict(images)


def test_bad_requests_are_one_line(tmp_path):
    images, labels = images_of(6, size=2), torch.zeros(6, dtype=torch.int64)
    defense = ConfidenceThreshold(nn.Flatten(), 4)

    def refused(said, call):
        with pytest.raises(DemurError, match=said) as caught:
            call()
        assert "\n" not in str(caught.value)

    refused("unknown score", lambda: ConfidenceThreshold(nn.Flatten(), 4, score="max_prob"))
    for value in (0, 1, -0.5, math.nan):
        refused(
            "above 0 and below 1", lambda: ConfidenceThreshold(nn.Flatten(), 4, threshold=value)
        )
    refused(
        "finite", lambda: ConfidenceThreshold(nn.Flatten(), 4, score="energy", threshold=math.inf)
    )
    refused(r"in \[0, 1\)", lambda: defense.fit(images, labels, false_rejection_rate=1.0))
    refused("no images", lambda: defense.fit(images[:0], labels[:0]))
    refused("no images", lambda: defense.fit([]))
    refused("give the labels", lambda: defense.fit(images))
    refused("belong to the batches", lambda: defense.fit([(images, labels)], labels))
    refused("pair of images and labels", lambda: defense.fit([images]))
    refused("batch_size", lambda: defense.fit(images, labels, batch_size=0))
    refused(
        "without a reject column", lambda: ConfidenceThreshold(nn.Flatten(), 3).fit(images, labels)
    )
    rejecting = Classifier(nn.Flatten(), 3, rejects=True)
    refused("rejects already", lambda: ConfidenceThreshold(rejecting, 3))
    refused("not fitted", lambda: defense.threshold)
    refused("not fitted", lambda: defense.set_threshold(0.5))
    refused("not fitted", lambda: defense.save(tmp_path))

    class Pair(nn.Module):
        def forward(self, images):
            return images.flatten(1), None

    refused("returned tuple", lambda: ConfidenceThreshold(Pair(), 4, threshold=0.5).predict(images))
    broken = Logits(math.nan)
    refused("NaN", lambda: ConfidenceThreshold(broken, 4, score="margin").fit(images, labels))
