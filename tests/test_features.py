"""What an attacker wants of inner features, where attacks start, and when they stop. R18."""

from functools import partial

import pytest
import torch
from scipy.stats import gaussian_kde
from torch import nn

from demur import Classifier, DemurError, data
from demur.attacks import Evade, ddn, density, fmn, likeness, pgd, sizes, strongest
from demur.defenses import NeuralRejection
from demur.defenses.neural_rejection import Taps
from demur.networks import fit
from models import convolutional, images_of, linear


def plain(images):
    return [images.flatten(1)]


def test_the_density_is_scipys_but_for_a_constant():
    """In one dimension, where scipy's estimate takes the width that it is given."""
    known, where = images_of(30, 1, 1, 1), images_of(20, 1, 1, 2)
    bonus = density(plain, known, weight=3.0)
    values = known.flatten().double().numpy()
    reference = gaussian_kde(values, bw_method=bonus.width[0] / values.std(ddof=1))
    differences = bonus(where).double() / 3 - torch.from_numpy(reference.logpdf(where.flatten().double().numpy()))
    assert float(differences.std()) < 1e-4


def test_an_attacker_who_wants_density_ends_where_known_images_are():
    """R18: the goal is reached as before, and the features stay nearer to those of clean images."""
    classifier, known = convolutional(5), images_of(64, seed=9)
    taps = Taps(classifier.module, ["0"])
    images = images_of(24)
    labels = classifier.predict(images)
    bonus = density(taps, known, weight=200.0)
    attack = partial(pgd, classifier, images, labels, norm="l2", eps=2.0, steps=40, precision="float32")
    results = [attack(goal=Evade(confidence=1e6)), attack(goal=Evade(confidence=1e6, bonus=bonus))]
    dense = [float(bonus(result.attempts).detach().mean()) for result in results]
    assert dense[1] > dense[0]
    assert torch.equal(results[1].backwards, 2 * results[0].backwards)


def test_likeness_leads_to_the_guide_and_is_the_images_own():
    """With a goal that is never reached the loss is margin and likeness; with a large weight the features become the guide's."""
    classifier, images, guides = linear(3, 64, 3), images_of(5), images_of(5, seed=7)
    labels = classifier.predict(images)
    goal = Evade(confidence=1e9, bonus=likeness(plain, guides, weight=1e4))
    attack = partial(pgd, classifier, labels=labels, norm="l2", eps=8.0, steps=300, step_size=0.1, precision="float32")
    together = attack(images=images, goal=goal)
    before, after = (sizes(guides, sent)["l2"] for sent in (images, together.attempts))
    assert bool((after < 0.2 * before).all())
    one = pgd(
        classifier, images[3:4], labels[3:4], goal=goal.select(torch.tensor([3])), norm="l2", eps=8.0, steps=300, step_size=0.1,
        precision="float32",
    )  # fmt: skip
    torch.testing.assert_close(one.attempts[0], together.attempts[3], atol=1e-3, rtol=0)


def test_feature_matching_breaks_a_rejection():
    """R18: the guide is an image of another class that is accepted."""
    train, test = data.load("digits", "train"), data.load("digits", "test")
    network = nn.Sequential(nn.Flatten(), nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 10))
    fit(network, train.images[:700], train.labels[:700], epochs=15, batch_size=64)
    rejecting = NeuralRejection(network, 10, "2", C=10.0, false_rejection_rate=0.1).fit(train.images[700:], train.labels[700:])
    images, labels = test.floats()[:20], test.labels[:20]
    predictions, pool = rejecting.predict(test.floats()), test.labels
    guides = torch.stack([test.floats()[(predictions == pool) & (pool != label)][0] for label in labels])
    goal = Evade("cross_entropy", bonus=likeness(Taps(network, ["2"]), guides, weight=10.0))
    result = pgd(rejecting, images, labels, norm="l2", eps=6.0, steps=200, step_size=0.1, goal=goal)
    assert float(result.found.double().mean()) > 0.9


def test_a_bonus_is_for_attacks_with_an_eps():
    classifier, images = linear(3, 64, 3), images_of(4)
    bonus = density(plain, images)
    for attack in (ddn, fmn):
        with pytest.raises(DemurError, match="bonus is for attacks with an eps"):
            attack(classifier, images, classifier.predict(images), goal=Evade(bonus=bonus))
    with pytest.raises(DemurError, match="bonus is for attacks with an eps"):
        strongest(classifier, images, classifier.predict(images), norm="l2", goal=Evade(bonus=bonus))
    strongest(classifier, images, classifier.predict(images), norm="l2", eps=1e-4, steps=2, targets=1, queries=3, goal=Evade(bonus=bonus))
    with pytest.raises(DemurError, match="at least two"):
        density(plain, images[:1])
    with pytest.raises(DemurError, match="weight must be positive"):
        likeness(plain, images, weight=-1.0)


class _Walled(nn.Module):
    """Class 1 is beyond a flat stretch, where the clean image has no gradient, and images of class 1 lie."""

    def forward(self, images):
        mean = images.flatten(1).mean(1)
        return torch.stack([torch.zeros_like(mean), (mean - 0.6).clamp(min=0) * 10 - 1], 1)


def test_a_bonus_of_another_network_is_in_evaluation_mode_and_takes_float64_images():
    """R3: dropout would draw, and batch statistics would move."""
    classifier, other, images = linear(3, 64, 3), convolutional(3), images_of(4)
    other.train()
    before = {name: value.clone() for name, value in other.state_dict().items()}
    bonus = density(Taps(other.module, ["0"]), images)
    goal = Evade(confidence=1e9, bonus=bonus)
    one, two = (pgd(classifier, images.double(), classifier.predict(images), eps=0.1, steps=3, goal=goal).attempts for _ in range(2))
    assert torch.equal(one, two) and other.module.training
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in before.items())


def test_a_start_for_each_run_is_double_initialisation():
    """R18: from the image alone the attack is blind; from another class' image it is not."""
    classifier = Classifier(_Walled(), 2)
    images, others = torch.full((4, 1, 4, 4), 0.3), torch.full((4, 1, 4, 4), 0.9)
    labels = torch.zeros(4, dtype=torch.int64)
    attack = partial(pgd, classifier, images, labels, norm="l2", eps=2.0, steps=30)
    with pytest.warns(UserWarning, match="blind"):
        assert not attack().found.any()
    assert attack(start=torch.stack([images, others]), restarts=2).found.all()
    with pytest.raises(DemurError, match="there are 2 starts, but restarts is 1"):
        attack(start=torch.stack([images, others]))
    with pytest.raises(DemurError, match="start has shape"):
        attack(start=torch.stack([images[:2], others[:2]]), restarts=2)


def test_a_run_ends_where_the_loss_stands_still_image_by_image():
    """Algorithm 1 of the rejection paper as it is to be read: not at the first small change, and not for the batch."""
    classifier, images = linear(3, 64, 3), images_of(6)
    labels = classifier.predict(images)
    goal = Evade(confidence=1e9)  # never reached: only the rule ends it
    attack = partial(pgd, classifier, labels=labels, goal=goal, norm="l2", eps=1.0, step_size=0.1, precision="float32")
    free, ruled = attack(images=images, steps=200), attack(images=images, steps=200, tolerance=1e-3)
    assert bool((free.backwards == 200).all()) and bool((ruled.backwards < 150).all()) and bool((ruled.backwards > 10).all())
    margins = [Evade().margin(classifier.scores(result.attempts), labels, 3) for result in (free, ruled)]
    torch.testing.assert_close(*margins, atol=0.02, rtol=0.02)
    alone = pgd(
        classifier, images[2:3], labels[2:3], goal=goal, norm="l2", eps=1.0, step_size=0.1, precision="float32", steps=200, tolerance=1e-3
    )
    assert int(alone.backwards[0]) == int(ruled.backwards[2])
