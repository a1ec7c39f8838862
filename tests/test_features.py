"""Regularizers over inner features, starting points, and when a run ends. R18."""

import dataclasses

import pytest
import torch
from scipy.stats import gaussian_kde
from torch import nn

from demur import Classifier, DemurError, data
from demur.attacks import (
    DDN,
    FMN,
    PGD,
    Evade,
    Strongest,
    feature_density,
    feature_matching,
    sizes,
)
from demur.defenses import NeuralRejection
from demur.networks import FeatureExtractor
from demur.training import fit
from models import convolutional, images_of, linear

EXACT = {"precision": "float32"}


def plain(images):
    return [images.flatten(1)]


def test_the_density_is_that_of_scipy_up_to_a_constant():
    """In one dimension, where scipy's estimate takes a given width."""
    known = images_of(30, 1, 1, 1)
    where = images_of(20, 1, 1, 2)
    regularizer = feature_density(plain, known, weight=3.0)
    values = known.flatten().double().numpy()
    reference = gaussian_kde(values, bw_method=regularizer.width[0] / values.std(ddof=1))
    expected = torch.from_numpy(reference.logpdf(where.flatten().double().numpy()))
    differences = regularizer(where).double() / 3 - expected
    assert float(differences.std()) < 1e-4


def test_an_attack_with_a_density_ends_near_known_images():
    """R18: the goal is climbed as before, and the features stay nearer to those of clean images."""
    classifier = convolutional(5)
    extractor = FeatureExtractor(classifier.module, ["0"])
    regularizer = feature_density(extractor, images_of(64, seed=9), weight=200.0)
    images = images_of(24)
    labels = classifier.predict(images)
    attack = PGD(steps=40, keep_maximizing=True)
    free = attack(classifier, images, labels, "l2:2", **EXACT)
    near = attack(classifier, images, labels, "l2:2", regularizer=regularizer, **EXACT)
    dense = [float(regularizer(one.candidates).detach().mean()) for one in (free, near)]
    assert dense[1] > dense[0]
    assert torch.equal(near.backwards, 2 * free.backwards)


def test_feature_matching_leads_to_the_guide_of_each_image():
    """Without a stop the loss is margin and matching; a large weight gives the guide's features."""
    classifier = linear(3, 64, 3)
    images = images_of(5)
    guides = images_of(5, seed=7)
    labels = classifier.predict(images)
    regularizer = feature_matching(plain, guides, weight=1e4)
    attack = PGD(steps=300, step_size=0.1, keep_maximizing=True)
    together = attack(classifier, images, labels, "l2:8", regularizer=regularizer, **EXACT)
    before, after = (sizes(guides, sent)["l2"] for sent in (images, together.candidates))
    assert bool((after < 0.2 * before).all())
    alone = regularizer.select(torch.tensor([3]))
    one = attack(classifier, images[3:4], labels[3:4], "l2:8", regularizer=alone, **EXACT)
    torch.testing.assert_close(one.candidates[0], together.candidates[3], atol=1e-3, rtol=0)


def test_feature_matching_breaks_a_rejection():
    """R18: the guide is an image of another class that is accepted."""
    train = data.load("digits", "train")
    test = data.load("digits", "test")
    network = nn.Sequential(nn.Flatten(), nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 10))
    fit(network, train.images[:700], train.labels[:700], epochs=15, batch_size=64)
    rejecting = NeuralRejection(network, 10, "2", C=10.0, false_rejection_rate=0.1).fit(
        train.images[700:], train.labels[700:]
    )
    pool = test.to_float()
    images = pool[:20]
    labels = test.labels[:20]
    predictions = rejecting.predict(pool)
    right = predictions == test.labels
    guides = torch.stack([pool[right & (test.labels != label)][0] for label in labels])
    regularizer = feature_matching(FeatureExtractor(network, ["2"]), guides, weight=10.0)
    attack = PGD(steps=200, step_size=0.1, loss="cross_entropy")
    result = attack(rejecting, images, labels, "l2:6", regularizer=regularizer)
    assert float(result.success.double().mean()) > 0.9


@pytest.mark.parametrize("attack", [PGD(steps=2), Strongest(steps=2, n_queries=2)])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_another_number_of_guides_is_refused(attack, count):
    """One guide for all would be broadcast, and surplus guides would be those of other images."""
    classifier = linear(3, 64, 3)
    images = images_of(4)
    labels = classifier.predict(images)
    matching = feature_matching(plain, images_of(count, seed=1))
    with pytest.raises(DemurError, match=f"has {count} guide images for 4 images"):
        attack(classifier, images, labels, "linf:0.1", regularizer=matching)


def test_a_regularizer_is_for_attacks_with_an_eps():
    classifier = linear(3, 64, 3)
    images = images_of(4)
    labels = classifier.predict(images)
    regularizer = feature_density(plain, images)
    for attack in (DDN(), FMN(), Strongest()):
        with pytest.raises(DemurError, match=r"regularizer is for \w+ with an eps"):
            attack(classifier, images, labels, "l2", regularizer=regularizer)
    small = Strongest(steps=2, n_targets=1, n_queries=3)
    small(classifier, images, labels, "l2:1e-4", regularizer=regularizer)
    with pytest.raises(DemurError, match="at least two"):
        feature_density(plain, images[:1])
    with pytest.raises(DemurError, match="weight must be positive"):
        feature_matching(plain, images, weight=-1.0)
    with pytest.raises(DemurError, match="weight must be positive"):
        feature_density(plain, images, weight=0.0)


def test_a_regularizer_of_another_network_runs_in_evaluation_mode_and_takes_float64_images():
    """R3: dropout would draw, and batch statistics would move."""
    classifier = linear(3, 64, 3)
    other = convolutional(3)
    images = images_of(4)
    other.train()
    before = {name: value.clone() for name, value in other.state_dict().items()}
    regularizer = feature_density(FeatureExtractor(other.module, ["0"]), images)
    attack = PGD(steps=3, keep_maximizing=True)
    labels = classifier.predict(images)
    one, two = (
        attack(classifier, images.double(), labels, "linf:0.1", regularizer=regularizer).candidates
        for _ in range(2)
    )
    assert torch.equal(one, two)
    assert other.module.training
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in before.items())


class _Walled(nn.Module):
    """Class 1 is beyond a flat stretch. The clean image has no gradient; images of class 1 do."""

    def forward(self, images):
        mean = images.flatten(1).mean(1)
        return torch.stack([torch.zeros_like(mean), (mean - 0.6).clamp(min=0) * 10 - 1], 1)


def test_starting_points_for_each_run_are_double_initialisation():
    """R18: from the image alone the attack is blind; from an image of another class it is not."""
    classifier = Classifier(_Walled(), 2)
    images = torch.full((4, 1, 4, 4), 0.3)
    others = torch.full((4, 1, 4, 4), 0.9)
    labels = torch.zeros(4, dtype=torch.int64)
    once = PGD(steps=30)
    twice = dataclasses.replace(once, restarts=2)
    points = torch.stack([images, others])
    with pytest.warns(UserWarning, match="blind"):
        assert not once(classifier, images, labels, "l2:2").success.any()
    both = twice(classifier, images, labels, "l2:2", starting_points=points)
    assert both.success.all()
    first = once(classifier, images, labels, "l2:2", starting_points=others)
    assert first.success.all()
    with pytest.raises(DemurError, match="starting points for 2 runs, but restarts is 1"):
        once(classifier, images, labels, "l2:2", starting_points=points)
    with pytest.raises(DemurError, match="starting points have shape"):
        twice(classifier, images, labels, "l2:2", starting_points=points[:, :2])
    with pytest.raises(DemurError, match="lie in"):
        once(classifier, images, labels, "l2:2", starting_points=others + 1)


def test_a_run_ends_for_each_image_where_its_loss_stands_still():
    """Algorithm 1 of the rejection paper, read so that it does not end at the first small change:
    five small changes end the run, and each image ends for itself.
    """
    classifier = linear(3, 64, 3)
    images = images_of(6)
    labels = classifier.predict(images)
    attack = PGD(steps=200, step_size=0.1, keep_maximizing=True)  # only the rule ends it
    ruled = dataclasses.replace(attack, tolerance=1e-3)
    whole = attack(classifier, images, labels, "l2:1", **EXACT)
    short = ruled(classifier, images, labels, "l2:1", **EXACT)
    assert bool((whole.backwards == 200).all())
    assert bool((short.backwards < 150).all())
    assert bool((short.backwards > 10).all())
    margins = [
        Evade().margin(classifier.scores(result.candidates), labels, 3) for result in (whole, short)
    ]
    torch.testing.assert_close(*margins, atol=0.02, rtol=0.02)
    alone = ruled(classifier, images[2:3], labels[2:3], "l2:1", **EXACT)
    assert int(alone.backwards[0]) == int(short.backwards[2])
