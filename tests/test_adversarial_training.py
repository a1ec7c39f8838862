"""Adversarial training: on every batch, and in the two steps of the rejection paper."""

from functools import partial

import pytest
import torch
from torch import nn

from demur import Classifier, DemurError, Outcome, data, outcomes
from demur.attacks import AnyError, pgd, regions
from demur.defenses import AdversarialTraining, LocalizedAdversarialTraining
from demur.networks import fit

ATTACK = partial(pgd, norm="l2", eps=1.5, steps=10, random_start=True)
OPTIONS = {"epochs": 12, "batch_size": 64}


def network(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 16, 5, stride=2), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Dropout(0.2), nn.Linear(576, 10)
        )


def correct(classifier, images, labels):
    return float((outcomes(classifier, images, labels) == Outcome.CORRECT).double().mean())


@pytest.fixture(scope="module")
def digits():
    return data.load("digits", "train"), data.load("digits", "test")


@pytest.fixture(scope="module")
def plain(digits):
    module = network()
    fit(module, digits[0].images, digits[0].labels, **OPTIONS)
    return module


def robust(classifier, test):
    images, labels = test.floats()[:100], test.labels[:100]
    return 1 - float(pgd(classifier, images, labels, norm="l2", eps=1.5, steps=40).found.double().mean())


def test_training_on_attacked_batches_withstands_the_attack(digits, plain):
    train, test = digits
    trained = AdversarialTraining(network(), 10, ATTACK).fit(train.images, train.labels, **OPTIONS)
    assert robust(trained, test) > robust(Classifier(plain, 10), test) + 0.2
    assert correct(trained, test.floats(), test.labels) > 0.8 and len(trained.history_) == 12


def test_the_same_seed_trains_the_same_network_and_attacks_leave_no_trace_in_batch_statistics(digits):
    """R10; what is not trained on does not enter the running means: with an attack that does nothing they are those of plain training."""
    train, _ = digits
    images, labels = train.images[:256], train.labels[:256]
    options = {"epochs": 2, "batch_size": 64, "precision": "float32"}
    one, two = (AdversarialTraining(network(), 10, ATTACK).fit(images, labels, **options).module.state_dict() for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)
    nothing = partial(pgd, norm="l2", eps=0.0, steps=3, precision="float32")
    idle, unattacked = AdversarialTraining(network(), 10, nothing).fit(images, labels, **options).module, network()
    fit(unattacked, images, labels, **options)
    for name, value in unattacked.state_dict().items():
        torch.testing.assert_close(idle.state_dict()[name], value, msg=name)


def test_a_share_leaves_the_rest_of_the_batch_clean(digits):
    seen = []

    def spy(classifier, images, labels, **options):
        seen.append(len(images))
        return ATTACK(classifier, images, labels, **options)

    train, _ = digits
    AdversarialTraining(network(), 10, spy, share=0.25).fit(train.images[:128], train.labels[:128], epochs=1, batch_size=64)
    assert seen == [16, 16]


def test_two_steps_add_what_broke_the_network_and_nothing_else(digits, plain):
    """The rejection paper, sec. 3.4."""
    train, test = digits
    module = network()
    module.load_state_dict(plain.state_dict())
    index = torch.arange(100)
    before = pgd(Classifier(module, 10), train.floats()[:100], train.labels[:100], norm="l2", eps=1.5, steps=10, random_start=True)
    again = AdversarialTraining(module, 10, ATTACK).retrain(train.images, train.labels, index, epochs=2, batch_size=64)
    wrong = int((Classifier(plain, 10).predict(train.floats()[:100]) != train.labels[:100]).sum())  # as they are, and so there already
    assert abs(again.added_ - (int(before.found.sum()) - wrong)) <= 3  # another loss, the same attack
    assert correct(again, test.floats(), test.labels) > 0.9
    with pytest.raises(DemurError, match="nothing to retrain on"):
        idle = AdversarialTraining(plain, 10, partial(pgd, norm="l2", eps=0.0))
        idle.retrain(train.images[:50], torch.from_numpy(Classifier(plain, 10).predict(train.floats()[:50]).numpy()), epochs=1)


REGION = regions.outside(regions.centre_box((28, 28), 14, 14))


@pytest.mark.parametrize("posthoc", [False, True])
def test_what_is_outside_the_region_is_trained_on_as_it_is(digits, posthoc):
    """R26: bit for bit, in both readings of algorithm 1, and for a region of each batch's own."""
    train, _ = digits
    images, labels = train.floats()[:32], train.labels[:32]
    for region in (REGION, lambda images, labels: regions.outside(regions.foreground(images, dilation=1))):
        trained = LocalizedAdversarialTraining(
            network(), 10, partial(pgd, eps=0.3, steps=3, random_start=True), region=region, posthoc=posthoc
        )
        attacked = trained._attacked(images, labels, AnyError("cross_entropy", confidence=1e9), 0)
        where = (region(images, labels) if callable(region) else region).expand_as(images)
        assert bool((attacked == images)[where == 0].all()) and bool((attacked != images)[where == 1].any())
        trained.fit(train.images[:64], train.labels[:64], epochs=1, batch_size=64)


def test_training_against_the_background_withstands_attacks_on_it(digits, plain):
    """The localized paper's claim, in small."""
    train, test = digits
    attack = partial(pgd, eps=0.3, steps=8, random_start=True)
    trained = LocalizedAdversarialTraining(network(), 10, attack, region=REGION).fit(train.images, train.labels, **OPTIONS)
    images, labels = test.floats()[:100], test.labels[:100]
    left = [
        float((~pgd(one, images, labels, eps=0.3, steps=20, region=REGION).found).double().mean())
        for one in (Classifier(plain, 10), trained)
    ]
    assert left[1] > left[0] + 0.2 and correct(trained, test.floats(), test.labels) > 0.85


def test_retraining_keeps_to_the_region_too(digits, plain):
    train, _ = digits
    seen = []

    def spy(classifier, images, labels, **options):
        seen.append(options["region"])
        return pgd(classifier, images, labels, eps=0.3, steps=10, **options)

    module = network()
    module.load_state_dict(plain.state_dict())
    trained = LocalizedAdversarialTraining(module, 10, spy, region=REGION)
    trained.retrain(train.images, train.labels, torch.arange(60), epochs=1, batch_size=64)
    assert len(seen) == 1 and torch.equal(seen[0], REGION) and trained.added_ > 0


def test_a_region_of_nothing_is_plain_training(digits):
    train, _ = digits
    images, labels = train.images[:128], train.labels[:128]
    options = {"epochs": 1, "batch_size": 64, "precision": "float32"}
    attack = partial(pgd, eps=0.3, steps=2, precision="float32")
    nowhere = LocalizedAdversarialTraining(network(), 10, attack, region=torch.zeros(1, 1, 28, 28)).fit(images, labels, **options).module
    unattacked = network()
    fit(unattacked, images, labels, **options)
    for name, value in unattacked.state_dict().items():
        torch.testing.assert_close(nowhere.state_dict()[name], value, msg=name)


def test_what_does_not_fit_is_said():
    with pytest.raises(DemurError, match="name one"):
        AdversarialTraining(network(), 10, ATTACK, posthoc=True)
    with pytest.raises(DemurError, match="does not broadcast"):
        LocalizedAdversarialTraining(network(), 10, ATTACK, region=torch.ones(1, 1, 8, 8)).fit(
            torch.zeros(4, 1, 28, 28), torch.zeros(4, dtype=torch.int64), epochs=1
        )
    with pytest.raises(DemurError, match="of 0 and 1"):
        LocalizedAdversarialTraining(network(), 10, partial(pgd, eps=0.1, steps=1), region=torch.full((28, 28), 0.5), posthoc=True).fit(
            torch.zeros(4, 1, 28, 28), torch.zeros(4, dtype=torch.int64), epochs=1
        )
    with pytest.raises(DemurError, match="share"):
        AdversarialTraining(network(), 10, ATTACK, share=0.0)
    with pytest.raises(DemurError, match=r"labels must lie in 0\.\.9"):
        AdversarialTraining(network(), 10, ATTACK).fit(torch.zeros(4, 1, 28, 28), torch.full((4,), 12), epochs=1)
