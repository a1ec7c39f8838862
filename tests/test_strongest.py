"""The ensemble: the order of targets, targets that are given up, and the images of Square."""

import warnings
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import beta
from torch import nn

from demur import Classifier, DemurError, ThreatModel, black_box, data, masks
from demur.attacks import (
    APGD,
    Attack,
    Evade,
    ForceReject,
    SearchAttack,
    Square,
    SquareSample,
    Strongest,
    Target,
)
from demur.attacks.sampling import attack_in_stages
from demur.attacks.strongest import PROFILES
from demur.attacks.tally import Tally
from demur.attacks.targets import nearest_targets
from demur.defenses import AdversarialTraining
from demur.training import fit
from models import Linear, convolutional, images_of, linear

EXACT = {"precision": "float32"}
SEEN = []


@dataclass(frozen=True, repr=False)
class Ordered(SearchAttack):
    """Notes the order of targets."""

    count: int = 9

    def search(self, state):
        SEEN.append(nearest_targets(state, self.count))


def order_of(classifier, images, labels, threat, count=9, **options):
    SEEN.clear()
    result = Ordered(count)(classifier, images, labels, threat, **EXACT, **options)
    return torch.cat(SEEN), result


@pytest.mark.parametrize(("norm", "dual"), [("linf", 1), ("l2", 2), ("l1", torch.inf)])
@pytest.mark.parametrize("masked", [False, True])
def test_targets_are_ordered_by_the_distance_to_their_boundary(norm, dual, masked):
    """A linear classifier has it in closed form."""
    classifier = linear(8, 64, 8)
    weights = classifier.module.weights.detach()
    images = images_of(20)
    labels = classifier.predict(images)
    mask = masks.centre_box((8, 8), 4, 4) if masked else None
    inside = torch.ones(64) if mask is None else mask.flatten().float()
    threat = ThreatModel(norm, 0.001, mask=mask)
    for count in (3, 9):
        found, result = order_of(classifier, images, labels, threat, count)
        assert found.shape == (20, min(count, 7))
        assert result.backwards.tolist() == [7] * 20
        for image, label, order in zip(images.flatten(1), labels.tolist(), found.tolist()):
            slopes = (weights - weights[label]) * inside
            gaps = weights[label] @ image - weights @ image
            distances = gaps / slopes.norm(p=dual, dim=1)
            distances[label] = torch.inf
            assert order == distances.argsort().tolist()[: len(order)]


def test_the_order_of_targets_follows_the_goal():
    classifier = linear(5, 64, 4)  # with a reject column
    images = images_of(30)
    labels = torch.zeros(30, dtype=torch.int64)
    kept = ~Evade().success(classifier(images), labels, 4)
    images, labels = images[kept], labels[kept]
    evading, _ = order_of(classifier, images, labels, "linf:0.001")
    assert evading.shape[1] == 3
    assert {1, 2, 3} == set(evading.flatten().tolist())
    for goal, column in ((ForceReject(), 4), (Target(2), 2)):
        unsolved = ~goal.success(classifier(images), labels, 4)
        one, result = order_of(
            classifier, images[unsolved], labels[unsolved], ThreatModel("linf", 0.001, goal)
        )
        assert set(one.flatten().tolist()) == {column}
        assert not result.backwards.any()  # one candidate needs no gradient


def test_a_single_target_is_the_nearest_and_not_the_one_of_the_highest_score():
    """Class 1 has the higher score, and class 2 the nearer boundary."""
    weights = torch.zeros(3, 64)
    weights[1, 0] = 0.1
    weights[2] = 1.0
    bias = torch.tensor([1.0, 0.9 - 0.05, 0.5 - 32.0])
    classifier = Classifier(Linear(weights, bias), 3)
    images = torch.full((2, 1, 8, 8), 0.5)
    labels = torch.zeros(2, dtype=torch.int64)
    assert classifier(images)[0].topk(2).indices.tolist() == [0, 1]
    found, _ = order_of(classifier, images, labels, "linf:0.1", 1)
    assert found.tolist() == [[2], [2]]
    assert APGD(n_targets=1)(classifier, images, labels, "linf:0.1", **EXACT).success.all()


@pytest.fixture(scope="module")
def networks():
    """A plain network and an adversarially trained one, for the embedded digits."""
    train, test = data.load("digits", "train"), data.load("digits", "test")

    def network():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return nn.Sequential(
                nn.Conv2d(1, 8, 4, stride=2, padding=1),
                nn.ReLU(),
                nn.Conv2d(8, 16, 4, stride=2, padding=1),
                nn.ReLU(),
                nn.Flatten(),
                nn.Linear(16 * 49, 64),
                nn.ReLU(),
                nn.Linear(64, 10),
            )

    adam = partial(torch.optim.Adam, lr=2e-3)
    options = {"batch_size": 64, "optimizer": adam, "precision": "float32", "device": "cpu"}
    plain = network()
    fit(plain, train.images, train.labels, epochs=4, **options)
    robust = network()
    attack = APGD(steps=3)
    AdversarialTraining(robust, 10, attack, "linf:0.1").fit(
        train.images, train.labels, epochs=4, **options
    )
    return {"plain": Classifier(plain, 10), "robust": Classifier(robust, 10)}, test


@pytest.mark.parametrize(
    ("name", "norm", "loss"),
    [
        ("plain", "linf", "margin"),
        ("plain", "l2", "scaled_margin"),
        ("robust", "linf", "scaled_margin"),
        ("robust", "l2", "margin"),
    ],
)
@pytest.mark.slow
def test_giving_up_hopeless_targets_loses_no_image(networks, name, norm, loss):
    """The sizes are those at which many images are broken, and many are not."""
    classifiers, test = networks
    classifier = classifiers[name]
    images, labels = test.to_float()[:48], test.labels[:48]
    whole = APGD(steps=100, n_targets=4, loss=loss)
    short = APGD(steps=100, n_targets=4, loss=loss, give_up=True)
    sizes = {"linf": {"plain": 0.06, "robust": 0.15}, "l2": {"plain": 0.7, "robust": 1.3}}
    threat = f"{norm}:{sizes[norm][name]}"
    full = whole(classifier, images, labels, threat, **EXACT)
    less = short(classifier, images, labels, threat, **EXACT)
    broken = float(full.success.float().mean())
    assert 0.1 < broken < 0.9
    assert torch.equal(less.success, full.success)
    kept = ~full.success
    assert int(less.backwards[kept].sum()) < 0.8 * int(full.backwards[kept].sum())


def test_a_hopeless_target_is_left_at_the_first_checkpoint_and_a_hopeful_one_is_not():
    classifier = linear(3, 64, 3)
    images = images_of(6)
    labels = classifier.predict(images)
    run = APGD(steps=100, n_targets=1, give_up=True)
    far = run(classifier, images, labels, "linf:0.0001", **EXACT)
    assert not far.success.any()
    # One gradient for each of two columns, one at the start, and those up to step 22.
    assert far.backwards.tolist() == [2 + 1 + 22] * 6
    margins = Evade().margin(classifier(images), labels, 3)
    weights = classifier.module.weights.detach()
    other = classifier(images).topk(2).indices[:, 1]
    slope = (weights[other] - weights[labels]).abs().sum(1)
    eps = -margins.detach() / slope  # where a classifier without clipping has its boundary
    near = run(classifier, images, labels, ThreatModel("linf", 0.8 * eps.double()), **EXACT)
    assert not near.success.any()
    assert bool((near.backwards >= 100).any())
    # Further tries are for what came near.
    thrice = replace(run, tries=3)
    again = thrice(classifier, images, labels, "linf:0.0001", **EXACT)
    assert torch.equal(again.backwards, far.backwards)
    again = thrice(classifier, images, labels, ThreatModel("linf", 0.8 * eps.double()), **EXACT)
    assert torch.equal(again.backwards > near.backwards, near.backwards >= 100)
    for patient in (
        replace(thrice, give_up=False),
        replace(thrice, keep_maximizing=True, give_up=False),
    ):
        full = patient(classifier, images, labels, "linf:0.0001", **EXACT)
        assert full.backwards.tolist() == [2 + 100] * 6


@pytest.mark.parametrize(("name", "threat"), [("plain", "linf:0.08"), ("robust", "l2:1.7")])
@pytest.mark.slow
def test_square_gives_up_hopeless_images_and_loses_none(networks, name, threat):
    classifiers, test = networks
    images, labels = test.to_float()[:64], test.labels[:64]
    whole, short = (
        attack(classifiers[name], images, labels, threat)
        for attack in (Square(n_queries=1000), Square(n_queries=1000, give_up=True))
    )
    assert 0.1 < float(whole.success.float().mean()) < 0.9
    assert torch.equal(short.success, whole.success)
    assert torch.equal(short.images, whole.images)
    kept = ~whole.success
    # The engine scores the clean images of failures once more.
    assert set(whole.forwards[kept].tolist()) == {1001}
    assert 203 in short.forwards[kept].tolist()
    assert set(short.forwards[kept].tolist()) <= {203, 403, 603, 803, 1001}
    assert int(short.forwards[kept].sum()) < 0.8 * int(whole.forwards[kept].sum())


def test_giving_up_needs_a_margin_and_an_end():
    with pytest.raises(DemurError, match="give_up needs a margin"):
        Square(give_up=True, loss="cross_entropy")
    for options in ({"loss": "cross_entropy"}, {"keep_maximizing": True}):
        with pytest.raises(DemurError, match="give_up needs a margin"):
            APGD(give_up=True, **options)
    with pytest.raises(DemurError, match="targeted APGD climbs the margin"):
        APGD(n_targets=3, loss="cross_entropy")
    with pytest.raises(DemurError, match="tries are for targets"):
        APGD(tries=2)


def test_a_regularizer_switches_giving_up_off():
    """It adds to the loss, so that success is no longer at 0."""

    class Nothing:
        def __call__(self, images):
            return 0 * images.flatten(1).sum(1)

        def select(self, index):
            return self

    classifier = linear(3, 64, 3)
    images = images_of(3)
    labels = classifier.predict(images)
    given = (classifier, images, labels, "linf:0.0001")
    attack = APGD(steps=50, n_targets=2, give_up=True)
    with_it = attack(*given, regularizer=Nothing(), **EXACT)
    without = attack(*given, **EXACT)
    assert bool((with_it.backwards > without.backwards).all())


# Which images Square attacks.


@dataclass
class Met:
    """Breaks chosen images, and notes which images it meets."""

    tally: Tally
    weak: set

    def __post_init__(self):
        self.rows = []

    def __call__(self, rows):
        self.rows.append(rows.tolist())
        for row in rows.tolist():
            self.tally.best.success[row] = row in self.weak


def stages(count, size, weak=(), seed=0, order=None, images=None):
    """Image i has the i-th nearest margin, unless the images come in another order."""
    images = images_of(count, seed=1) if images is None else images
    order = torch.arange(count) if order is None else order
    tally = Tally.of(images[order])
    tally.margins = -(order.float() + 1)
    met = Met(tally, {int((order == row).nonzero()) for row in weak})
    sample = attack_in_stages(met, tally, images[order], size, seed)
    return sample, [{int(order[row]) for row in rows} for rows in met.rows]


def test_the_nearest_images_and_a_random_sample_are_attacked():
    sample, (met,) = stages(200, 40)
    assert sample == SquareSample(left=200, attacked=60, broken=0, sampled=40)
    assert set(range(20)) <= met
    assert len(met) == 60
    other, (again,) = stages(200, 40, seed=1)
    assert other == sample
    assert again != met


def test_the_next_nearest_images_follow_until_none_breaks():
    sample, met = stages(400, 40, weak={3, 25})
    first, second, third = met
    chance = first - set(range(20))
    assert len(chance) == 40
    rest = [row for row in range(20, 400) if row not in chance]
    assert second == set(rest[:20])
    assert third == set(rest[20:40])
    assert sample == SquareSample(left=400, attacked=100, broken=2, sampled=40)


def test_a_success_in_the_random_sample_brings_all_images():
    _, (met,) = stages(200, 40)
    chosen = max(met)
    sample, (first, others) = stages(200, 40, weak={chosen, 150})
    assert first == met
    assert others == set(range(200)) - met
    assert sample.attacked == sample.left == 200
    assert sample.broken == len({chosen, 150})
    assert sample.bound == 0.0


@given(
    st.integers(1, 60),
    st.one_of(st.none(), st.integers(1, 30)),
    st.sets(st.integers(0, 59), max_size=8),
    st.randoms(use_true_random=False),
)
def test_the_choice_does_not_depend_on_the_order_of_the_images(count, size, weak, random):
    weak = {row for row in weak if row < count}
    order = torch.tensor(random.sample(range(count), count))
    sample, met = stages(count, size, weak)
    shuffled, again = stages(count, size, weak, order=order)
    assert (sample, met) == (shuffled, again)
    together = [row for rows in met for row in rows]
    assert len(together) == len(set(together)) == sample.attacked
    assert sample.broken == len(weak & set(together))
    if size is None:
        assert sample.attacked == count


def test_equal_images_are_sampled_together():
    images = images_of(90, seed=1)
    images[45:] = images[:1]
    sample, (met,) = stages(90, 20, images=images)
    same = {row for row in met if row >= 45}
    assert same in (set(), set(range(45, 90)))
    assert sample.sampled >= 20


@pytest.mark.parametrize("sampled", [1, 16, 64, 300])
def test_the_bound_is_that_of_clopper_and_pearson(sampled):
    sample = SquareSample(left=1000, attacked=sampled + 8, broken=1, sampled=sampled)
    assert sample.bound == pytest.approx(float(beta.ppf(0.95, 1, sampled)))
    assert f"at most {100 * sample.bound:.1f} %" in str(sample)
    assert f"{sampled} at random" in str(sample)
    whole = SquareSample(left=9, attacked=9, broken=1, sampled=0)
    assert whole.bound == 0.0
    assert str(whole) == "Square attacked all 9 images left, and broke 1."
    assert str(SquareSample(1, 1, 0, 0)) == "Square attacked 1 image left, and broke 0."


class Stairs(nn.Module):
    """A linear classifier behind an input of few levels: its gradients are zero."""

    def __init__(self):
        super().__init__()
        self.plain = linear(3, 64, 3).module

    def forward(self, images):
        return self.plain((images * 4).round() / 4) + 0 * images.flatten(1).sum(1, keepdim=True)


def test_hidden_gradients_bring_square_to_every_image():
    classifier = Classifier(Stairs(), 3)
    images = images_of(40)
    labels = classifier.predict(images)
    some = Strongest(steps=5, n_queries=200, square_sample=4)
    every = Strongest(steps=5, n_queries=200, square_sample=None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the attacks say that they are blind
        sampled, whole = (one(classifier, images, labels, "linf:0.2") for one in (some, every))
    assert "Square(n_queries=200, give_up=True)" in sampled.by
    assert sampled.sampled.attacked == sampled.sampled.left
    assert torch.equal(sampled.success, whole.success)
    assert torch.equal(sampled.images, whole.images)


def test_where_square_finds_nothing_the_result_says_on_how_many_images():
    classifier = linear(3, 64, 3)
    images = images_of(40)
    labels = classifier.predict(images)
    attack = Strongest(steps=5, n_queries=20, square_sample=8)
    result = attack(classifier, images, labels, "linf:0.0001")
    assert not result.success.any()
    assert (result.sampled.left, result.sampled.attacked, result.sampled.sampled) == (40, 12, 8)
    # A classifier that gives no gradient meets Square alone, and everywhere.
    box = black_box(lambda batch: classifier(torch.from_numpy(batch)).detach().numpy(), 3)
    scored = attack(box, images, labels, "linf:0.0001")
    assert scored.sampled == SquareSample(40, 40, 0, 0)
    assert bool((scored.forwards >= 20).all())
    # Where Square is no member, or nothing is left for it, nothing is said.
    assert attack(classifier, images[:4], labels[:4], "l1:0.001").sampled is None
    assert attack(classifier, images[:4], labels[:4], "linf:1").sampled is None


def test_order_and_batches_change_nothing():
    """The sample depends on the images and the seed."""
    classifier = convolutional(4, seed=3)
    images = images_of(40, seed=3)
    labels = classifier.predict(images)
    attack = Strongest(steps=10, n_queries=30, n_targets=2, square_sample=6)
    backwards = torch.arange(39, -1, -1)
    plain = attack(classifier, images, labels, "linf:0.01", **EXACT)
    turned = attack(classifier, images[backwards], labels[backwards], "linf:0.01", **EXACT)
    batched = attack(classifier, images, labels, "linf:0.01", batch_size=7, **EXACT)
    assert 0 < int(plain.success.sum()) < 40
    assert turned.sampled == plain.sampled == batched.sampled
    assert torch.equal(turned.success[backwards], plain.success)
    assert torch.equal(turned.forwards[backwards], plain.forwards)
    assert torch.equal(batched.success, plain.success)


def test_the_profiles_grow_and_are_described_by_plain_dicts():
    quick, standard, thorough = (PROFILES[name] for name in ("quick", "standard", "thorough"))
    assert standard == Strongest()
    assert quick.steps < standard.steps <= thorough.steps
    assert quick.n_queries < standard.n_queries < 10_000 <= thorough.n_queries
    assert quick.square_sample < standard.square_sample
    assert thorough.square_sample is None
    assert not thorough.give_up
    for profile in PROFILES.values():
        assert Attack.from_dict(profile.to_dict()) == profile
    members = thorough.attacks_for("linf:0.1", linear(3, 64, 3), images_of(1))
    assert Square(n_queries=10_000) in members
    assert not any(getattr(member, "give_up", False) for member in members)
    with pytest.raises(DemurError, match="square_sample must be at least 1"):
        Strongest(square_sample=0)
