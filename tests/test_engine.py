"""What every attack holds to (R1-R6, R9, R10), whatever the attack does."""

import dataclasses
import warnings
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from demur import Classifier, DemurError, DemurWarning, ThreatModel, black_box, outcomes
from demur.attacks import (
    APGD,
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
    KernelMachine,
    NormalizedGradient,
    RandomNoise,
    SearchAttack,
    SigmaZero,
    Square,
    Strongest,
    Target,
    sizes,
)
from demur.masks import inside_box
from demur.norms import BALLS
from demur.progress import Silent, reporting
from models import Constant, Linear, convolutional, images_of, linear

EXACT = {"precision": "float32"}
CLASSES = 3


@dataclass(frozen=True, repr=False)
class Ascend(SearchAttack):
    """An attack with a random start and a state that shrinks, written with the public state."""

    steps: int = 5
    restarts: int = 1

    def search(self, state):
        current = state.random_start()
        seen = state.images.clone()
        for _ in range(self.steps):
            gradient = state.value_and_gradient(current).gradient
            current, seen, gradient = state.drop_solved(current, seen, gradient)
            if not len(current):
                return
            assert torch.equal(seen, state.images)  # rows of the state stay with their images
            reach = state.ball.eps.reshape(-1, 1, 1, 1).to(current)
            step = state.ball.steepest_step(gradient)
            current = state.ball.project(current + 0.4 * reach * step)
        state.evaluate(current)


def wagner(kind, **options):
    return kind(steps=20, learning_rate=0.1, **options)


# Each attack with its norm, and whether the test gives it an eps or asks for the smallest change.
ATTACKS = {
    "fgsm": ("linf", FGSM(), True),
    "fgm": ("l2", FGM(), True),
    **{f"noise {norm}": (norm, RandomNoise(draws=3), True) for norm in BALLS},
    **{f"ascend {norm}": (norm, Ascend(restarts=2), True) for norm in ("linf", "l2")},
    **{f"pgd {norm}": (norm, PGD(steps=4, restarts=2), True) for norm in BALLS},
    "pgd hinge": ("linf", PGD(steps=4, loss="hinge"), True),
    **{f"apgd {norm}": (norm, APGD(steps=6), True) for norm in ("linf", "l2")},
    "apgd targeted": ("linf", APGD(steps=4, n_targets=2), True),
    **{f"square {norm}": (norm, Square(n_queries=8), True) for norm in ("linf", "l2")},
    "carlini_wagner l2": ("l2", wagner(CarliniWagnerL2, search_steps=4), False),
    "carlini_wagner linf": ("linf", wagner(CarliniWagnerLinf, initial_const=1.0), False),
    "carlini_wagner l0": (
        "l0",
        wagner(CarliniWagnerL0, initial_const=1.0, largest_const=1e3),
        False,
    ),
    "ddn": ("l2", DDN(steps=8), False),
    **{f"fmn {norm}": (norm, FMN(steps=8), False) for norm in BALLS},
    "sigma_zero": ("l0", SigmaZero(steps=8), False),
    "normalized_gradient": ("l2", NormalizedGradient(steps=8), False),
    **{f"strongest {norm}": (norm, Strongest(steps=4, n_queries=8), True) for norm in BALLS},
}
WITHOUT_FRACTIONS = "carlini_wagner linf"  # its tau is one number for all pixels


def threat_of(norm, bounded, eps, goal, mask):
    return ThreatModel(norm, eps if bounded else None, goal, mask)


@st.composite
def problems(draw):
    seed = draw(st.integers(0, 10_000))
    name = draw(st.sampled_from(sorted(ATTACKS)))
    norm, attack, bounded = ATTACKS[name]
    count = draw(st.integers(1, 9))
    channels = draw(st.sampled_from([1, 3]))
    size = draw(st.integers(2, 6))
    reject = draw(st.booleans())
    classifier = linear(CLASSES + reject, channels * size * size, CLASSES, seed)
    images = images_of(count, channels, size, seed, levels=draw(st.sampled_from([1, 255])))
    labels = torch.randint(0, CLASSES, (count,), generator=torch.Generator().manual_seed(seed))
    goals = [Evade(), AnyError(), Target((labels + 1) % CLASSES)]
    goal = draw(st.sampled_from([*goals, ForceReject()] if reject else goals))
    fields = {field.name for field in dataclasses.fields(attack)}
    if "loss" in fields and name not in ("pgd hinge", "apgd targeted") and draw(st.booleans()):
        attack = dataclasses.replace(attack, loss="cross_entropy")
    eps = draw(st.one_of(st.floats(0, 1), st.sampled_from([0.0, 1e-7, 8 / 255, 20.0])))
    eps = min(eps, 1.0) if norm == "linf" else eps
    mask = None
    if draw(st.booleans()):
        mask = torch.rand(1, channels, size, size, generator=torch.Generator().manual_seed(seed))
        fraction = norm == "linf" and name != WITHOUT_FRACTIONS
        mask = mask * (mask > 0.4) if fraction else (mask > 0.4).float()
    return attack, classifier, images, labels, threat_of(norm, bounded, eps, goal, mask)


def check_allowed(changed, images, threat, where):
    """R1: in [0, 1], within eps, and the clean image bit for bit where the mask is 0."""
    eps = torch.inf if threat.eps is None else threat.eps
    assert bool(torch.isfinite(changed).all())
    assert float(changed.min()) >= 0
    assert float(changed.max()) <= 1
    assert torch.equal(changed[where == 0], images[where == 0])
    if threat.norm == "linf":
        reach = eps * where.double().masked_fill(where == 0, 1e-9)
        assert bool(((changed.double() - images.double()).abs() <= reach * (1 + 1e-6)).all())
    else:
        assert bool((sizes(images, changed)[threat.norm] <= eps * (1 + 1e-6)).all())
    if eps == 0:
        assert torch.equal(changed, images)


@settings(max_examples=250)
@given(problems())
def test_the_result_is_allowed_and_each_success_succeeds(problem):
    """R1, R2, R3, R4."""
    attack, classifier, images, labels, threat = problem
    result = attack(classifier, images, labels, threat, **EXACT)
    where = torch.ones_like(images) if threat.mask is None else threat.mask.expand_as(images)
    check_allowed(result.images, images, threat, where)
    check_allowed(result.candidates, images, threat, where)
    change = result.images.double() - images.double()
    if threat.norm == "linf":  # eps times the mask is what a pixel may move
        change = torch.where(where > 0, change / where, 0)
    measured = sizes(torch.zeros_like(change), change)[threat.norm]
    assert torch.allclose(result.distance[result.success], measured[result.success])
    assert bool(torch.isinf(result.distance[~result.success]).all())
    succeeded = threat.goal.success(classifier.scores(result.images), labels, CLASSES)
    assert torch.equal(succeeded, result.success)
    assert torch.equal(result.images[~result.success], images[~result.success])
    assert torch.equal(result.images[result.success], result.candidates[result.success])
    clean = threat.goal.success(classifier.scores(images), labels, CLASSES)
    assert bool(result.success[clean].all())  # R9: what is broken without a change is broken
    assert bool((result.forwards >= 1).all())


@settings(max_examples=60)
@given(problems(), st.integers(1, 10))
def test_batches_do_not_change_the_result(problem, batch_size):
    """R3, R10: batches of every size draw the same, succeed on the same images, and give images
    that are equal up to rounding.
    """
    attack, classifier, images, labels, threat = problem
    whole = attack(classifier, images, labels, threat, **EXACT)
    parts = attack(classifier, images, labels, threat, batch_size=batch_size, **EXACT)
    assert torch.equal(whole.success, parts.success)
    assert torch.allclose(whole.images, parts.images, atol=1e-5)
    assert torch.equal(whole.forwards, parts.forwards)
    assert torch.equal(whole.backwards, parts.backwards)
    last = threat.select(torch.tensor([len(images) - 1]), images)
    one = attack(classifier, images[-1:], labels[-1:], last, **EXACT)
    assert torch.equal(whole.success[-1:], one.success)
    assert torch.allclose(whole.images[-1:], one.images, atol=1e-5)


@settings(max_examples=40)
@given(st.integers(0, 999), st.sampled_from(["linf:0.3", "l2:3"]))
def test_more_restarts_succeed_on_no_fewer_images(seed, threat):
    """R11, R5: restarts keep what is solved, and go on with the rest."""
    classifier = linear(CLASSES, 64, CLASSES, seed)
    images = images_of(12, seed=seed)
    labels = classifier.predict(images)
    few = RandomNoise(draws=2)(classifier, images, labels, threat)
    many = RandomNoise(draws=6)(classifier, images, labels, threat)
    assert bool((many.success | ~few.success).all())
    assert torch.equal(many.images[few.success], few.images[few.success])
    assert torch.equal(many.forwards[few.success], few.forwards[few.success])


def test_fgsm_on_a_linear_model_moves_the_margin_by_the_l1_norm_and_fgm_by_the_l2_norm():
    """R8: on two classes the score difference is linear, and the steps are its exact maximum over
    the ball inside the box.
    """
    weights = torch.tensor([[1.0, -2.0, 0.5, 3.0], [0.0, 1.0, -1.0, 1.0]], dtype=torch.float64)
    classifier = Classifier(Linear(weights), 2)
    images = torch.full((1, 1, 2, 2), 0.5, dtype=torch.float64)
    labels = torch.tensor([0])
    difference = weights[1] - weights[0]
    before = Evade().loss(classifier(images), labels, 2)
    for attack, threat, gain in (
        (FGSM(), "linf:0.2", difference.abs().sum()),
        (FGM(), "l2:0.2", difference.norm()),
    ):
        candidates = attack(classifier, images, labels, threat).candidates
        after = Evade().loss(classifier(candidates), labels, 2)
        assert torch.allclose(after - before, 0.2 * gain)


def test_fgsm_with_cross_entropy_is_the_textbook_formula():
    classifier = convolutional(4).eval()
    images = images_of(20)
    labels = torch.arange(20) % 4
    given_images = images.clone().requires_grad_()
    usual = nn.functional.cross_entropy(classifier(given_images), labels, reduction="sum")
    (gradient,) = torch.autograd.grad(usual, given_images)
    threat = ThreatModel("linf", 0.1, AnyError())
    result = FGSM(loss="cross_entropy")(classifier, images, labels, threat)
    expected = (images + 0.1 * gradient.sign()).clamp(0, 1)
    # Where no candidate succeeds and the clean image does, the clean image is the candidate.
    same = (outcomes(classifier, expected, labels) != 0) | (classifier.predict(images) == labels)
    assert torch.allclose(result.candidates[same], expected[same], atol=1e-6)
    always = FGSM(loss="cross_entropy", keep_maximizing=True)
    step = always(classifier, images, labels, threat).candidates
    assert torch.allclose(step, expected, atol=1e-6)


def test_an_attack_leaves_the_model_unchanged():
    """R3: the mode of every part, batch norm's statistics, which parameters learn, gradients."""
    classifier = convolutional(3)
    classifier.module[0].bias.requires_grad_(False)
    classifier.module[1].eval()
    state = {name: value.clone() for name, value in classifier.state_dict().items()}
    modes = [part.training for part in classifier.modules()]
    learning = [parameter.requires_grad for parameter in classifier.parameters()]
    result = FGSM()(classifier, images_of(10), torch.arange(10) % 3, "linf:0.1")
    assert [part.training for part in classifier.modules()] == modes
    assert [parameter.requires_grad for parameter in classifier.parameters()] == learning
    assert all(parameter.grad is None for parameter in classifier.parameters())
    assert all(torch.equal(value, state[name]) for name, value in classifier.state_dict().items())
    assert not result.images.requires_grad


def test_rejection_is_never_success_for_evade_and_always_for_force_reject():
    """R19."""
    always_rejects = Classifier(Constant([0.0, 1.0, 5.0]), 2)
    images = images_of(4)
    labels = torch.tensor([0, 1, 0, 1])
    evaded = RandomNoise(draws=2)(always_rejects, images, labels, "linf:1")
    assert not evaded.success.any()
    assert torch.equal(evaded.images, images)
    for goal in (ForceReject(), AnyError()):
        threat = ThreatModel("linf", 1.0, goal)
        assert RandomNoise()(always_rejects, images, labels, threat).success.all()


def test_restarts_differ_and_solved_images_cost_nothing_more():
    classifier = linear(CLASSES, 64, CLASSES)
    images = images_of(6)
    labels = classifier.predict(images)
    attack = RandomNoise(draws=5)
    wrong = (labels + 1) % CLASSES
    result = attack(classifier, images, wrong, "linf:0.01")  # solved at the first draw
    assert result.success.all()
    assert result.forwards.tolist() == [1] * 6
    result = attack(classifier, images, labels, "linf:0")
    assert not result.success.any()
    assert result.forwards.tolist() == [6] * 6  # five draws, and the clean image


def test_gradients_that_are_zero_or_not_finite_are_counted():
    """R14: a blind attack must be visible."""
    images = images_of(3)
    labels = torch.zeros(3, dtype=torch.int64)
    blind = FGSM()(Classifier(Constant([1.0, 0.0]), 2), images, labels, "linf:0.1")
    assert blind.zero_gradients.tolist() == [1, 1, 1]
    assert torch.equal(blind.images, images)

    class Poisoned(nn.Module):
        def forward(self, given):
            total = given.flatten(1).sum(1)
            return torch.stack([total, (total - total.detach()).sqrt() * 0], dim=1)

    poisoned = FGSM()(Classifier(Poisoned(), 2), images, labels, "linf:0.1")
    assert poisoned.zero_gradients.tolist() == [1, 1, 1]
    assert not FGSM()(linear(2, 64, 2), images, labels, "linf:0.1").zero_gradients.any()


def test_scores_that_are_not_finite_are_no_success():
    """R3, R14: argmax would make them column 0, and so a wrong answer."""
    images = torch.full((4, 1, 4, 4), 0.5)

    class Broken(nn.Module):
        def forward(self, given):
            scores = torch.tensor([0.0, 3.0]) + 0 * given.flatten(1)[:, :2]
            return torch.where((given == 0.5).flatten(1).all(1, keepdim=True), scores, torch.nan)

    labels = torch.ones(4, dtype=torch.int64)
    result = RandomNoise(draws=2)(Classifier(Broken(), 2), images, labels, "linf:0.5")
    assert not result.success.any()
    assert torch.equal(result.images, images)


def test_float64_images_and_float32_networks_go_together():
    classifier = convolutional(3)
    images = images_of(4).double()
    labels = classifier.predict(images)
    result = FGSM()(classifier, images, labels, "linf:0.2")
    assert result.images.dtype == torch.float64
    assert torch.equal(classifier.predict(images.float()), labels)


def test_a_model_without_gradients_is_refused_by_gradient_attacks_and_taken_by_noise():
    class Detached(nn.Module):
        def forward(self, given):
            total = given.detach().flatten(1).sum(1)
            return torch.stack([total, torch.full((len(given),), 30.0)], dim=1)

    classifier = Classifier(Detached(), 2)
    images = images_of(3)
    labels = torch.zeros(3, dtype=torch.int64)
    with pytest.raises(DemurError, match="no gradient"):
        FGSM()(classifier, images, labels, "linf:0.1")
    assert RandomNoise()(classifier, images, labels, "linf:1").forwards.all()


@dataclass(frozen=True, repr=False)
class Cheat(SearchAttack):
    """An attack that evaluates images which its ball does not allow."""

    def search(self, state):
        state.evaluate((state.images + 0.5).clamp(0, 1))


def test_an_attack_that_cheats_is_caught():
    """Negative control for R1."""
    with pytest.raises(AssertionError, match="R1"):
        Cheat()(linear(2, 64, 2), images_of(3), torch.tensor([0, 1, 0]), "linf:0.1")


@pytest.mark.parametrize("left", [[3], [3, 4]])
def test_the_ensemble_keeps_a_mask_that_has_no_dimension_of_images(left):
    """R1: eight images of eight rows; the mask has rows and columns alone."""
    classifier = linear(3, 64, 3)
    images = images_of(8)
    mask = torch.zeros(8, 8)
    mask[3:5] = 1
    right = classifier.predict(images)
    labels = (right + 1) % 3  # wrong already: the first attack solves all but those that are left
    labels[left] = right[left]
    attack = Strongest(steps=5, n_queries=5)
    result = attack(classifier, images, labels, ThreatModel("linf", 0.05, mask=mask))
    one = attack(classifier, images, labels, ThreatModel("linf", 0.05, mask=mask[None, None]))
    where = mask.expand_as(images)
    assert torch.equal(result.candidates[where == 0], images[where == 0])
    assert torch.equal(result.candidates, one.candidates)


def test_eps_may_differ_between_images():
    images = images_of(3)
    eps = torch.tensor([0.0, 0.1, 0.2])
    labels = torch.tensor([0, 1, 2])
    result = FGSM()(linear(3, 64, 3), images, labels, ThreatModel("linf", eps))
    assert torch.allclose(sizes(images, result.candidates)["linf"], eps.double(), atol=1e-6)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"eps": -0.1}, "negative"),
        ({"eps": float("nan")}, "NaN"),
        ({"eps": torch.tensor([0.1, 0.2])}, "one for each of the 3 images"),
        ({"images": torch.full((3, 1, 8, 8), 2.0)}, "lie in"),
        ({"images": torch.zeros(3, 1, 8, 8, dtype=torch.float16)}, "float32 or float64"),
        ({"labels": torch.tensor([0, 1])}, "shape"),
        ({"labels": torch.tensor([0, 1, 9])}, r"0\.\.2"),
        ({"mask": torch.ones(5, 5)}, "broadcast"),
        ({"goal": Target(torch.tensor([0, 1]))}, "one for each"),
        ({"goal": ForceReject()}, "reject column"),
        ({"batch_size": 0}, "batch_size"),
    ],
)
def test_bad_input_ends_at_the_boundary(change, said):
    options = {"images": images_of(3), "labels": torch.tensor([0, 1, 2]), "eps": 0.1, **change}
    images = options.pop("images")
    labels = options.pop("labels")
    with pytest.raises(DemurError, match=said):
        batch_size = options.pop("batch_size", None)
        threat = ThreatModel("linf", **options)
        FGSM()(linear(3, 64, 3), images, labels, threat, batch_size=batch_size)


def test_unknown_norms_offer_the_nearest():
    with pytest.raises(DemurError, match="Did you mean 'linf'"):
        RandomNoise()(linear(2, 64, 2), images_of(1), torch.tensor([0]), "l_inf:0.1")


def test_vectors_are_attacked_like_images():
    features = torch.rand(5, 7, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([1.0, 0, 0, 1, 1, 1, 1])
    threat = ThreatModel("linf", 0.1, mask=mask)
    result = FGSM()(linear(2, 7, 2), features, torch.zeros(5, dtype=torch.int64), threat)
    assert torch.equal(result.candidates[:, 1:3], features[:, 1:3])
    assert not torch.equal(result.candidates, features)


def test_progress_is_reported():
    class Listening(Silent):
        done = 0.0

        def advance(self, job, amount, note):
            self.done += amount

    listening = Listening()
    labels = torch.zeros(5, dtype=torch.int64)
    with reporting(listening):
        FGSM()(linear(2, 64, 2), images_of(5), labels, "linf:0.1", batch_size=2)
    assert listening.done == 5


def test_the_autocast_of_the_caller_decides_nothing_and_weights_keep_their_strides():
    """R2: what is reported is float32's, whatever the caller has switched on."""
    classifier = convolutional(4).eval()
    images = images_of(6)
    labels = classifier.predict(images)
    scores = classifier.scores(images)
    attack = FMN(steps=20)
    plain = attack(classifier, images, labels, "l2", **EXACT)
    strides = [parameter.stride() for parameter in classifier.parameters()]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(classifier.scores(images), scores)
        again = attack(classifier, images, labels, "l2", **EXACT)
    assert torch.equal(again.images, plain.images)
    assert torch.equal(again.success, plain.success)
    assert [parameter.stride() for parameter in classifier.parameters()] == strides


class _Ledge(nn.Module):
    """Class 1 far enough from grey, and flat around it."""

    def forward(self, images):
        far = ((images - 0.5).flatten(1).square().sum(1) - 0.1).clamp(min=0) - 0.2
        return torch.stack([torch.zeros_like(far), far], 1)


def test_ddn_steps_at_random_where_there_is_no_gradient():
    """R14: a flat start hides nothing from it."""
    classifier = Classifier(_Ledge(), 2)
    images = torch.full((3, 1, 4, 4), 0.5)
    result = DDN(steps=100)(classifier, images, torch.zeros(3, dtype=torch.int64), "l2")
    assert result.success.all()
    assert bool((result.zero_gradients > 0).all())
    assert float(result.distance.max()) <= 1.05 * 0.3**0.5


def test_a_failure_of_the_ensemble_is_no_farther_than_a_failure_of_its_first_attack():
    """R5: among failures the closest is kept."""
    classifier = convolutional(5, outputs=6).eval()
    images = images_of(12)
    labels = classifier.scores(images)[:, :5].argmax(1)
    margins = []
    for attack in (PGD(steps=10), Strongest(n_queries=50)):
        best = attack(classifier, images, labels, "linf:0.02")
        margins.append(Evade().margin(classifier.scores(best.candidates), labels, 5))
    assert not best.success.all()
    assert bool((margins[1] >= margins[0] - 1e-6)[~best.success].all())


class _Behind(nn.Module):
    """Class 1 needs a pixel of the left half far from grey, and is flat there; the right half
    always has a gradient.
    """

    def forward(self, images):
        far = ((images[..., :2] - 0.5).flatten(1).square().sum(1) - 0.1).clamp(min=0) - 0.2
        return torch.stack([0.1 * images[..., 2:].flatten(1).sum(1), far + 0.1 * 4], 1)


def test_a_gradient_outside_the_mask_counts_as_zero():
    """R14: a gradient that cannot be used does not hide a blind attack."""
    classifier = Classifier(_Behind(), 2)
    images = torch.full((3, 1, 4, 4), 0.5)
    mask = torch.zeros(1, 1, 4, 4)
    mask[..., :2] = 1
    threat = ThreatModel("l2", mask=mask)
    result = DDN(steps=100)(classifier, images, torch.zeros(3, dtype=torch.int64), threat)
    assert bool((result.zero_gradients > 0).all())
    assert result.success.all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda c, x, y: DDN()(c, x, y, ThreatModel("l2", goal="evade")), "a goal is"),
        (lambda c, x, y: CarliniWagnerL2()(c, x, y, ThreatModel("l2", goal=Evade)), "a goal is"),
        (lambda c, x, y: PGD()(c, x, y, "linf"), "needs an eps"),
        (lambda c, x, y: PGD()(c, x, y, ThreatModel(2, 0.1)), "unknown norm"),
        (lambda c, x, y: PGD()(c, x, y, 0.1), "a threat is"),
        (
            lambda c, x, y: CarliniWagnerLinf()(
                c, x, y, ThreatModel("linf", mask=torch.full((8, 8), 0.5))
            ),
            "0 and 1",
        ),
    ],
)
def test_the_mistakes_of_newcomers_have_messages(call, message):
    classifier = convolutional(4)
    images = images_of(2)
    with pytest.raises(DemurError, match=message):
        call(classifier, images, classifier.predict(images))


def test_the_message_for_a_single_image_says_how_to_make_a_batch():
    with pytest.raises(DemurError, match=r"images\[None\]"):
        PGD()(linear(3, 64, 3), images_of(1)[0], torch.tensor([0]), "linf:0.1")


def test_probabilities_are_warned_of_also_beside_a_reject_column():
    """R16."""
    plain = linear(3, 64, 3)
    images = images_of(4)
    labels = torch.tensor([0, 1, 2, 0])

    class Softmax(nn.Module):
        def forward(self, x):
            return plain(x).softmax(1)

    class Threshold(nn.Module):
        def forward(self, x):
            return torch.cat([plain(x).softmax(1), torch.full((len(x), 1), 0.5)], 1)

    class Kernels(Threshold, KernelMachine):
        """R20 is for the probabilities of kernel machines."""

    attack = PGD(steps=2)
    for module in (Softmax(), Threshold()):
        with pytest.warns(DemurWarning, match="look like probabilities"):
            attack(Classifier(module, 3), images, labels, "linf:0.1")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attack(Classifier(Kernels(), 3), images, labels, "linf:0.1")
        attack(plain, images, labels, "linf:0.1")
        attack(linear(4, 64, 3), images, labels, "linf:0.1")


class _BatchStatistics(nn.Module):
    """Its decisions depend on the images of the batch, in evaluation mode too."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(1, track_running_stats=False)
        self.plain = linear(3, 64, 3).module

    def forward(self, images):
        return self.plain(self.norm(images))


def test_statistics_of_the_batch_are_warned_of():
    """R16: running statistics, and those of each image, are not."""
    images = images_of(4)
    labels = torch.tensor([0, 1, 2, 0])
    attack = PGD(steps=2)
    with pytest.warns(
        DemurWarning, match="'module.norm' normalises by the statistics of the batch"
    ):
        attack(Classifier(_BatchStatistics(), 3), images, labels, "linf:0.1")
    alone = nn.Sequential(nn.InstanceNorm2d(1), linear(3, 64, 3).module)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attack(Classifier(alone, 3), images, labels, "linf:0.1")
        attack(convolutional(3), images, labels, "linf:0.1")


@pytest.mark.parametrize(
    ("count", "batch_size", "checked"),
    [
        (1, 4, [2]),  # beside a copy
        (2, 4, [1, 1]),
        (4, 4, [2, 2]),
        (7, 4, [2, 2, 2, 1]),
        (3, 1, [2, 2, 2]),
        (4, 3, [1, 1, 1, 2]),  # the last one was searched alone
        (9, 4, [2, 2, 2, 2, 1]),
    ],
)
def test_a_success_is_checked_in_a_batch_that_the_search_did_not_have(count, batch_size, checked):
    """R3: of another size and with other neighbours."""
    batches = []

    class Listening(nn.Module):
        def forward(self, images):
            batches.append(images.detach().clone())
            return images.flatten(1)[:, :3]

    images = images_of(count)
    classifier = Classifier(Listening(), 3)
    labels = (classifier.predict(images) + 1) % 3  # every image is wrong from the beginning
    batches.clear()
    result = PGD(steps=1)(
        classifier, images, labels, "linf:0.1", batch_size=batch_size, precision="float32"
    )
    assert result.success.all()
    searched = batches[1 : len(batches) - len(checked)]
    found = batches[len(searched) + 1 :]
    assert [len(batch) for batch in searched] == [
        min(batch_size, count - start) for start in range(0, count, batch_size)
    ]
    assert [len(batch) for batch in found] == checked
    for batch in found:
        assert not any(batch.shape == one.shape and torch.equal(batch, one) for one in searched)


def test_a_success_that_holds_in_its_own_batch_alone_is_taken_back():
    """R3: the first image of four is answered wrongly, whichever it is."""

    class Positional(nn.Module):
        def forward(self, images):
            scores = torch.tensor([2.0, 0.0]).repeat(len(images), 1) + 0 * images.flatten(1)[:, :2]
            return scores.flip(1) if len(images) == 4 else scores

    labels = torch.zeros(4, dtype=torch.int64)
    with pytest.warns(DemurWarning, match="blind"):
        result = PGD(steps=3)(Classifier(Positional(), 2), images_of(4), labels, "linf:0.1")
    assert not result.success.any()


@pytest.mark.parametrize(
    ("attack", "threat"),
    [(PGD(steps=3), "linf:0.1"), (Strongest(steps=3, n_queries=3), "linf:0.1"), (DDN(), "l2")],
)
def test_d2_inference_mode_is_refused_and_its_tensors_are_taken(attack, threat):
    """R13: without gradients the ensemble would be Square alone, without a word."""
    classifier = linear(3, 64, 3)
    images = images_of(3)
    labels = classifier.predict(images)
    plain = attack(classifier, images, labels, threat, **EXACT)
    with torch.inference_mode():
        with pytest.raises(DemurError, match=r"leave torch\.inference_mode"):
            attack(classifier, images, labels, threat)
        made = images.clone()
        told = labels.clone()
    assert made.is_inference()
    result = attack(classifier, made, told, threat, **EXACT)
    assert torch.equal(result.candidates, plain.candidates)
    assert torch.equal(result.backwards, plain.backwards)


@pytest.mark.parametrize("eps", [None, float("inf")])
def test_no_limit_is_none_where_a_mask_scales_eps(eps):
    """R12: the pixel must go from 0 to .6, and the mask is .5 there."""

    class Sixth(nn.Module):
        def forward(self, images):
            pixel = images.flatten(1)[:, 0]
            return torch.stack([0.6 - pixel, pixel - 0.6], 1)

    images = torch.zeros(1, 1, 2, 2)
    mask = torch.full((1, 1, 2, 2), 0.5)
    mask[..., 1, 1] = 0
    attack = FMN() if eps is None else PGD(steps=50)
    threat = ThreatModel("linf", eps, mask=mask)
    result = attack(Classifier(Sixth(), 2), images, torch.tensor([0]), threat)
    assert result.success.all()
    assert float(result.images[0, 0, 1, 1]) == 0


@pytest.mark.parametrize("norm", ["l2", "l1", "l0"])
def test_a_huge_eps_is_no_limit(norm):
    """R12: 2.5 eps / steps must not overflow float32."""
    classifier = linear(3, 64, 3)
    images = images_of(4)
    labels = classifier.predict(images)
    for attack in (PGD(steps=5), PGD(steps=5, random_start=True)):
        free = attack(classifier, images, labels, ThreatModel(norm, float("inf")), **EXACT)
        huge = attack(classifier, images, labels, ThreatModel(norm, 1e40), **EXACT)
        assert torch.equal(free.candidates, huge.candidates)
        assert huge.success.all()


def test_a_starting_point_counts_also_with_a_random_start():
    classifier = linear(3, 64, 3)
    images = images_of(4)
    labels = classifier.predict(images)
    points = images_of(4, seed=1)
    given = {"starting_points": points, **EXACT}
    plain = PGD(steps=2)(classifier, images, labels, "linf:0.1", **given)
    other = PGD(steps=2, random_start=True)(classifier, images, labels, "linf:0.1", **given)
    assert torch.equal(plain.candidates, other.candidates)
    free = PGD(steps=2, random_start=True)(classifier, images, labels, "linf:0.1", **EXACT)
    assert not torch.equal(free.candidates, other.candidates)


def test_a_blind_attack_is_reported_in_a_warning_and_in_the_line_of_the_result():
    """R14."""

    class Steps(nn.Module):
        def forward(self, x):
            return (x.flatten(1)[:, :3] * 2).round() + 0 * x.flatten(1)[:, :3]

    images = torch.full((2, 1, 4, 4), 0.4)
    with pytest.warns(DemurWarning, match="100% of the gradients were zero"):
        result = PGD(steps=5)(Classifier(Steps(), 3), images, torch.tensor([0, 0]), "linf:0.01")
    assert "100% of them without a gradient" in repr(result)


@pytest.mark.parametrize("attack", [Square(n_queries=20), Strongest(n_queries=20)])
@pytest.mark.parametrize("first", [0, 2])
def test_a_black_box_that_answers_nothing_is_an_error_and_not_robust(attack, first):
    def answer(images):
        scores = np.tile(np.float32([1.0, 0.0, 0.0]), (len(images), 1))
        scores[images[:, 0, 0, 0] > 0.9] = np.nan
        return scores

    images = torch.full((4, 1, 4, 4), 0.5)
    images[first:] = 0.95
    labels = torch.zeros(4, dtype=torch.int64)
    threat = ThreatModel("linf", 0.1, mask=inside_box((4, 4), 1, 1, 2, 2))
    with pytest.raises(DemurError, match="NaN or infinite scores"):
        attack(black_box(answer, 3), images, labels, threat)


def test_checks_leave_the_random_state_of_the_caller_alone():
    """R10: with a classifier that draws."""

    class Noisy(nn.Module):
        def forward(self, images):
            return images.flatten(1)[:, :3] + 0.01 * torch.randn(len(images), 3)

    classifier = Classifier(Noisy(), 3)
    images = images_of(4)
    labels = torch.zeros(4, dtype=torch.int64)
    attack = Strongest(steps=3, n_targets=1, n_queries=5)
    state = torch.random.get_rng_state()
    one = attack(classifier, images, labels, "linf:0.01")
    other = attack(classifier, images, labels, "linf:0.01")
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(one.candidates, other.candidates)


class Counting(nn.Module):
    """A linear classifier that counts its forward passes, by batch size."""

    def __init__(self):
        super().__init__()
        self.plain = linear(3, 64, 3)
        self.batches = []

    def forward(self, images):
        self.batches.append(len(images))
        return self.plain(images)


def half_wrong(classifier, images):
    """Labels of which the first half is wrong already."""
    labels = classifier.predict(images)
    half = len(labels) // 2
    labels[:half] = (labels[:half] + 1) % 3
    return labels


def test_an_attack_that_keeps_maximizing_climbs_all_the_way_on_every_image():
    """R4: it does not stop at success, and `success` is that of the final candidates."""
    classifier = Classifier(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), 3)
    images = images_of(6, 1, 8)
    labels = half_wrong(classifier, images)
    attack = PGD(steps=4, random_start=True, loss="cross_entropy", keep_maximizing=True)
    result = attack(classifier, images, labels, ThreatModel("linf", 0.1, AnyError()), **EXACT)
    assert (result.forwards == 5).all()
    assert (result.backwards == 4).all()
    before, after = (
        AnyError().loss(classifier.scores(shown), labels, 3, "cross_entropy")
        for shown in (images, result.candidates)
    )
    assert (after > before).all()
    reached = AnyError().success(classifier.scores(result.candidates), labels, 3)
    assert torch.equal(result.success, reached)
    assert torch.equal(result.images[reached], result.candidates[reached])
    assert torch.equal(result.images[~reached], images[~reached])
    assert reached[:3].all()


@pytest.mark.parametrize(
    "attack",
    [
        FGSM(keep_maximizing=True),
        PGD(steps=20, keep_maximizing=True),
        PGD(steps=5, restarts=3, keep_maximizing=True),
        APGD(steps=20, keep_maximizing=True),
        APGD(steps=10, n_targets=2, keep_maximizing=True),
    ],
)
def test_the_candidates_of_keep_maximizing_have_at_least_the_loss_of_those_that_stop(attack):
    classifier = linear(3, 64, 3)
    images = images_of(12)
    labels = half_wrong(classifier, images)
    losses = []
    for one in (attack, dataclasses.replace(attack, keep_maximizing=False)):
        candidates = one(classifier, images, labels, "linf:0.05", **EXACT).candidates
        losses.append(Evade().loss(classifier.scores(candidates), labels, 3))
    assert bool((losses[0] >= losses[1] - 1e-5).all())
    if not isinstance(attack, FGSM):  # its one step is the same
        assert bool((losses[0] > losses[1] + 1e-3)[:6].any())  # wrong already, and climbed


def test_maximize_spends_no_pass_on_clean_images_nor_on_a_check():
    """Adversarial training pays for the passes of its attack alone."""
    module = Counting()
    classifier = Classifier(module, 3)
    images = images_of(6)
    labels = half_wrong(module.plain, images)
    threat = ThreatModel("linf", 0.1, AnyError())
    attack = PGD(steps=4, random_start=True)
    candidates = attack.maximize(classifier, images, labels, threat, **EXACT)
    assert module.batches == [1, *[6] * 5]  # one image is scored to check what was asked for
    again = dataclasses.replace(attack, keep_maximizing=True)
    result = again(classifier, images, labels, threat, **EXACT)
    assert torch.equal(candidates, result.candidates)
    assert module.batches[6:] == [1, *[6] * 5, 3, 3]  # and checked in batches of another size
    # Batches, seeds and masks are those of a call.
    parts = attack.maximize(classifier, images, labels, threat, batch_size=4, **EXACT)
    assert torch.allclose(parts, candidates, atol=1e-6)
    other = attack.maximize(classifier, images, labels, threat, seed=1, **EXACT)
    assert not torch.equal(other, candidates)
    nowhere = dataclasses.replace(threat, mask=torch.zeros(1, 1, 8, 8))
    assert torch.equal(attack.maximize(classifier, images, labels, nowhere, **EXACT), images)


def test_maximize_needs_an_eps_and_an_attack_that_has_one():
    classifier = linear(3, 64, 3)
    images = images_of(2)
    labels = classifier.predict(images)
    with pytest.raises(DemurError, match="needs an eps"):
        PGD().maximize(classifier, images, labels, "linf")
    with pytest.raises(DemurError, match="DDN seeks the smallest change; training needs"):
        DDN().maximize(classifier, images, labels, "l2:1")
