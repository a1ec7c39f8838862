"""How strong the attacks are, against what can be computed: the nearest error of a linear classifier inside the box, in every norm."""

from dataclasses import replace
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from demur import Classifier, DemurError, black_box, outcomes
from demur.attacks import (
    AnyError,
    Evade,
    ForceReject,
    StraightThrough,
    Target,
    apgd,
    carlini_l0,
    carlini_l2,
    carlini_linf,
    ddn,
    expectation,
    fgs,
    fmn,
    noise,
    normalized_gradient,
    pgd,
    sigma_zero,
    sizes,
    square,
    strongest,
    transfer,
)
from models import Constant, Linear, convolutional, images_of, linear

EXACT = {"precision": "float32"}


def two_classes(seed, pixels=64, channels=1, levels=255, count=6):
    """A linear classifier of two classes, images that it answers, and the weights and margins behind that."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(2, pixels * channels, generator=generator)
    size = int(pixels**0.5)
    images = images_of(count, channels, size, seed, levels)
    scores = images.flatten(1) @ weights.T
    # A bias in the widest gap between images, so that both classes occur and no image is nearly undecided.
    gaps = (scores[:, 0] - scores[:, 1]).sort().values
    widest = int(gaps.diff().argmax())
    bias = torch.tensor([0.0, float(gaps[widest : widest + 2].mean())])
    classifier = Classifier(Linear(weights, bias), 2)
    labels = classifier.predict(images)
    margins = (classifier(images).gather(1, labels[:, None]) - classifier(images).gather(1, 1 - labels[:, None])).flatten().detach()
    slope = torch.stack([weights[1 - y] - weights[y] for y in labels.tolist()])
    return classifier, images, labels, margins.double(), slope.double()


def nearest_error(norm, images, margins, slope):
    """The smallest change in the norm that makes up for the margin within [0, 1]: exact, image by image (each is a knapsack)."""
    found = []
    for image, margin, weights in zip(images.flatten(1).double(), margins, slope, strict=True):
        gain, room = weights.abs(), torch.where(weights > 0, 1 - image, image)
        if norm == "l1":
            order = gain.argsort(descending=True)
            gains, rooms = gain[order], room[order]
            before = torch.cat([torch.zeros(1, dtype=torch.float64), (gains * rooms).cumsum(0)])
            last = int((before <= margin).sum()) - 1
            found.append(float(rooms[:last].sum() + (margin - before[last]) / gains[last]))
        elif norm == "l0":
            found.append(int(((gain * room).sort(descending=True).values.cumsum(0) < margin).sum()) + 1)
        else:
            low, high = 0.0, 1e3
            for _ in range(100):
                middle = (low + high) / 2
                change = torch.minimum(middle * (gain if norm == "l2" else torch.ones_like(gain)), room)
                low, high = (middle, high) if float((change * gain).sum()) < margin else (low, middle)
            found.append(float(change.norm() if norm == "l2" else change.max()))
    return torch.tensor(found, dtype=torch.float64)


SMALLEST = {
    "carlini_l2": ("l2", partial(carlini_l2, steps=200, **EXACT)),
    "carlini_linf": ("linf", partial(carlini_linf, steps=1000, decrease=0.98, **EXACT)),
    "ddn": ("l2", partial(ddn, steps=200, **EXACT)),
    "fmn l2": ("l2", partial(fmn, norm="l2", steps=300, **EXACT)),
    "fmn linf": ("linf", partial(fmn, norm="linf", steps=300, **EXACT)),
    "fmn l1": ("l1", partial(fmn, norm="l1", steps=500, **EXACT)),
}


@pytest.mark.parametrize("levels", [255, 1])
@pytest.mark.parametrize("name", SMALLEST)
def test_the_smallest_change_of_a_linear_classifier_is_found_within_2_percent(name, levels):
    """R7, R8: inside the box too, and on binary images, whose pixels all lie on its bounds."""
    norm, attack = SMALLEST[name]
    classifier, images, labels, margins, slope = two_classes(1, levels=levels)
    result = attack(classifier, images, labels)
    exact = nearest_error(norm, images, margins, slope)
    assert result.found.all() and torch.equal(classifier.predict(result.images), 1 - labels)
    assert bool((result.distance >= exact * (1 - 1e-4)).all()), (result.distance / exact).tolist()
    assert bool((result.distance <= exact * 1.02 + 1e-6).all()), (result.distance / exact).tolist()


@pytest.mark.parametrize(
    "attack",
    [partial(sigma_zero, steps=500, **EXACT), partial(carlini_l0, steps=200, **EXACT), partial(fmn, norm="l0", steps=300, **EXACT)],
)
def test_the_fewest_pixels_of_a_linear_classifier_are_found_but_for_one(attack):
    """R8 in L0: the pixels with the largest gain within the box."""
    classifier, images, labels, margins, slope = two_classes(2)
    result = attack(classifier, images, labels)
    exact = nearest_error("l0", images, margins, slope)
    assert result.found.all() and bool((result.distance >= exact).all())
    assert bool((result.distance <= exact + 1).all()), (result.distance, exact)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("by", ["margin", "cross_entropy"])
def test_pgd_finds_errors_just_beyond_the_exact_distance_and_none_before(norm, by):
    """R8, R12: within 2 % of the analytic distance, on both sides."""
    classifier, images, labels, margins, slope = two_classes(3)
    exact = nearest_error(norm, images, margins, slope)
    attack = partial(pgd, classifier, images, labels, norm=norm, steps=200, goal=Evade(by), **EXACT)
    assert attack(eps=1.02 * exact).found.all()
    assert not attack(eps=0.98 * exact).found.any()
    if norm != "l1":
        assert apgd(classifier, images, labels, norm=norm, eps=1.02 * exact, goal=Evade(by), **EXACT).found.all()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_one_step_of_pgd_is_the_fast_gradient(norm):
    """R2."""
    from demur.attacks import fg

    classifier, images = convolutional(4), images_of(9)
    labels = classifier.predict(images)
    one = pgd(classifier, images, labels, norm=norm, eps=0.1, steps=1, step_size=0.1, **EXACT)
    other = (fgs if norm == "linf" else fg)(classifier, images, labels, eps=0.1)
    assert torch.equal(one.found, other.found)
    moved = one.found | (sizes(images, one.attempts)["linf"] > 0)
    assert torch.allclose(one.attempts[moved], other.attempts[moved], atol=1e-6)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1", "l0"])
def test_a_larger_eps_breaks_no_less_and_an_unbounded_one_breaks_all(norm):
    """R12."""
    classifier, images = linear(3, 64, 3), images_of(12)
    labels = classifier.predict(images)
    found = [
        strongest(classifier, images, labels, norm=norm, eps=eps * scale, steps=20, queries=20, **EXACT).found
        for scale in [{"linf": 1.0, "l2": 8.0, "l1": 64.0, "l0": 64.0}[norm]]
        for eps in (0.0, 0.05, 0.2, 1.0)
    ]
    for less, more in pairwise(found):
        assert bool((more | ~less).all())
    assert not found[0].any() and found[-1].all()


@pytest.mark.parametrize("attack", [partial(pgd, eps=0.2, steps=10), ddn, partial(carlini_l2, steps=200), partial(apgd, eps=0.2, steps=10)])
def test_a_constant_added_to_all_scores_changes_nothing(attack):
    """R6: a mask by a factor of 0 would make -50 the best class."""
    weights = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    images = images_of(8)
    plain, shifted = (Classifier(Linear(weights, torch.full((3,), bias)), 3) for bias in (0.0, -50.0))
    labels = plain.predict(images)
    one, other = (attack(classifier, images, labels, **EXACT) for classifier in (plain, shifted))
    assert torch.equal(one.found, other.found) and torch.allclose(one.distance, other.distance, rtol=1e-2)


def test_confidence_is_in_the_loss_and_in_the_success():
    """R7."""
    classifier, images, labels, _, _ = two_classes(5)
    near, sure = (carlini_l2(classifier, images, labels, confidence=kappa, steps=200, **EXACT) for kappa in (0.0, 5.0))
    margin = Evade().margin(classifier(sure.images), labels, 2)
    assert sure.found.all() and bool((margin >= 5.0).all()) and bool((margin < 5.5).all())
    assert bool((sure.distance > near.distance).all())


def test_carlini_goes_for_the_target_that_it_is_given():
    classifier, images = linear(4, 64, 4), images_of(8)
    labels = classifier.predict(images)
    targets = (labels + 2) % 4
    targeted = carlini_l2(classifier, images, labels, goal=Target(targets), steps=200, **EXACT)
    free = carlini_l2(classifier, images, labels, steps=200, **EXACT)
    assert targeted.found.all() and torch.equal(classifier.predict(targeted.images), targets)
    assert bool((targeted.distance >= free.distance * 0.99).all())


def test_a_region_confines_the_search_and_costs_distance():
    classifier, images, labels, margins, slope = two_classes(6)
    region = torch.zeros(1, 1, 8, 8)
    region[..., :6] = 1
    inside = nearest_error("l2", images, margins, slope * region.flatten())
    for attack in (partial(ddn, steps=200), partial(carlini_l2, steps=200)):
        result = attack(classifier, images, labels, region=region, **EXACT)
        assert torch.equal((result.images - images) * (1 - region), torch.zeros_like(images))
        assert bool((result.distance <= inside * 1.02).all())


def test_a_step_of_the_normalized_gradient_has_its_length_and_it_stops_when_it_is_there():
    """The listing of the smoothing paper takes one step too many, and divides by the length of the whole batch's gradient."""
    weights = torch.tensor([[3.0, 4.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    images, labels = torch.full((2, 1, 2, 2), 0.5), torch.tensor([0, 0])
    classifier = Classifier(Linear(weights, torch.tensor([0.0, 2.25])), 2)  # margin 1.25: at a slope of 5, a length of .25
    result = normalized_gradient(classifier, images, labels, goal=Target(1), step_size=0.1, **EXACT)
    assert result.found.all() and torch.allclose(result.distance, torch.full((2,), 0.3, dtype=torch.float64), atol=1e-5)
    assert result.forwards.tolist() == [4, 4]  # three steps, and the test that ends them
    short = normalized_gradient(classifier, images, labels, goal=Target(1), step_size=0.1, steps=2, **EXACT)
    assert not short.found.any() and torch.equal(short.images, images)


def test_the_hinge_goes_for_the_runner_up_and_does_not_see_the_reject_column():
    """Sec. 2.5.2 of the rejection paper: the class aimed at is fixed on the clean image."""
    scores = torch.tensor([[0.2, 0.9, -0.3, 5.0]], requires_grad=True)
    loss = Evade("hinge").loss(scores, torch.tensor([1]), 3)
    assert float(loss.detach()) == pytest.approx(-(0.8 + 1.9 + 0.7))
    (gradient,) = torch.autograd.grad(loss.sum(), scores)
    assert gradient.tolist() == [[1.0, -1.0, -1.0, 0.0]]
    classifier, images = linear(3, 64, 3), images_of(6)
    labels = classifier.predict(images)
    assert pgd(classifier, images, labels, eps=0.5, goal=Evade("hinge"), steps=50, **EXACT).found.all()


def _with_threshold(threshold=0.5, seed=0):
    """A linear classifier with a constant reject score."""
    plain = linear(3, 64, 3, seed)

    class Threshold(nn.Module):
        def __init__(self):
            super().__init__()
            self.plain = plain

        def forward(self, images):
            scores = self.plain(images)
            return torch.cat([scores, torch.full_like(scores[:, :1], threshold)], 1)

    return Classifier(Threshold(), 3)


@pytest.mark.parametrize(
    "attack",
    [
        partial(pgd, eps=0.3, steps=20),
        partial(apgd, eps=0.3, steps=20),
        partial(strongest, eps=0.3, steps=20, queries=50),
        ddn,
        fmn,
        partial(carlini_l2, steps=100),
        partial(square, eps=0.3, queries=100),
    ],
)
def test_success_never_counts_a_rejected_image_and_force_reject_never_an_accepted_one(attack):
    """R18, R19: on a threshold that rejects some images as they are."""
    classifier, images = _with_threshold(6.0), images_of(12)
    labels = torch.arange(12) % 3
    evaded = attack(classifier, images, labels)
    assert evaded.found.any()
    decided = classifier.predict(evaded.images)
    assert bool(((decided != -1) & (decided != labels))[evaded.found].all())
    rejected = attack(classifier, images, labels, goal=ForceReject())
    assert bool((classifier.predict(rejected.images)[rejected.found] == -1).all())
    anyhow = attack(classifier, images, labels, goal=AnyError())
    assert bool((outcomes(classifier, anyhow.images, labels)[anyhow.found] != 0).all())


def test_the_ensemble_is_no_weaker_than_its_parts_and_names_them():
    """R11, R13, R18."""
    classifier, images = convolutional(4, size=8, seed=3), images_of(24, seed=3)
    labels = classifier.predict(images)
    for norm, eps in (("linf", 0.03), ("l2", 0.25)):
        whole = strongest(classifier, images, labels, norm=norm, eps=eps, steps=30, queries=200)
        for part in (pgd, apgd, partial(square, queries=200), partial(noise, restarts=20)):
            assert bool((whole.found | ~part(classifier, images, labels, norm=norm, eps=eps).found).all())
        assert [bool(name) for name in whole.by] == whole.found.tolist()
        assert torch.equal(outcomes(classifier, whole.images, labels) == 2, whole.found)
    closest = strongest(classifier, images, labels, norm="l2", steps=30)
    assert bool((closest.distance <= ddn(classifier, images, labels, steps=60).distance * 1.001).all())
    assert set(closest.by) <= {"ddn", "fmn", "carlini_l2"}


def test_the_ensemble_takes_vectors_of_which_some_withstand():
    """Vectors have no squares, so the score-based part is left out."""
    classifier, vectors = linear(3, 12, 3), torch.rand(8, 12, generator=torch.Generator().manual_seed(0))
    labels = classifier.predict(vectors)
    result = strongest(classifier, vectors, labels, eps=0.05, steps=10)
    assert not result.found.all() and set(result.by) <= {"", "fgs", "pgd, 10 steps", "apgd", "apgd, cross-entropy", "apgd, targeted", "fmn"}


def test_bfloat16_gradients_never_decide_what_is_reported():
    """Decisions are made in float32, whatever the gradients are computed in."""
    classifier, images = convolutional(4, size=8, seed=1), images_of(30, seed=1)
    labels = classifier.predict(images)
    for attack in (partial(pgd, eps=0.02, steps=20), partial(apgd, eps=0.02, steps=20), ddn, fmn, partial(carlini_l2, steps=60)):
        half, single = (attack(classifier, images, labels, precision=precision) for precision in ("bfloat16", "float32"))
        assert torch.equal(outcomes(classifier, half.images, labels) == 2, half.found)
        assert abs(int(half.found.sum()) - int(single.found.sum())) <= 1
        both = half.found & single.found
        if attack in (ddn, fmn):
            assert float((half.distance / single.distance)[both].median()) == pytest.approx(1, abs=0.05)


def test_a_black_box_is_attacked_by_its_scores_and_by_way_of_a_surrogate():
    plain, images = linear(3, 64, 3), images_of(10)
    weights = plain.module.weights.detach().numpy()
    asked = []

    def endpoint(batch):
        assert batch.dtype == np.float32 and batch.shape[1:] == (1, 8, 8)
        asked.append(len(batch))
        return batch.reshape(len(batch), -1) @ weights.T

    box = black_box(endpoint, 3)
    labels = plain.predict(images)
    assert torch.equal(box.predict(images), labels)
    for attack in (partial(pgd, eps=0.1), partial(fgs, eps=0.1), ddn, partial(carlini_l2, steps=10), partial(apgd, eps=0.1)):
        with pytest.raises(DemurError, match="gives no gradient"):
            attack(box, images, labels)
    searched = square(box, images, labels, eps=0.2, queries=300)
    assert searched.found.all() and bool((box.predict(searched.images) != labels).all()) and not searched.backwards.any()
    assert set(strongest(box, images, labels, eps=0.2, queries=300).by) == {"square"}
    with pytest.raises(DemurError, match="no gradient"):
        strongest(box, images, labels, norm="l1", eps=3.0)
    moved = transfer(box, images, labels, surrogate=plain, attack=partial(pgd, eps=0.2))
    assert moved.found.all() and not moved.backwards.any() and bool((moved.forwards <= 2).all())
    measured = transfer(box, images, labels, surrogate=plain, attack=partial(ddn, steps=50), norm="l2")
    assert torch.equal(measured.distance[measured.found], sizes(images, measured.images)["l2"][measured.found])
    with pytest.raises(DemurError, match="one row for each"):
        black_box(lambda batch: np.zeros((1, 3)), 3).predict(images)


def test_transfer_reports_the_classifier_and_not_the_surrogate():
    never = Classifier(Constant([5.0, 0.0, 0.0]), 3)
    surrogate, images = linear(3, 64, 3), images_of(6)
    labels = torch.zeros(6, dtype=torch.int64)
    result = transfer(never, images, labels, surrogate=surrogate, attack=partial(pgd, eps=0.3))
    assert not result.found.any() and torch.equal(result.images, images)


def test_a_stand_in_gives_gradients_where_the_module_has_none_and_leaves_the_answers_alone():
    """R24 in small: rounding to 4 levels has a gradient of 0 everywhere."""

    def rounded(images):
        return (images * 3).round() / 3

    class Rounded(nn.Module):
        def __init__(self, front):
            super().__init__()
            self.front, self.plain = front, linear(3, 64, 3)

        def forward(self, images):
            return self.plain(self.front(images))

    defended, attacked = Classifier(Rounded(rounded), 3), Classifier(Rounded(StraightThrough(rounded)), 3)
    images = images_of(10)
    labels = defended.predict(images)
    assert torch.equal(defended(images), attacked(images))
    blind, seeing = (pgd(classifier, images, labels, eps=0.2, steps=20) for classifier in (defended, attacked))
    assert not blind.found.any() and bool((blind.flat == blind.backwards).all())  # R14: and it is seen to have been blind
    assert seeing.found.all() and bool((defended.predict(seeing.images) != labels).all())


def test_a_stand_in_of_ones_own_is_differentiated():
    through = StraightThrough(torch.round, lambda images: images**2)
    images = torch.tensor([[0.3, 0.8]], requires_grad=True)
    (gradient,) = torch.autograd.grad(through(images).sum(), images)
    assert through(images).tolist() == [[0.0, 1.0]] and torch.allclose(gradient, 2 * images)


class Noisy(nn.Module):
    """A linear classifier behind noise so strong that one draw says little."""

    def __init__(self, spread):
        super().__init__()
        self.plain, self.spread = linear(3, 64, 3), spread

    def forward(self, images):
        return self.plain(images) + self.spread * torch.randn(len(images), 3)


def test_expectation_averages_what_a_randomised_classifier_draws():
    """R15: the mean over draws is nearer to what the classifier is; an attack on it repeats with its seed."""
    noisy, images = Classifier(Noisy(3.0), 3), images_of(200)
    exact = noisy.module.plain(images)
    torch.manual_seed(0)
    one, many = ((expectation(noisy, draws)(images) - exact).std() for draws in (1, 25))
    assert float((one / many).detach()) == pytest.approx(5, rel=0.2)
    labels = noisy.module.plain.predict(images)[:20]
    attack = partial(pgd, expectation(noisy, 8), images[:20], labels, eps=0.1, steps=10)
    torch.manual_seed(1)
    before = attack(seed=3)
    torch.manual_seed(2)
    assert torch.equal(before.images, attack(seed=3).images)


@pytest.mark.parametrize(
    ("attack", "said"),
    [
        (partial(pgd, eps=0.1, steps=0), "steps must be at least 1"),
        (partial(pgd, eps=0.1, step_size=-1.0), "positive"),
        (partial(pgd, eps=0.1, norm="l3"), "unknown norm"),
        (partial(pgd, eps=0.1, precision="float16"), "unknown precision"),
        (partial(pgd, eps=0.1, goal="evade"), "a goal is Evade"),
        (partial(pgd, eps=0.1, goal=Evade), "a goal is Evade"),
        (partial(pgd, eps=0.1, start=torch.zeros(2, 1, 8, 8)), "start has shape"),
        (partial(apgd, eps=0.1, norm="l1"), "use pgd"),
        (partial(square, eps=0.1, norm="l0"), "linf and l2"),
        (partial(square, eps=0.1, queries=0), "queries must be at least 1"),
        (partial(carlini_l2, steps=0), "steps must be at least 1"),
        (partial(carlini_l2, confidence=-1.0), "confidence"),
        (partial(carlini_l2, region=torch.full((1, 1, 8, 8), 0.5)), "mask of 0 and 1"),
        (partial(ddn, steps=0), "steps must be at least 1"),
        (partial(ddn, initial_eps=-1.0), "initial_eps must be positive"),
        (partial(ddn, gamma=2.0), "gamma must lie between 0 and 1"),
        (partial(fmn, step_size=0.0), "step_size must be positive"),
        (partial(sigma_zero, sigma=0.0), "sigma must be positive"),
        (partial(carlini_linf, decrease=1.0), "decrease must lie between 0 and 1"),
        (partial(strongest, eps=0.1, steps=0), "steps must be at least 1"),
        (partial(strongest, eps=0.1, queries=0), "queries must be at least 1"),
        (partial(pgd, eps=8), "write 8 levels of 255 as 8 / 255"),
        (partial(pgd, eps="0.1"), "eps must be a number"),
        (partial(pgd, eps=0.1, region="centre"), "a region is a tensor"),
        (partial(transfer, surrogate=linear(4, 64, 4), attack=partial(pgd, eps=0.1)), "the surrogate has 4 classes"),
        (partial(fmn, norm="l5"), "unknown norm"),
        (partial(strongest, norm="l7", eps=1.0), "unknown norm"),
        (partial(strongest, eps=-1.0), "negative"),
        (partial(normalized_gradient, goal=Target(1), step_size=0.0), "positive"),
    ],
)
def test_bad_input_ends_at_the_boundary(attack, said):
    with pytest.raises(DemurError, match=said):
        attack(linear(3, 64, 3), images_of(3), torch.tensor([0, 2, 0]))


def test_a_result_prints_as_one_line():
    result = pgd(linear(3, 64, 3), images_of(3), torch.tensor([0, 1, 2]), eps=0.1)
    assert len(repr(result).splitlines()) == 1 and "of 3 found" in repr(result)
    assert replace(result).found is result.found


def test_a_stand_in_with_weights_works_inside_a_network_in_half_precision():
    """The backward pass meets what the forward pass met, autocast and all."""
    inner = torch.nn.Conv2d(2, 2, 3, padding=1)
    part = StraightThrough(lambda images: inner(images.round(decimals=1)), inner)
    classifier = Classifier(torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), part, torch.nn.Flatten(), torch.nn.Linear(72, 3)), 3)
    images = images_of(4)
    result = pgd(classifier, images, classifier.predict(images), eps=0.5, steps=10, precision="bfloat16")
    assert int(result.flat.sum()) == 0


def test_carlini_begins_within_reach_where_a_softmax_saturates():
    """A constant that is right for a linear margin is of no use where there is hardly a gradient."""
    plain, images = linear(3, 64, 3), images_of(6)
    plain.module.weights.data.mul_(2)
    soft = Classifier(torch.nn.Sequential(plain.module, torch.nn.Softmax(1)), 3)
    labels = plain.predict(images)
    result = carlini_l2(soft, images, labels, steps=100, precision="float32")
    reference = ddn(soft, images, labels, precision="float32")
    assert result.found.all()
    assert float(result.distance.median()) <= 1.1 * float(reference.distance.median())  # 1.23 from an unlimited constant
