"""How strong the attacks are, against what can be computed: the nearest error of a linear
classifier inside the box, in every norm.
"""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from demur import Classifier, DemurError, ThreatModel, black_box, outcomes
from demur.attacks import (
    APGD,
    BPDA,
    DDN,
    FGM,
    FGSM,
    FMN,
    PGD,
    AnyError,
    CarliniWagnerL0,
    CarliniWagnerL2,
    CarliniWagnerLinf,
    Evade,
    ForceReject,
    NormalizedGradient,
    RandomNoise,
    SigmaZero,
    Square,
    Strongest,
    Target,
    Transfer,
    WithWiderKernels,
    expectation_over_transformation,
    sizes,
)
from models import Constant, Linear, convolutional, images_of, linear

EXACT = {"precision": "float32"}


def two_classes(seed, pixels=64, channels=1, levels=255, count=6):
    """A linear classifier of two classes, images, labels, and the margins and weights behind."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(2, pixels * channels, generator=generator)
    size = int(pixels**0.5)
    images = images_of(count, channels, size, seed, levels)
    scores = images.flatten(1) @ weights.T
    # A bias in the widest gap between images: both classes occur and no image is nearly undecided.
    gaps = (scores[:, 0] - scores[:, 1]).sort().values
    widest = int(gaps.diff().argmax())
    bias = torch.tensor([0.0, float(gaps[widest : widest + 2].mean())])
    classifier = Classifier(Linear(weights, bias), 2)
    labels = classifier.predict(images)
    scores = classifier(images).detach()
    margins = scores.gather(1, labels[:, None]) - scores.gather(1, 1 - labels[:, None])
    slope = torch.stack([weights[1 - y] - weights[y] for y in labels.tolist()])
    return classifier, images, labels, margins.flatten().double(), slope.double()


def nearest_error(norm, images, margins, slope):
    """The smallest change in the norm that makes up for the margin within [0, 1]: exact, image by
    image (each is a knapsack).
    """
    found = []
    for image, margin, weights in zip(images.flatten(1).double(), margins, slope, strict=True):
        gain = weights.abs()
        room = torch.where(weights > 0, 1 - image, image)
        if norm == "l1":
            order = gain.argsort(descending=True)
            gains = gain[order]
            rooms = room[order]
            before = torch.cat([torch.zeros(1, dtype=torch.float64), (gains * rooms).cumsum(0)])
            last = int((before <= margin).sum()) - 1
            found.append(float(rooms[:last].sum() + (margin - before[last]) / gains[last]))
        elif norm == "l0":
            reached = (gain * room).sort(descending=True).values.cumsum(0)
            found.append(int((reached < margin).sum()) + 1)
        else:
            low = 0.0
            high = 1e3
            scale = gain if norm == "l2" else torch.ones_like(gain)
            for _ in range(100):
                middle = (low + high) / 2
                change = torch.minimum(middle * scale, room)
                short = float((change * gain).sum()) < margin
                low, high = (middle, high) if short else (low, middle)
            found.append(float(change.norm() if norm == "l2" else change.max()))
    return torch.tensor(found, dtype=torch.float64)


SMALLEST = {
    "carlini_wagner l2": ("l2", CarliniWagnerL2(steps=200)),
    "carlini_wagner linf": (
        "linf",
        CarliniWagnerLinf(steps=300, learning_rate=0.01, initial_const=0.01, decrease=0.985),
    ),
    "ddn": ("l2", DDN(steps=200)),
    "fmn l2": ("l2", FMN(steps=300)),
    "fmn linf": ("linf", FMN(steps=300)),
    "fmn l1": ("l1", FMN(steps=500)),
}


@pytest.mark.parametrize("levels", [255, 1])
@pytest.mark.parametrize("name", SMALLEST)
def test_the_smallest_change_of_a_linear_classifier_is_found_within_2_percent(name, levels):
    """R7, R8: inside the box too, and on binary images, whose pixels all lie on its bounds."""
    norm, attack = SMALLEST[name]
    classifier, images, labels, margins, slope = two_classes(1, levels=levels)
    result = attack(classifier, images, labels, norm, **EXACT)
    exact = nearest_error(norm, images, margins, slope)
    assert result.success.all()
    assert torch.equal(classifier.predict(result.images), 1 - labels)
    assert bool((result.distance >= exact * (1 - 1e-4)).all()), (result.distance / exact).tolist()
    assert bool((result.distance <= exact * 1.02 + 1e-6).all()), (result.distance / exact).tolist()


def nearest_scaled(images, margins, slope, mask):
    """The smallest eps that makes up for the margin where a mask scales eps pixel by pixel."""
    found = []
    for image, margin, weights in zip(images.flatten(1).double(), margins, slope, strict=True):
        room = torch.where(weights > 0, 1 - image, image)
        low = 0.0
        high = 1e3
        for _ in range(100):
            middle = (low + high) / 2
            change = torch.minimum(middle * mask.flatten().double(), room)
            short = float((change * weights.abs()).sum()) < margin
            low, high = (middle, high) if short else (low, middle)
        found.append(high)
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize("least", [0.05, 0.5])
@pytest.mark.parametrize("attack", [FMN(steps=30), FMN()])
def test_a_mask_that_scales_eps_leads_to_the_nearest_error_of_a_linear_classifier(attack, least):
    """R8: each pixel moves by its share of eps, and eps may be above 1."""
    classifier = linear(5, 64, 5)
    images = 0.25 + images_of(20) / 2
    draws = torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    mask = least + (1 - least) * draws
    labels, nearest = among_classes(
        classifier, images, lambda margins, slope: nearest_scaled(images, margins, slope, mask)
    )
    result = attack(classifier, images, labels, ThreatModel("linf", mask=mask), **EXACT)
    assert result.success.all()
    ratio = result.distance / nearest
    assert float(ratio.min()) >= 1 - 1e-4
    assert float(ratio.max()) <= 1.02, ratio.sort().values.tolist()


def among_classes(classifier, images, nearest_of):
    """The labels of a linear classifier of five classes, and the distance to the nearest error."""
    labels = classifier.predict(images)
    scores = classifier(images).detach().double()
    weights = classifier.module.weights.detach().double()
    nearest = torch.full((len(images),), torch.inf, dtype=torch.float64)
    for other in range(5):
        margins = scores.gather(1, labels[:, None]).flatten() - scores[:, other]
        to_other = nearest_of(margins, weights[other] - weights[labels])
        nearest = torch.where(labels == other, nearest, nearest.minimum(to_other))
    return labels, nearest


@pytest.mark.parametrize("attack", [DDN(), DDN(steps=200), FMN(), FMN(steps=200)])
def test_the_smallest_change_among_five_classes_is_found_within_2_percent(attack):
    """R7, R8: the gradient of the cross-entropy mixes the classes; the nearest error is that of one
    class.
    """
    classifier = linear(5, 64, 5)
    images = 0.25 + images_of(40) / 2
    labels, nearest = among_classes(
        classifier, images, lambda margins, slope: nearest_error("l2", images, margins, slope)
    )
    result = attack(classifier, images, labels, "l2", **EXACT)
    assert result.success.all()
    ratio = result.distance / nearest
    assert float(ratio.min()) >= 1 - 1e-4
    assert float(ratio.max()) <= 1.02, ratio.sort().values.tolist()


@pytest.mark.parametrize(
    "attack", [SigmaZero(steps=500), CarliniWagnerL0(steps=100), FMN(steps=300)]
)
@pytest.mark.slow
def test_the_fewest_pixels_of_a_linear_classifier_are_found_up_to_one(attack):
    """R8 in L0: the pixels with the largest gain within the box."""
    classifier, images, labels, margins, slope = two_classes(2)
    result = attack(classifier, images, labels, "l0", **EXACT)
    exact = nearest_error("l0", images, margins, slope)
    assert result.success.all()
    assert bool((result.distance >= exact).all())
    assert bool((result.distance <= exact + 1).all()), (result.distance, exact)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("loss", ["margin", "cross_entropy"])
def test_pgd_finds_errors_just_beyond_the_exact_distance_and_none_before(norm, loss):
    """R8, R12: within 2 % of the analytic distance, on both sides."""
    classifier, images, labels, margins, slope = two_classes(3)
    exact = nearest_error(norm, images, margins, slope)
    beyond = ThreatModel(norm, 1.02 * exact)
    before = ThreatModel(norm, 0.98 * exact)
    attack = PGD(steps=200, loss=loss)
    assert attack(classifier, images, labels, beyond, **EXACT).success.all()
    assert not attack(classifier, images, labels, before, **EXACT).success.any()
    if norm != "l1":
        assert APGD(loss=loss)(classifier, images, labels, beyond, **EXACT).success.all()


@pytest.mark.parametrize(("norm", "step"), [("linf", FGSM()), ("l2", FGM())])
def test_one_step_of_pgd_is_the_fast_gradient(norm, step):
    """R2."""
    classifier = convolutional(4)
    images = images_of(9)
    labels = classifier.predict(images)
    threat = ThreatModel(norm, 0.1)
    one = PGD(steps=1, step_size=0.1)(classifier, images, labels, threat, **EXACT)
    other = step(classifier, images, labels, threat)
    assert torch.equal(one.success, other.success)
    moved = one.success | (sizes(images, one.candidates)["linf"] > 0)
    assert torch.allclose(one.candidates[moved], other.candidates[moved], atol=1e-6)


@pytest.mark.parametrize(
    ("norm", "scale"), [("linf", 1.0), ("l2", 8.0), ("l1", 64.0), ("l0", 64.0)]
)
def test_a_larger_eps_breaks_no_less_and_an_unbounded_one_breaks_all(norm, scale):
    """R12."""
    classifier = linear(3, 64, 3)
    images = images_of(12)
    labels = classifier.predict(images)
    attack = Strongest(steps=20, n_queries=20)
    every_eps = [0.0, 0.05 * scale, 0.2 * scale, torch.inf]
    results = attack.sweep(classifier, images, labels, norm, eps=every_eps, **EXACT)
    for less, more in pairwise(results):
        assert bool((more.success | ~less.success).all())
    assert not results[0].success.any()
    assert results[-1].success.all()


@pytest.mark.parametrize(
    ("attack", "threat"),
    [
        (PGD(steps=10), "linf:0.2"),
        (DDN(), "l2"),
        (CarliniWagnerL2(steps=100), "l2"),
        (APGD(steps=10), "linf:0.2"),
    ],
)
def test_a_constant_added_to_all_scores_changes_nothing(attack, threat):
    """R6: masking by a factor of 0 would make -50 the best class."""
    weights = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    images = images_of(8)
    plain, shifted = (
        Classifier(Linear(weights, torch.full((3,), bias)), 3) for bias in (0.0, -50.0)
    )
    labels = plain.predict(images)
    one = attack(plain, images, labels, threat, **EXACT)
    other = attack(shifted, images, labels, threat, **EXACT)
    assert torch.equal(one.success, other.success)
    assert torch.allclose(one.distance, other.distance, rtol=1e-2)


@pytest.mark.parametrize("attack", [DDN(), FMN()])
def test_a_large_constant_added_to_all_scores_changes_no_distance_by_a_percent(attack):
    """R6: what counts as a clear success follows the spread of the scores, not their size."""
    classifier, images, labels, _, _ = two_classes(1)
    with torch.no_grad():
        for parameter in classifier.parameters():
            parameter *= 0.02
    plain = attack(classifier, images, labels, "l2", **EXACT)
    with torch.no_grad():
        classifier.module.bias += 100
    shifted = attack(classifier, images, labels, "l2", **EXACT)
    assert shifted.success.all()
    assert torch.allclose(plain.distance, shifted.distance, rtol=1e-2)


@pytest.mark.slow
def test_confidence_is_in_the_loss_and_in_the_success():
    """R7."""
    classifier, images, labels, _, _ = two_classes(5)
    near, sure = (
        CarliniWagnerL2(confidence=kappa, steps=100)(classifier, images, labels, "l2", **EXACT)
        for kappa in (0.0, 5.0)
    )
    margin = Evade().margin(classifier(sure.images), labels, 2)
    assert sure.success.all()
    assert bool((margin >= 5.0).all())
    assert bool((margin < 5.5).all())
    assert bool((sure.distance > near.distance).all())


@pytest.mark.slow
def test_carlini_wagner_reaches_the_target():
    classifier = linear(4, 64, 4)
    images = images_of(8)
    labels = classifier.predict(images)
    targets = (labels + 2) % 4
    attack = CarliniWagnerL2(steps=100)
    threat = ThreatModel("l2", goal=Target(targets))
    targeted = attack(classifier, images, labels, threat, **EXACT)
    free = attack(classifier, images, labels, "l2", **EXACT)
    assert targeted.success.all()
    assert torch.equal(classifier.predict(targeted.images), targets)
    assert bool((targeted.distance >= free.distance * 0.99).all())


def test_a_mask_confines_the_search_and_costs_distance():
    classifier, images, labels, margins, slope = two_classes(6)
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., :6] = 1
    inside = nearest_error("l2", images, margins, slope * mask.flatten())
    for attack in (DDN(steps=200), CarliniWagnerL2(steps=100)):
        result = attack(classifier, images, labels, ThreatModel("l2", mask=mask), **EXACT)
        assert torch.equal((result.images - images) * (1 - mask), torch.zeros_like(images))
        assert bool((result.distance <= inside * 1.02).all())


def test_a_step_of_the_normalized_gradient_has_its_length_and_it_stops_at_the_goal():
    """The listing of the smoothing paper takes one step too many, and divides by the length of the
    gradient of the whole batch.
    """
    weights = torch.tensor([[3.0, 4.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    images = torch.full((2, 1, 2, 2), 0.5)
    labels = torch.tensor([0, 0])
    # The margin is 1.25: at a slope of 5, that is a length of .25.
    classifier = Classifier(Linear(weights, torch.tensor([0.0, 2.25])), 2)
    threat = ThreatModel("l2", goal=Target(1))
    result = NormalizedGradient(step_size=0.1)(classifier, images, labels, threat, **EXACT)
    assert result.success.all()
    expected = torch.full((2,), 0.3, dtype=torch.float64)
    assert torch.allclose(result.distance, expected, atol=1e-5)
    assert result.forwards.tolist() == [4, 4]  # three steps, and the test that ends them
    attack = NormalizedGradient(step_size=0.1, steps=2)
    short = attack(classifier, images, labels, threat, **EXACT)
    assert not short.success.any()
    assert torch.equal(short.images, images)


def test_the_hinge_raises_the_runner_up():
    """Sec. 2.5.2 of the rejection paper: the raised class is fixed on the clean image."""
    classifier = linear(3, 64, 3)
    images = images_of(6)
    labels = classifier.predict(images)
    attack = PGD(steps=50, loss="hinge")
    assert attack(classifier, images, labels, "linf:0.5", **EXACT).success.all()
    scores = classifier.scores(images)
    second = scores.argsort(1)[:, 1]
    plain = attack(classifier, images, labels, "linf:0.05", **EXACT)
    named = attack(classifier, images, labels, "linf:0.05", toward=second, **EXACT)
    assert torch.equal(plain.candidates, named.candidates)


def test_toward_chooses_which_class_an_untargeted_attack_raises():
    classifier = linear(4, 64, 4)
    images = images_of(8)
    labels = classifier.predict(images)
    toward = (labels + 1) % 4
    attack = PGD(steps=30, keep_maximizing=True)
    free = attack(classifier, images, labels, "linf:0.2", **EXACT)
    aimed = attack(classifier, images, labels, "linf:0.2", toward=toward, **EXACT)
    reached = [
        Target(toward).margin(classifier.scores(one.candidates), labels, 4) for one in (free, aimed)
    ]
    assert bool((reached[1] >= reached[0] - 1e-4).all())
    assert bool((reached[1] > reached[0] + 1).any())
    wrong = classifier.predict(aimed.candidates) != labels
    assert torch.equal(aimed.success, wrong)  # every wrong class counts, not only this one
    for bad, said in (
        (toward[:3], "toward must be one integer column"),
        (toward.float(), "toward must be one integer column"),
        (toward.tolist(), "toward must be one integer column .* not list"),
        (torch.full((8,), 4), r"toward must lie in 0\.\.3"),
        (torch.full((8,), -1), r"toward must lie in 0\.\.3"),
        (labels, r"toward names a column that Evade\(\) does not want"),
    ):
        with pytest.raises(DemurError, match=said):
            attack(classifier, images, labels, "linf:0.2", toward=bad)


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
    ("attack", "threat"),
    [
        (PGD(steps=20), "linf:0.3"),
        (APGD(steps=20), "linf:0.3"),
        (Strongest(steps=20, n_queries=50), "linf:0.3"),
        (DDN(), "l2"),
        (FMN(), "l2"),
        (CarliniWagnerL2(steps=100), "l2"),
        (Square(n_queries=100), "linf:0.3"),
    ],
)
def test_success_never_counts_a_rejected_image_and_force_reject_never_an_accepted_one(
    attack, threat
):
    """R18, R19: with a threshold that rejects some clean images."""
    classifier = _with_threshold(6.0)
    images = images_of(12)
    labels = torch.arange(12) % 3
    threat = ThreatModel.parse(threat)
    evaded = attack(classifier, images, labels, threat)
    assert evaded.success.any()
    decided = classifier.predict(evaded.images)
    assert bool(((decided != -1) & (decided != labels))[evaded.success].all())
    rejected = attack(classifier, images, labels, replace(threat, goal=ForceReject()))
    assert bool((classifier.predict(rejected.images)[rejected.success] == -1).all())
    anyhow = attack(classifier, images, labels, replace(threat, goal=AnyError()))
    assert bool((outcomes(classifier, anyhow.images, labels)[anyhow.success] != 0).all())


@pytest.mark.slow
def test_the_ensemble_is_no_weaker_than_its_parts_and_names_them():
    """R11, R13, R18."""
    classifier = convolutional(4, size=8, seed=3)
    images = images_of(24, seed=3)
    labels = classifier.predict(images)
    whole = Strongest(steps=30, n_queries=200)
    parts = [PGD(), APGD(), Square(n_queries=200), RandomNoise(draws=20)]
    for threat in ("linf:0.03", "l2:0.25"):
        result = whole(classifier, images, labels, threat)
        for part in parts:
            alone = part(classifier, images, labels, threat)
            assert bool((result.success | ~alone.success).all())
        assert [bool(name) for name in result.by] == result.success.tolist()
        assert torch.equal(outcomes(classifier, result.images, labels) == 2, result.success)
    closest = Strongest(steps=30)(classifier, images, labels, "l2")
    alone = DDN(steps=60)(classifier, images, labels, "l2")
    assert bool((closest.distance <= alone.distance * 1.001).all())
    members = Strongest(steps=30).attacks_for("l2", classifier, images)
    assert set(closest.by) <= {repr(member) for member in members}


def test_the_ensemble_takes_vectors_of_which_some_withstand():
    """Vectors have no squares, so the score-based member is left out."""
    classifier = linear(3, 12, 3)
    vectors = torch.rand(8, 12, generator=torch.Generator().manual_seed(0))
    labels = classifier.predict(vectors)
    attack = Strongest(steps=10)
    result = attack(classifier, vectors, labels, "linf:0.05")
    assert not result.success.all()
    names = {repr(member) for member in attack.attacks_for("linf:0.05", classifier, vectors)}
    assert names == {
        "PGD(steps=1)",
        "PGD(steps=10)",
        "APGD(steps=10)",
        "APGD(steps=10, loss='cross_entropy')",
        "APGD(steps=10, n_targets=9, give_up=True, tries=3)",
        "APGD(steps=10, n_targets=9, loss='scaled_margin', give_up=True, tries=3)",
        "FMN(steps=10)",
    }
    assert set(result.by) <= {"", *names}


@pytest.mark.parametrize(
    ("attack", "threat"),
    [
        (PGD(steps=20), "linf:0.02"),
        (APGD(steps=20), "linf:0.02"),
        (DDN(), "l2"),
        (FMN(), "l2"),
        (CarliniWagnerL2(steps=60), "l2"),
    ],
)
def test_bfloat16_gradients_never_decide_what_is_reported(attack, threat):
    """Decisions are made in float32, whatever the precision of the gradients."""
    classifier = convolutional(4, size=8, seed=1)
    images = images_of(30, seed=1)
    labels = classifier.predict(images)
    half, single = (
        attack(classifier, images, labels, threat, precision=precision)
        for precision in ("bfloat16", "float32")
    )
    assert torch.equal(outcomes(classifier, half.images, labels) == 2, half.success)
    assert abs(int(half.success.sum()) - int(single.success.sum())) <= 1
    both = half.success & single.success
    if threat == "l2":
        ratio = float((half.distance / single.distance)[both].median())
        wagner = isinstance(attack, CarliniWagnerL2)
        assert ratio == pytest.approx(1, abs=0.01 if wagner else 0.05)


def test_a_black_box_is_attacked_by_its_scores_and_by_way_of_a_surrogate():
    plain = linear(3, 64, 3)
    images = images_of(10)
    weights = plain.module.weights.detach().numpy()
    asked = []

    def endpoint(batch):
        assert batch.dtype == np.float32
        assert batch.shape[1:] == (1, 8, 8)
        asked.append(len(batch))
        return batch.reshape(len(batch), -1) @ weights.T

    box = black_box(endpoint, 3)
    labels = plain.predict(images)
    assert torch.equal(box.predict(images), labels)
    for attack, threat in (
        (PGD(), "linf:0.1"),
        (FGSM(), "linf:0.1"),
        (DDN(), "l2"),
        (CarliniWagnerL2(steps=10), "l2"),
        (APGD(), "linf:0.1"),
    ):
        with pytest.raises(DemurError, match="gives no gradient"):
            attack(box, images, labels, threat)
    searched = Square(n_queries=300)(box, images, labels, "linf:0.2")
    assert searched.success.all()
    assert bool((box.predict(searched.images) != labels).all())
    assert not searched.backwards.any()
    ensemble = Strongest(n_queries=300)
    assert set(ensemble(box, images, labels, "linf:0.2").by) == {"Square(n_queries=300)"}
    for threat in ("l1:3", "l0:3", "l2", "linf"):
        with pytest.raises(DemurError, match="no gradient"):
            ensemble(box, images, labels, threat)
    moved = Transfer(PGD())(box, images, labels, "linf:0.2", surrogate=plain)
    assert moved.success.all()
    assert not moved.backwards.any()
    assert bool((moved.forwards <= 2).all())
    measured = Transfer(DDN(steps=50))(box, images, labels, "l2", surrogate=plain)
    assert torch.equal(
        measured.distance[measured.success],
        sizes(images, measured.images)["l2"][measured.success],
    )
    with pytest.raises(DemurError, match="one row of numbers for each"):
        black_box(lambda batch: np.zeros((1, 3)), 3).predict(images)


def test_transfer_reports_the_classifier_and_not_the_surrogate():
    never = Classifier(Constant([5.0, 0.0, 0.0]), 3)
    surrogate = linear(3, 64, 3)
    images = images_of(6)
    labels = torch.zeros(6, dtype=torch.int64)
    result = Transfer(PGD())(never, images, labels, "linf:0.3", surrogate=surrogate)
    assert not result.success.any()
    assert torch.equal(result.images, images)
    sent = PGD()(surrogate, images, labels, "linf:0.3").candidates
    assert torch.equal(result.candidates, sent)


def test_bpda_gives_gradients_where_the_module_has_none_and_leaves_the_answers_alone():
    """R24 in small: rounding to 4 levels has a gradient of 0 everywhere."""

    def rounded(images):
        return (images * 3).round() / 3

    class Rounded(nn.Module):
        def __init__(self, front):
            super().__init__()
            self.front = front
            self.plain = linear(3, 64, 3)

        def forward(self, images):
            return self.plain(self.front(images))

    defended = Classifier(Rounded(rounded), 3)
    attacked = Classifier(Rounded(BPDA(rounded)), 3)
    images = images_of(10)
    labels = defended.predict(images)
    assert torch.equal(defended(images), attacked(images))
    blind, seeing = (
        PGD(steps=20)(classifier, images, labels, "linf:0.2") for classifier in (defended, attacked)
    )
    assert not blind.success.any()
    assert bool((blind.zero_gradients == blind.backwards).all())  # R14: the blindness is visible
    assert seeing.success.all()
    assert bool((defended.predict(seeing.images) != labels).all())


def test_a_given_stand_in_is_differentiated():
    through = BPDA(torch.round, lambda images: images**2)
    images = torch.tensor([[0.3, 0.8]], requires_grad=True)
    (gradient,) = torch.autograd.grad(through(images).sum(), images)
    assert through(images).tolist() == [[0.0, 1.0]]
    assert torch.allclose(gradient, 2 * images)


class Noisy(nn.Module):
    """A linear classifier behind noise so strong that one draw says little."""

    def __init__(self, spread):
        super().__init__()
        self.plain = linear(3, 64, 3)
        self.spread = spread

    def forward(self, images):
        return self.plain(images) + self.spread * torch.randn(len(images), 3)


def test_an_expectation_averages_the_draws_of_a_randomised_classifier():
    """R15: the mean over draws is nearer to the truth; an attack on it repeats with its seed."""
    noisy = Classifier(Noisy(3.0), 3)
    images = images_of(200)
    exact = noisy.module.plain(images)
    torch.manual_seed(0)
    one, many = (
        (expectation_over_transformation(noisy, draws)(images) - exact).std() for draws in (1, 25)
    )
    assert float((one / many).detach()) == pytest.approx(5, rel=0.2)
    labels = noisy.module.plain.predict(images)[:20]
    mean = expectation_over_transformation(noisy, 8)
    torch.manual_seed(1)
    before = PGD(steps=10)(mean, images[:20], labels, "linf:0.1", seed=3)
    torch.manual_seed(2)
    again = PGD(steps=10)(mean, images[:20], labels, "linf:0.1", seed=3)
    assert torch.equal(before.images, again.images)
    with pytest.raises(DemurError, match="at least one draw"):
        expectation_over_transformation(noisy, 0)


class Ridge(nn.Module):
    """Score .5, and a second score with its peak at x = .49; at .5 it is .5002."""

    def forward(self, images):
        x = images.flatten(1)
        second = 0.5012 - 0.1 * (x - 0.49).abs()
        # A product, so that autocast rounds: bfloat16 holds .5 for both scores at x = .5.
        both = torch.cat([torch.full_like(x, 0.5), second], 1)
        return nn.functional.linear(both, torch.eye(2))


def test_a_narrow_success_that_bfloat16_rounds_away_is_found():
    image, label = torch.full((1, 1, 1, 1), 0.4), torch.tensor([0])
    for precision in ("float32", "bfloat16"):
        # The steps go .4, .45, .5, .45, .5, .45: the last point is no success.
        attack = PGD(steps=5, step_size=0.05)
        result = attack(Classifier(Ridge(), 2), image, label, "linf:0.1", precision=precision)
        assert bool(result.success), precision
        assert float(result.images) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: PGD(steps=0), "steps must be at least 1"),
        (lambda: PGD(restarts=0), "restarts must be at least 1"),
        (lambda: PGD(step_size=-1.0), "step_size must be positive"),
        (lambda: PGD(loss="magrin"), "Did you mean 'margin'"),
        (lambda: FGSM(loss="dlr"), "unknown loss"),
        (lambda: APGD(n_targets=-1), "n_targets must be at least 0"),
        (lambda: PGD(steps=10.0), r"steps must be an integer, not 10\.0"),
        (lambda: PGD(steps="10"), "steps must be an integer, not '10'"),
        (lambda: PGD(steps=float("nan")), "steps must be an integer, not nan"),
        (lambda: PGD(restarts=True), "restarts must be an integer, not True"),
        (lambda: PGD(step_size="1"), "step_size must be positive"),
        (lambda: PGD(tolerance=-1.0), "tolerance must be finite and not negative"),
        (lambda: CarliniWagnerL0(initial_const=1e7), "initial_const must be at most largest_const"),
        (
            lambda: CarliniWagnerLinf(initial_const=25.0),
            "initial_const must be at most largest_const, 20, not 25",
        ),
        (lambda: WithWiderKernels("PGD", 0.5), "WithWiderKernels takes an attack"),
        (lambda: APGD(n_targets=3, loss="cross_entropy"), "targeted APGD climbs the margin"),
        (lambda: RandomNoise(draws=0), "draws must be at least 1"),
        (lambda: Square(n_queries=0), "n_queries must be at least 1"),
        (lambda: Square(initial_share=0.0), r"initial_share must lie in \(0, 1\]"),
        (lambda: CarliniWagnerL2(steps=0), "steps must be at least 1"),
        (lambda: CarliniWagnerL2(confidence=-1.0), "confidence"),
        (lambda: CarliniWagnerLinf(decrease=1.0), "decrease must lie between 0 and 1"),
        (lambda: CarliniWagnerL0(largest_const=0.0), "largest_const must be positive"),
        (lambda: DDN(steps=0), "steps must be at least 1"),
        (lambda: DDN(initial_eps=-1.0), "initial_eps must be positive"),
        (lambda: DDN(gamma=2.0), "gamma must lie between 0 and 1"),
        (lambda: FMN(step_size=0.0), "step_size must be positive"),
        (lambda: SigmaZero(sigma=0.0), "sigma must be positive"),
        (lambda: Strongest(steps=0), "steps must be at least 1"),
        (lambda: Strongest(n_queries=0), "n_queries must be at least 1"),
        (lambda: NormalizedGradient(step_size=0.0), "step_size must be positive"),
        (lambda: Transfer("PGD"), "Transfer takes an attack"),
    ],
)
def test_hyperparameters_out_of_range_are_refused_at_once(make, said):
    with pytest.raises(DemurError, match=said):
        make()


@pytest.mark.parametrize(
    ("attack", "threat", "options", "said"),
    [
        (PGD(), "l3:0.1", {}, "unknown norm"),
        (FMN(), "l5", {}, "unknown norm"),
        (Strongest(), "l7:1", {}, "unknown norm"),
        (Strongest(), "linf:-1", {}, "negative"),
        (PGD(), "linf:8", {}, "write 8 levels of 255 as 8 / 255"),
        (PGD(), "linf:a", {}, "not a threat model"),
        (PGD(), "linf:0.1", {"precision": "float16"}, "unknown precision"),
        (PGD(), "linf:0.1", {"starting_points": torch.zeros(2, 1, 8, 8)}, "have shape"),
        (PGD(), "linf:0.1", {"starting_points": [images_of(3)]}, "must be one tensor"),
        (PGD(), "linf:0.1", {"seed": None}, "seed must be an integer, not None"),
        (PGD(), "linf:0.1", {"batch_size": 2.5}, "batch_size must be an integer"),
        (FGSM(), "linf:0.1", {"starting_points": images_of(3)}, "FGSM takes no starting points"),
        (DDN(), "l2", {"starting_points": images_of(3)}, "PGD, APGD and FMN take them"),
        (Square(), "linf:0.1", {"starting_points": images_of(3)}, "takes no starting points"),
        (SigmaZero(), "l0", {"starting_points": images_of(3)}, "takes no starting points"),
        (APGD(), "l1:0.1", {}, "works in linf and l2, not 'l1'. Use PGD"),
        (Square(), "l0:1", {}, "linf and l2"),
        (FGSM(), "l2:1", {}, "Use FGM"),
        (FGM(), "linf:0.1", {}, "Use FGSM"),
        (DDN(), "linf", {}, "works in l2"),
        (SigmaZero(), "l2", {}, "works in l0"),
        (
            Transfer(PGD()),
            "linf:0.1",
            {"surrogate": linear(4, 64, 4)},
            "the surrogate has 4 classes",
        ),
        (Transfer(PGD()), "linf:0.1", {}, "pass surrogate="),
        (Transfer(PGD()), "linf:0.1", {"surrogate": nn.Flatten()}, "Wrap it: Classifier"),
    ],
)
def test_bad_input_ends_at_the_boundary(attack, threat, options, said):
    with pytest.raises(DemurError, match=said):
        attack(linear(3, 64, 3), images_of(3), torch.tensor([0, 2, 0]), threat, **options)


@pytest.mark.parametrize(
    ("attack", "options", "said"),
    [
        (PGD(), {"norm": "linf", "eps": "0.1"}, "eps must be a number"),
        (PGD(), {"norm": "linf", "eps": 0.1, "mask": "centre"}, "a mask is a tensor"),
        (PGD(), {"norm": "linf", "eps": 0.1, "goal": "evade"}, "a goal is Evade"),
        (PGD(), {"norm": "linf", "eps": 0.1, "goal": Evade}, "a goal is Evade"),
        (
            CarliniWagnerL2(),
            {"norm": "l2", "mask": torch.full((1, 1, 8, 8), 0.5)},
            "mask must be 0 or 1",
        ),
        (
            Strongest(),
            {"norm": "l2", "eps": 1.0, "mask": torch.full((1, 1, 8, 8), 0.5)},
            "mask must be 0 or 1",
        ),
    ],
)
def test_threats_that_do_not_fit_are_refused(attack, options, said):
    with pytest.raises(DemurError, match=said):
        threat = ThreatModel(**options)
        attack(linear(3, 64, 3), images_of(3), torch.tensor([0, 2, 0]), threat)


def test_a_result_prints_as_one_line():
    result = PGD()(linear(3, 64, 3), images_of(3), torch.tensor([0, 1, 2]), "linf:0.1")
    assert len(repr(result).splitlines()) == 1
    assert "of 3 succeeded" in repr(result)
    assert replace(result).success is result.success


def test_a_stand_in_with_weights_works_inside_a_network_in_half_precision():
    """The backward pass runs under the autocast of the forward pass."""
    inner = torch.nn.Conv2d(2, 2, 3, padding=1)
    part = BPDA(lambda images: inner(images.round(decimals=1)), inner)
    classifier = Classifier(
        torch.nn.Sequential(
            torch.nn.Conv2d(1, 2, 3), part, torch.nn.Flatten(), torch.nn.Linear(72, 3)
        ),
        3,
    )
    images = images_of(4)
    labels = classifier.predict(images)
    result = PGD(steps=10)(classifier, images, labels, "linf:0.5", precision="bfloat16")
    assert int(result.zero_gradients.sum()) == 0


def test_carlini_wagner_begins_within_reach_where_a_softmax_saturates():
    """A constant for a linear margin is useless where the gradient nearly vanishes."""
    plain = linear(3, 64, 3)
    images = images_of(6)
    plain.module.weights.data.mul_(2)
    soft = Classifier(torch.nn.Sequential(plain.module, torch.nn.Softmax(1)), 3)
    labels = plain.predict(images)
    with pytest.warns(UserWarning, match="look like probabilities"):
        result = CarliniWagnerL2(steps=100)(soft, images, labels, "l2", **EXACT)
        reference = DDN()(soft, images, labels, "l2", **EXACT)
    assert result.success.all()
    # The ratio is 1.23 with an unlimited constant.
    assert float(result.distance.median()) <= 1.1 * float(reference.distance.median())
