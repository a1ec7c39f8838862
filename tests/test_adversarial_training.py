"""Adversarial training: on every batch, and in the two steps of the rejection paper."""

from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from torch import nn

from demur import Classifier, DemurError, Outcome, data, outcomes
from demur.attacks import DDN, PGD, AnyError, Evade, Strongest, masks
from demur.defenses import AdversarialTraining, LocalizedAdversarialTraining
from demur.defenses.attacked_batches import AttackedBatches, MaskedAttack
from demur.files import fingerprint
from demur.threat import ThreatModel
from demur.training import fit

ATTACK = PGD(steps=10, random_start=True)
OPTIONS = {"epochs": 12, "batch_size": 64}
MASK = masks.outside(masks.centre_box((28, 28), 14, 14))


def network(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 16, 5, stride=2),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Dropout(0.2),
            nn.Linear(576, 10),
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


def copied(plain):
    module = network()
    module.load_state_dict(plain.state_dict())
    return module


def robust(classifier, test, threat, steps=40):
    result = PGD(steps=steps)(classifier, test.to_float()[:100], test.labels[:100], threat)
    return 1 - float(result.success.double().mean())


@pytest.mark.slow
def test_training_on_attacked_batches_withstands_the_attack(digits, plain):
    train, test = digits
    trained = AdversarialTraining(network(), 10, PGD(steps=5, random_start=True), "l2:1.5")
    trained.fit(train.images, train.labels, **OPTIONS)
    undefended = Classifier(plain, 10)
    assert robust(trained, test, "l2:1.5") > robust(undefended, test, "l2:1.5") + 0.2
    assert correct(trained, test.to_float(), test.labels) > 0.8
    assert len(trained.history_) == 12


def test_the_same_seed_trains_the_same_network(digits):
    """R10."""
    train, _ = digits
    options = {"epochs": 2, "batch_size": 64, "precision": "float32"}
    one, two = (
        AdversarialTraining(network(), 10, ATTACK, "l2:1.5")
        .fit(train.images[:256], train.labels[:256], **options)
        .network.state_dict()
        for _ in range(2)
    )
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(
    ("eps", "mask"), [(0.0, None), (0.3, torch.zeros(1, 1, 28, 28))], ids=["eps 0", "empty mask"]
)
def test_an_attack_that_changes_nothing_is_plain_training(digits, eps, mask):
    """Only images that are trained on enter the running means of batch norm."""
    train, _ = digits
    images = train.images[:128]
    labels = train.labels[:128]
    options = {"epochs": 2, "batch_size": 64, "precision": "float32"}
    threat = ThreatModel("linf", eps)
    idle = AdversarialTraining(network(), 10, PGD(steps=2), threat, mask=mask)
    idle.fit(images, labels, **options)
    unattacked = network()
    fit(unattacked, images, labels, **options)
    for name, value in unattacked.state_dict().items():
        torch.testing.assert_close(idle.network.state_dict()[name], value, msg=name)


class Spy(MaskedAttack):
    seen: ClassVar[list[int]] = []

    def maximize(self, classifier, images, labels, seed):
        self.seen.append(len(images))
        return super().maximize(classifier, images, labels, seed)


def test_a_fraction_leaves_the_rest_of_the_batch_clean(digits, monkeypatch):
    train, _ = digits
    monkeypatch.setattr("demur.defenses.adversarial_training.MaskedAttack", Spy)
    monkeypatch.setattr(Spy, "seen", [])
    trained = AdversarialTraining(network(), 10, PGD(steps=2), "linf:0.1", adversarial_fraction=0.2)
    trained.fit(train.images[:128], train.labels[:128], epochs=1, batch_size=64)
    assert Spy.seen == [13, 13]
    images = train.to_float()[:64]
    labels = train.labels[:64]
    batches = AttackedBatches(trained, trained._attacker(), 0.2, seed=0)
    attacked, same = batches(trained.network, images, labels, 0)
    assert torch.equal(attacked[13:], images[13:]) and same is labels
    assert bool((attacked[:13] != images[:13]).flatten(1).any(1).all())


class Mirrored:
    def __call__(self, network, images, labels, step):
        return images.flip(3), labels

    def fingerprint(self):
        return "mirrored"


def test_a_transform_changes_a_batch_before_the_attack(digits):
    train, _ = digits
    images, labels = train.images[:64], train.labels[:64]
    options = {"epochs": 1, "batch_size": 32, "precision": "float32"}

    def weights(images, **more):
        trained = AdversarialTraining(network(), 10, PGD(steps=2), "linf:0.1", mask=MASK)
        return trained.fit(images, labels, **options, **more).network.state_dict()

    expected = weights(images.flip(3))
    found = weights(images, transform=Mirrored())
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_training_maximises_the_cross_entropy_of_any_error(digits, plain):
    """Attack and goal of the threat do not matter, only how it searches and what it may change."""
    train, _ = digits
    images = train.to_float()[:32]
    labels = train.labels[:32]
    trained = AdversarialTraining(plain, 10, ATTACK, ThreatModel("linf", 0.1, Evade()), prefit=True)
    assert trained.threat == ThreatModel("linf", 0.1, AnyError())
    found = trained._attacker().maximize(trained, images, labels, seed=3)
    expected = replace(ATTACK, loss="cross_entropy").maximize(
        trained, images, labels, ThreatModel("linf", 0.1, AnyError()), seed=3
    )
    assert torch.equal(found, expected)
    losses = [
        nn.functional.cross_entropy(trained.scores(given), labels) for given in (images, found)
    ]
    assert losses[1] > losses[0] + 0.5


def test_two_steps_add_what_broke_the_network_and_nothing_else(digits, plain):
    """The rejection paper, sec. 3.4."""
    train, test = digits
    module = copied(plain)
    index = torch.arange(100)
    images = train.to_float()[:100]
    labels = train.labels[:100]
    attack = replace(ATTACK, loss="cross_entropy")
    before = attack(Classifier(module, 10), images, labels, ThreatModel("l2", 1.5, AnyError()))
    again = AdversarialTraining(module, 10, ATTACK, "l2:1.5", prefit=True)
    again.augment_and_finetune(train.images, train.labels, index, epochs=2, batch_size=64)
    # A success without a change is in the training set already.
    changed = (before.images != images).flatten(1).any(1)
    assert again.added_ == int((before.success & changed).sum()) > 80
    assert correct(again, test.to_float(), test.labels) > 0.9
    idle = AdversarialTraining(plain, 10, PGD(), "l2:0", prefit=True)
    right = Classifier(plain, 10).predict(images[:50])
    with pytest.raises(DemurError, match="nothing to add"):
        idle.augment_and_finetune(train.images[:50], right, epochs=1)


def test_two_steps_take_any_attack_and_need_a_trained_network(digits, plain):
    train, _ = digits
    images = train.images[:40]
    labels = train.labels[:40]
    trained = AdversarialTraining(copied(plain), 10, DDN(steps=20), "l2", prefit=True)
    assert trained.augment_and_finetune(images, labels, epochs=1, batch_size=16).added_ > 30
    with pytest.raises(DemurError, match="not fitted"):
        AdversarialTraining(network(), 10, ATTACK, "l2:1").augment_and_finetune(images, labels)
    for attack, threat in ((DDN(steps=5), "l2:1"), (Strongest(), "linf:0.1")):
        unfit = AdversarialTraining(network(), 10, attack, threat)
        with pytest.raises(DemurError):
            unfit.fit(images, labels, epochs=1)
        assert not unfit.fitted_


@pytest.mark.parametrize("mask_after_attack", [False, True])
def test_pixels_outside_the_mask_are_trained_on_unchanged(digits, mask_after_attack):
    """R26: bit for bit, in both readings of algorithm 1, and for a mask of each batch's own."""
    train, _ = digits
    images = train.to_float()[:32]
    labels = train.labels[:32]
    for mask in (MASK, lambda images, labels: masks.outside(masks.foreground(images, dilation=1))):
        trained = LocalizedAdversarialTraining(
            network(),
            10,
            PGD(steps=3, random_start=True),
            "linf:0.3",
            mask=mask,
            mask_after_attack=mask_after_attack,
            prefit=True,
        )
        attacked = trained._attacker().maximize(trained, images, labels, 0)
        where = (mask(images, labels) if callable(mask) else mask).expand_as(images)
        assert bool((attacked == images)[where == 0].all())
        assert bool((attacked != images)[where == 1].any())
        trained.fit(train.images[:64], train.labels[:64], epochs=1, batch_size=64)


@pytest.mark.slow
def test_training_against_the_background_withstands_attacks_on_it(digits, plain):
    """The localized paper's claim, in small."""
    train, test = digits
    attack = PGD(steps=5, random_start=True)
    trained = LocalizedAdversarialTraining(network(), 10, attack, "linf:0.3", mask=MASK)
    trained.fit(train.images, train.labels, **OPTIONS)
    threat = ThreatModel("linf", 0.3, mask=MASK)
    undefended = robust(Classifier(plain, 10), test, threat, 20)
    assert robust(trained, test, threat, 20) > undefended + 0.2
    assert correct(trained, test.to_float(), test.labels) > 0.85


def test_two_steps_keep_to_the_mask_too(digits, plain, monkeypatch):
    train, _ = digits
    trained = LocalizedAdversarialTraining(
        copied(plain), 10, PGD(steps=10), "linf:0.3", mask=MASK, prefit=True
    )
    given = []

    def record(module, images, *rest, **options):
        given.append(images)

    monkeypatch.setattr("demur.defenses.adversarial_training.fit", record)
    trained.augment_and_finetune(train.images[:60], train.labels[:60], epochs=1)
    images = train.to_float()[:60]
    assert torch.equal(given[0][:60], images) and len(given[0]) == 60 + trained.added_
    inside = (MASK == 0).expand(1, 1, 28, 28)[0, 0]
    known = {bytes(image[0][inside].numpy().tobytes()) for image in images}
    assert all(added[0][inside].numpy().tobytes() in known for added in given[0][60:])


def test_the_mask_may_be_part_of_the_threat_and_may_be_replaced():
    threat = ThreatModel("linf", 0.3, mask=MASK)
    trained = AdversarialTraining(network(), 10, ATTACK, threat)
    assert torch.equal(trained.mask, MASK) and trained.threat.mask is None
    assert "mask_tensor" in trained.state_dict()
    trained.mask = lambda images, labels: images
    assert callable(trained.mask) and "mask_tensor" not in trained.state_dict()
    trained.mask = MASK
    assert torch.equal(trained.mask, MASK)
    trained.mask = None
    assert trained.mask is None


def other_mask(images, labels):
    return torch.ones_like(images)


@pytest.mark.parametrize(
    "change",
    [
        {"attack": PGD(steps=3)},
        {"threat": "linf:0.02"},
        {"adversarial_fraction": 0.5},
        {"mask": 1 - MASK},
        {"mask": other_mask},
        {"mask_after_attack": True},
    ],
    ids=str,
)
def test_d6_checkpoints_know_everything_that_attacked_batches_depend_on(change):
    """D6."""

    def transform(attack=ATTACK, threat="linf:0.5", seed=0, **options):
        trained = AdversarialTraining(network(), 10, attack, threat, **{"mask": MASK, **options})
        fraction = trained.adversarial_fraction
        return fingerprint(AttackedBatches(trained, trained._attacker(), fraction, seed))

    assert transform() == transform()
    assert transform(**change) != transform()
    assert transform(seed=1) != transform()
    trained = AdversarialTraining(network(), 10, ATTACK, "linf:0.5", mask=MASK)
    mirrored = AttackedBatches(trained, trained._attacker(), 1.0, 0, Mirrored())
    assert fingerprint(mirrored) != transform()


def test_what_does_not_fit_is_said():
    images = torch.zeros(4, 1, 28, 28)
    labels = torch.zeros(4, dtype=torch.int64)
    attack = PGD(steps=1)
    threat = ThreatModel("linf", 0.1)
    for options, said in (
        ({"mask_after_attack": True}, "needs a mask"),
        ({"adversarial_fraction": 0.0}, "adversarial_fraction"),
        ({"adversarial_fraction": 1.5}, "adversarial_fraction"),
    ):
        with pytest.raises(DemurError, match=said):
            AdversarialTraining(network(), 10, attack, threat, **options)
    with pytest.raises(DemurError, match="not both"):
        AdversarialTraining(network(), 10, attack, replace(threat, mask=MASK), mask=MASK)
    with pytest.raises(DemurError, match="one eps"):
        AdversarialTraining(network(), 10, attack, replace(threat, eps=torch.ones(4)))
    with pytest.raises(DemurError, match="attack must be an attack"):
        AdversarialTraining(network(), 10, lambda *given: None, threat)
    small = LocalizedAdversarialTraining(network(), 10, attack, threat, mask=torch.ones(1, 1, 8, 8))
    with pytest.raises(DemurError, match="does not broadcast"):
        small.fit(images, labels, epochs=1)
    half = torch.full((28, 28), 0.5)
    scaled = LocalizedAdversarialTraining(
        network(), 10, attack, threat, mask=half, mask_after_attack=True
    )
    with pytest.raises(DemurError, match="of 0 and 1"):
        scaled.fit(images, labels, epochs=1)
    with pytest.raises(DemurError, match=r"labels must lie in 0\.\.9"):
        AdversarialTraining(network(), 10, attack, threat).fit(images, labels + 12, epochs=1)


def test_d6_another_eps_does_not_resume_the_training_of_a_checkpoint(digits, tmp_path, monkeypatch):
    """D6: killed at eps .5, started at eps .02 with the same file."""
    train, _ = digits
    images = train.images[:128]
    labels = train.labels[:128]
    options = {"epochs": 4, "batch_size": 32, "precision": "float32"}
    monkeypatch.setattr("demur.training.loop.CHECKPOINT_SECONDS", 0.0)
    checkpoint = tmp_path / "checkpoint"

    def trained(eps, path=None):
        defense = AdversarialTraining(network(), 10, PGD(steps=1), ThreatModel("linf", eps))
        return defense.fit(images, labels, checkpoint=path, **options).network.state_dict()

    attacked = AttackedBatches.__call__

    def killed(self, module, images, labels, step):
        if step == 9:
            raise KeyboardInterrupt
        return attacked(self, module, images, labels, step)

    monkeypatch.setattr(AttackedBatches, "__call__", killed)
    with pytest.raises(KeyboardInterrupt):
        trained(0.5, checkpoint)
    assert checkpoint.exists()
    monkeypatch.setattr(AttackedBatches, "__call__", attacked)
    expected = trained(0.02)
    found = trained(0.02, checkpoint)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_mask_for_each_image_must_be_a_callable(digits):
    """Batches are drawn at random: the rows of a tensor would meet other images."""
    train = digits[0]
    each = masks.foreground(train.to_float()[:64])
    for images, mask in (
        (train.images[:64], each),
        (train.to_float()[:64].flatten(1), each.flatten(1)),
    ):
        module = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
        defense = AdversarialTraining(module, 10, ATTACK, "linf:0.1", mask=mask)
        with pytest.raises(DemurError, match="give a callable"):
            defense.fit(images, train.labels[:64], epochs=1, batch_size=32)
        assert not defense.fitted_


def test_localized_training_without_a_mask_is_refused():
    with pytest.raises(DemurError, match="localized training needs a mask"):
        LocalizedAdversarialTraining(network(), 10, ATTACK, "linf:0.1", mask=None)
    threat = ThreatModel("linf", 0.1, mask=MASK)
    defense = LocalizedAdversarialTraining(network(), 10, ATTACK, threat, mask=None)
    assert torch.equal(defense.mask, MASK)
