"""What every attack on the driver holds to (R1-R6, R9, R10), shown on fgs, fg, noise and an iterated attack."""

import warnings
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from demur import Classifier, DemurError, DemurWarning, black_box, outcomes
from demur.attacks import (
    NEVER,
    AnyError,
    Evade,
    ForceReject,
    Problem,
    Target,
    apgd,
    carlini_l0,
    carlini_l2,
    carlini_linf,
    ddn,
    drive,
    fg,
    fgs,
    fmn,
    noise,
    normalized_gradient,
    pgd,
    sigma_zero,
    sizes,
    square,
    strongest,
)
from demur.attacks.norms import BALLS
from demur.attacks.regions import inside_box
from demur.progress import Silent, reporting
from models import Constant, Linear, convolutional, images_of, linear


def ascend(classifier, images, labels, *, eps, norm="linf", steps=5, **options):
    """An attack with a random start and a state that shrinks, as later ones will be."""

    def attack(problem: Problem) -> None:
        current, seen = problem.random_start(), problem.images.clone()
        for _ in range(steps):
            gradient = problem.differentiate(current).gradient
            current, seen, gradient = problem.unsolved(current, seen, gradient)
            if not len(current):
                return
            assert torch.equal(seen, problem.images)  # rows of the state stay with their images
            reach = problem.ball.eps.reshape(-1, 1, 1, 1).to(current)
            current = problem.ball.confine(current + 0.4 * reach * problem.ball.ascent(gradient))
        problem.evaluate(current)

    return drive(attack, classifier, images, labels, norm=norm, eps=eps, **{"goal": Evade(), **options})


def unbounded(attack):
    """An attack that seeks the smallest change, called like those that keep to an eps."""
    return lambda *given, eps, **options: attack(*given, **options)


EXACT = {"precision": "float32"}
# Each attack with the norm that it keeps to, and whether it keeps to an eps or seeks the smallest change.
ATTACKS = {
    "fgs": ("linf", fgs, True),
    "fg": ("l2", fg, True),
    **{f"noise {norm}": (norm, partial(noise, norm=norm, restarts=3), True) for norm in BALLS},
    **{f"ascend {norm}": (norm, partial(ascend, norm=norm, restarts=2), True) for norm in ("linf", "l2")},
    **{f"pgd {norm}": (norm, partial(pgd, norm=norm, steps=4, restarts=2, **EXACT), True) for norm in BALLS},
    "pgd hinge": ("linf", partial(pgd, steps=4, **EXACT), True),
    **{f"apgd {norm}": (norm, partial(apgd, norm=norm, steps=6, **EXACT), True) for norm in ("linf", "l2")},
    "apgd targeted": ("linf", partial(apgd, steps=4, targets=2, **EXACT), True),
    **{f"square {norm}": (norm, partial(square, norm=norm, queries=8), True) for norm in ("linf", "l2")},
    "carlini_l2": ("l2", unbounded(partial(carlini_l2, steps=20, search_steps=4, learning_rate=0.1, **EXACT)), False),
    "carlini_linf": ("linf", unbounded(partial(carlini_linf, steps=20, learning_rate=0.1, initial_const=1.0, **EXACT)), False),
    "carlini_l0": ("l0", unbounded(partial(carlini_l0, steps=20, learning_rate=0.1, initial_const=1.0, largest_const=1e3, **EXACT)), False),
    "ddn": ("l2", unbounded(partial(ddn, steps=8, **EXACT)), False),
    **{f"fmn {norm}": (norm, unbounded(partial(fmn, norm=norm, steps=8, **EXACT)), False) for norm in BALLS},
    "sigma_zero": ("l0", unbounded(partial(sigma_zero, steps=8, **EXACT)), False),
    "normalized_gradient": ("l2", unbounded(partial(normalized_gradient, steps=8, **EXACT)), False),
    **{f"strongest {norm}": (norm, partial(strongest, norm=norm, steps=4, queries=8, **EXACT), True) for norm in BALLS},
}
CLASSES = 3


@st.composite
def problems(draw):
    seed = draw(st.integers(0, 10_000))
    name = draw(st.sampled_from(sorted(ATTACKS)))
    count, channels, size = draw(st.integers(1, 9)), draw(st.sampled_from([1, 3])), draw(st.integers(2, 6))
    reject = draw(st.booleans())
    classifier = linear(CLASSES + reject, channels * size * size, CLASSES, seed)
    images = images_of(count, channels, size, seed, levels=draw(st.sampled_from([1, 255])))
    labels = torch.randint(0, CLASSES, (count,), generator=torch.Generator().manual_seed(seed))
    goals = [Evade(), AnyError(), Evade("cross_entropy"), Target((labels + 1) % CLASSES)] + ([ForceReject()] if reject else [])
    goal = draw(st.sampled_from(goals))
    if name == "pgd hinge":
        goal = replace(goal, by="hinge")
    eps = draw(st.one_of(st.floats(0, 1), st.sampled_from([0.0, 1e-7, 8 / 255, 20.0])))
    eps = min(eps, 1.0) if ATTACKS[name][0] == "linf" else eps
    region = None
    if draw(st.booleans()):
        region = torch.rand(1, channels, size, size, generator=torch.Generator().manual_seed(seed))
        fraction = ATTACKS[name][0] == "linf" and name != "carlini_linf"  # whose tau is one number for all pixels
        region = region * (region > 0.4) if fraction else (region > 0.4).float()
    return name, classifier, images, labels, goal, eps, region


@settings(max_examples=250)
@given(problems())
def test_whatever_is_attacked_the_result_is_allowed_and_what_is_found_succeeds(problem):
    """R1, R2, R3, R4."""
    name, classifier, images, labels, goal, eps, region = problem
    result = ATTACKS[name][1](classifier, images, labels, eps=eps, goal=goal, region=region)
    norm, _, bounded = ATTACKS[name]
    eps = eps if bounded else torch.inf
    where = torch.ones_like(images) if region is None else region.expand_as(images)
    for changed in (result.images, result.attempts):
        assert bool(torch.isfinite(changed).all()) and float(changed.min()) >= 0 and float(changed.max()) <= 1
        assert torch.equal(changed[where == 0], images[where == 0])
        if norm == "linf":
            reach = eps * where.double().masked_fill(where == 0, 1e-9)
            assert bool(((changed.double() - images.double()).abs() <= reach * (1 + 1e-6)).all())
        else:
            assert bool((sizes(images, changed)[norm] <= eps * (1 + 1e-6)).all())
        if eps == 0:
            assert torch.equal(changed, images)
    change = result.images.double() - images.double()
    scaled = torch.where(where > 0, change / where, 0) if norm == "linf" else change  # eps times the region is what a pixel may move
    assert torch.allclose(result.distance[result.found], sizes(torch.zeros_like(scaled), scaled)[norm][result.found])
    assert bool(torch.isinf(result.distance[~result.found]).all())
    succeeded = goal.success(classifier.scores(result.images), labels, CLASSES)
    assert torch.equal(succeeded, result.found)
    assert torch.equal(result.images[~result.found], images[~result.found])
    assert torch.equal(result.images[result.found], result.attempts[result.found])
    clean = goal.success(classifier.scores(images), labels, CLASSES)
    assert bool(result.found[clean].all())  # R9: what is broken without a change counts as broken
    assert bool((result.forwards >= 1).all())


@settings(max_examples=60)
@given(problems(), st.integers(1, 10))
def test_batches_do_not_change_what_is_found(problem, batch_size):
    """R3, R10: a batch of N is N batches of 1, or any other size: same draws, same success, images equal up to rounding."""
    name, classifier, images, labels, goal, eps, region = problem
    attack = partial(ATTACKS[name][1], eps=eps, region=region)
    whole = attack(classifier, images, labels, goal=goal)
    parts = attack(classifier, images, labels, goal=goal, batch_size=batch_size)
    assert torch.equal(whole.found, parts.found) and torch.allclose(whole.images, parts.images, atol=1e-5)
    assert torch.equal(whole.forwards, parts.forwards) and torch.equal(whole.backwards, parts.backwards)
    one = attack(classifier, images[-1:], labels[-1:], goal=goal.select(torch.tensor([len(images) - 1])))
    assert torch.equal(whole.found[-1:], one.found) and torch.allclose(whole.images[-1:], one.images, atol=1e-5)


@settings(max_examples=40)
@given(st.integers(0, 999), st.sampled_from(["linf", "l2"]))
def test_noise_that_is_allowed_more_restarts_finds_no_less(seed, norm):
    """R11, R5: restarts keep what is solved, and go on with the rest."""
    classifier, images = linear(CLASSES, 64, CLASSES, seed), images_of(12, seed=seed)
    labels = classifier.predict(images)
    few, many = (noise(classifier, images, labels, norm=norm, eps=0.3 if norm == "linf" else 3.0, restarts=n) for n in (2, 6))
    assert bool((many.found | ~few.found).all())
    assert torch.equal(many.images[few.found], few.images[few.found])
    assert torch.equal(many.forwards[few.found], few.forwards[few.found])


def test_fgs_on_a_linear_model_moves_the_margin_by_the_l1_norm_and_fg_by_the_l2_norm():
    """R8: on two classes the score difference is linear, and the steps are its exact maximum over the ball inside the box."""
    weights = torch.tensor([[1.0, -2.0, 0.5, 3.0], [0.0, 1.0, -1.0, 1.0]], dtype=torch.float64)
    classifier = Classifier(Linear(weights), 2)
    images, labels = torch.full((1, 1, 2, 2), 0.5, dtype=torch.float64), torch.tensor([0])
    difference = weights[1] - weights[0]
    before = Evade().loss(classifier(images), labels, 2)
    for attack, gain in ((fgs, difference.abs().sum()), (fg, difference.norm())):
        after = Evade().loss(classifier(attack(classifier, images, labels, eps=0.2).attempts), labels, 2)
        assert torch.allclose(after - before, 0.2 * gain)


def test_fgs_with_cross_entropy_is_the_textbook_formula():
    classifier = convolutional(4).eval()
    images, labels = images_of(20), torch.arange(20) % 4
    given_images = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(classifier(given_images), labels, reduction="sum"), given_images)
    result = fgs(classifier, images, labels, eps=0.1, goal=AnyError("cross_entropy"))
    expected = (images + 0.1 * gradient.sign()).clamp(0, 1)
    # Where no candidate succeeds and the clean image does, the clean image is the attempt.
    same = (outcomes(classifier, expected, labels) != 0) | (classifier.predict(images) == labels)
    assert torch.allclose(result.attempts[same], expected[same], atol=1e-6)


def test_an_attack_leaves_the_model_as_it_was():
    """R3: mode of every part, batch norm's statistics, which parameters learn, and their gradients."""
    classifier = convolutional(3)
    classifier.module[0].bias.requires_grad_(False)
    classifier.module[1].eval()
    state = {name: value.clone() for name, value in classifier.state_dict().items()}
    modes = [part.training for part in classifier.modules()]
    learning = [parameter.requires_grad for parameter in classifier.parameters()]
    result = fgs(classifier, images_of(10), torch.arange(10) % 3, eps=0.1)
    assert [part.training for part in classifier.modules()] == modes
    assert [parameter.requires_grad for parameter in classifier.parameters()] == learning
    assert all(parameter.grad is None for parameter in classifier.parameters())
    assert all(torch.equal(value, state[name]) for name, value in classifier.state_dict().items())
    assert not result.images.requires_grad


def test_rejection_is_never_success_for_evade_and_always_for_force_reject():
    """R19."""
    always_rejects = Classifier(Constant([0.0, 1.0, 5.0]), 2)
    images, labels = images_of(4), torch.tensor([0, 1, 0, 1])
    evaded = noise(always_rejects, images, labels, eps=1.0, restarts=2)
    assert not evaded.found.any() and torch.equal(evaded.images, images)
    assert noise(always_rejects, images, labels, eps=1.0, goal=ForceReject()).found.all()
    assert noise(always_rejects, images, labels, eps=1.0, goal=AnyError()).found.all()


def test_restarts_differ_and_solved_images_cost_nothing_more():
    classifier = linear(CLASSES, 64, CLASSES)
    images = images_of(6)
    labels = classifier.predict(images)
    wrong = (labels + 1) % CLASSES
    result = noise(classifier, images, wrong, eps=0.01, restarts=5)  # already wrong: solved at the first draw
    assert result.found.all() and result.forwards.tolist() == [1] * 6
    result = noise(classifier, images, labels, eps=0.0, restarts=5)
    assert not result.found.any() and result.forwards.tolist() == [6] * 6  # five draws, and the clean image


def test_gradients_that_are_zero_or_not_finite_are_counted():
    """R14: an attack that was blind must be seen to have been."""
    images, labels = images_of(3), torch.zeros(3, dtype=torch.int64)
    blind = fgs(Classifier(Constant([1.0, 0.0]), 2), images, labels, eps=0.1)
    assert blind.flat.tolist() == [1, 1, 1] and torch.equal(blind.images, images)

    class Poisoned(nn.Module):
        def forward(self, given):
            total = given.flatten(1).sum(1)
            return torch.stack([total, (total - total.detach()).sqrt() * 0], dim=1)

    assert fgs(Classifier(Poisoned(), 2), images, labels, eps=0.1).flat.tolist() == [1, 1, 1]
    assert not fgs(linear(2, 64, 2), images, labels, eps=0.1).flat.any()


def test_scores_that_are_not_finite_are_no_success():
    """R3, R14: argmax would make them column 0, and so a wrong answer."""
    images = torch.full((4, 1, 4, 4), 0.5)

    class Broken(nn.Module):
        def forward(self, given):
            scores = torch.tensor([0.0, 3.0]) + 0 * given.flatten(1)[:, :2]
            return torch.where((given == 0.5).flatten(1).all(1, keepdim=True), scores, torch.nan)

    result = noise(Classifier(Broken(), 2), images, torch.ones(4, dtype=torch.int64), eps=0.5, restarts=2)
    assert not result.found.any() and torch.equal(result.images, images)


def test_float64_images_and_float32_networks_go_together():
    classifier, images = convolutional(3), images_of(4).double()
    labels = classifier.predict(images)
    result = fgs(classifier, images, labels, eps=0.2)
    assert result.images.dtype == torch.float64 and torch.equal(classifier.predict(images.float()), labels)


def test_a_model_without_gradients_is_refused_by_gradient_attacks_and_taken_by_noise():
    class Detached(nn.Module):
        def forward(self, given):
            return torch.stack([given.detach().flatten(1).sum(1), torch.full((len(given),), 30.0)], dim=1)

    classifier, images, labels = Classifier(Detached(), 2), images_of(3), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(DemurError, match="no gradient"):
        fgs(classifier, images, labels, eps=0.1)
    assert noise(classifier, images, labels, eps=1.0).forwards.all()


def test_an_attack_that_cheats_is_caught():
    """Negative control for R1: an attack that records what its ball does not allow."""

    def cheat(problem: Problem) -> None:
        problem.evaluate((problem.images + 0.5).clamp(0, 1))

    with pytest.raises(AssertionError, match="R1"):
        drive(cheat, linear(2, 64, 2), images_of(3), torch.tensor([0, 1, 0]), goal=Evade(), norm="linf", eps=0.1)


def test_eps_may_differ_between_images():
    images, labels = images_of(3), torch.tensor([0, 1, 2])
    result = fgs(linear(3, 64, 3), images, labels, eps=torch.tensor([0.0, 0.1, 0.2]))
    assert torch.allclose(sizes(images, result.attempts)["linf"], torch.tensor([0.0, 0.1, 0.2], dtype=torch.float64), atol=1e-6)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"eps": -0.1}, "negative"),
        ({"eps": float("nan")}, "finite"),
        ({"eps": torch.tensor([0.1, 0.2])}, "one for each of the 3 images"),
        ({"images": torch.full((3, 1, 8, 8), 2.0)}, "lie in"),
        ({"images": torch.zeros(3, 1, 8, 8, dtype=torch.float16)}, "float32 or float64"),
        ({"labels": torch.tensor([0, 1])}, "shape"),
        ({"labels": torch.tensor([0, 1, 9])}, "0..2"),
        ({"region": torch.ones(5, 5)}, "broadcast"),
        ({"goal": Target(torch.tensor([0, 1]))}, "one for each"),
        ({"goal": ForceReject()}, "reject column"),
        ({"batch_size": 0}, "batch_size"),
    ],
)
def test_bad_input_ends_at_the_boundary(change, said):
    given_input = {"images": images_of(3), "labels": torch.tensor([0, 1, 2]), "eps": 0.1, **change}
    images, labels = given_input.pop("images"), given_input.pop("labels")
    with pytest.raises(DemurError, match=said):
        fgs(linear(3, 64, 3), images, labels, **given_input)


def test_unknown_norms_offer_the_nearest():
    with pytest.raises(DemurError, match="Did you mean 'linf'"):
        noise(linear(2, 64, 2), images_of(1), torch.tensor([0]), norm="l_inf", eps=0.1)


def test_vectors_are_attacked_like_images():
    features = torch.rand(5, 7, generator=torch.Generator().manual_seed(0))
    region = torch.tensor([1.0, 0, 0, 1, 1, 1, 1])
    result = fgs(linear(2, 7, 2), features, torch.zeros(5, dtype=torch.int64), eps=0.1, region=region)
    assert torch.equal(result.attempts[:, 1:3], features[:, 1:3]) and not torch.equal(result.attempts, features)


def test_progress_is_reported():
    class Listening(Silent):
        done = 0.0

        def advance(self, job, amount, note):
            self.done += amount

    listening = Listening()
    with reporting(listening):
        fgs(linear(2, 64, 2), images_of(5), torch.zeros(5, dtype=torch.int64), eps=0.1, batch_size=2)
    assert listening.done == 5


def test_the_callers_autocast_decides_nothing_and_the_weights_come_back_as_they_lay():
    """R2: what is reported is float32's, whoever calls."""
    classifier, images = convolutional(4).eval(), images_of(6)
    labels = classifier.predict(images)
    scores, plain = classifier.scores(images), fmn(classifier, images, labels, steps=20, precision="float32")
    strides = [parameter.stride() for parameter in classifier.parameters()]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(classifier.scores(images), scores)
        again = fmn(classifier, images, labels, steps=20, precision="float32")
    assert torch.equal(again.images, plain.images) and torch.equal(again.found, plain.found)
    assert [parameter.stride() for parameter in classifier.parameters()] == strides


class _Ledge(nn.Module):
    """Class 1 far enough from grey, and flat around it."""

    def forward(self, images):
        far = ((images - 0.5).flatten(1).square().sum(1) - 0.1).clamp(min=0) - 0.2
        return torch.stack([torch.zeros_like(far), far], 1)


def test_ddn_steps_at_random_where_there_is_no_gradient():
    """R14: a flat start hides nothing from it."""
    classifier, images = Classifier(_Ledge(), 2), torch.full((3, 1, 4, 4), 0.5)
    result = ddn(classifier, images, torch.zeros(3, dtype=torch.int64), steps=100)
    assert result.found.all() and bool((result.flat > 0).all())
    assert float(result.distance.max()) <= 1.05 * 0.3**0.5


def test_what_strongest_would_send_comes_at_least_as_close_as_what_its_first_attack_would():
    """R5: among failures the closest is kept."""
    classifier, images = convolutional(5, outputs=6).eval(), images_of(12)
    labels = classifier.scores(images)[:, :5].argmax(1)
    first, best = (attack(classifier, images, labels, eps=0.02) for attack in (partial(pgd, steps=10), partial(strongest, queries=50)))
    margins = [Evade().margin(classifier.scores(result.attempts), labels, 5) for result in (first, best)]
    assert not best.found.all() and bool((margins[1] >= margins[0] - 1e-6)[~best.found].all())


class _Behind(nn.Module):
    """Class 1 needs a pixel of the left half far from grey, and is flat there; the right half always has a gradient."""

    def forward(self, images):
        far = ((images[..., :2] - 0.5).flatten(1).square().sum(1) - 0.1).clamp(min=0) - 0.2
        return torch.stack([0.1 * images[..., 2:].flatten(1).sum(1), far + 0.1 * 4], 1)


def test_a_gradient_outside_the_region_is_none():
    """R14: what cannot be used does not hide that the attack is blind."""
    classifier, images = Classifier(_Behind(), 2), torch.full((3, 1, 4, 4), 0.5)
    region = torch.zeros(1, 1, 4, 4)
    region[..., :2] = 1
    result = ddn(classifier, images, torch.zeros(3, dtype=torch.int64), steps=100, region=region)
    assert bool((result.flat > 0).all()) and result.found.all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda c, x, y: ddn(c, x, y, goal="evade"), "a goal is"),
        (lambda c, x, y: carlini_l2(c, x, y, goal=Evade), "a goal is"),
        (lambda c, x, y: pgd(c, x, y, eps=None), "needs an eps"),
        (lambda c, x, y: pgd(c, x, y, eps=0.1, norm=2), "unknown norm"),
        (lambda c, x, y: carlini_linf(c, x, y, region=torch.full((8, 8), 0.5)), "0 and 1"),
    ],
)
def test_what_a_newcomer_gets_wrong_is_said(call, message):
    classifier, images = convolutional(4), images_of(2)
    with pytest.raises(DemurError, match=message):
        call(classifier, images, classifier.predict(images))


def test_a_single_image_is_told_how_to_be_a_batch():
    with pytest.raises(DemurError, match=r"images\[None\]"):
        pgd(linear(3, 64, 3), images_of(1)[0], torch.tensor([0]), eps=0.1)


def test_scores_that_are_probabilities_are_warned_of_and_a_threshold_column_is_not():
    """R16."""
    plain, images, labels = linear(3, 64, 3), images_of(4), torch.tensor([0, 1, 2, 0])

    class Softmax(nn.Module):
        def forward(self, x):
            return plain(x).softmax(1)

    class Threshold(nn.Module):
        def forward(self, x):
            return torch.cat([plain(x).softmax(1), torch.full((len(x), 1), 0.5)], 1)

    with pytest.warns(DemurWarning, match="look like probabilities"):
        pgd(Classifier(Softmax(), 3), images, labels, eps=0.1, steps=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pgd(Classifier(Threshold(), 3), images, labels, eps=0.1, steps=2)
        pgd(plain, images, labels, eps=0.1, steps=2)


def test_a_blind_attack_says_so():
    """R14: in a warning, and in the result's line."""

    class Steps(nn.Module):
        def forward(self, x):
            return (x.flatten(1)[:, :3] * 2).round() + 0 * x.flatten(1)[:, :3]

    images = torch.full((2, 1, 4, 4), 0.4)
    with pytest.warns(DemurWarning, match="100% of the gradients were zero"):
        result = pgd(Classifier(Steps(), 3), images, torch.tensor([0, 0]), eps=0.01, steps=5)
    assert "100% of them without a gradient" in repr(result)


@pytest.mark.parametrize("attack", [partial(square, eps=0.1, queries=20), partial(strongest, eps=0.1, queries=20)])
@pytest.mark.parametrize("first", [0, 2])
def test_a_black_box_that_answers_nothing_is_an_error_and_not_robust(attack, first):
    def answer(images):
        scores = np.tile(np.float32([1.0, 0.0, 0.0]), (len(images), 1))
        scores[images[:, 0, 0, 0] > 0.9] = np.nan
        return scores

    images = torch.full((4, 1, 4, 4), 0.5)
    images[first:] = 0.95
    with pytest.raises(DemurError, match="NaN or infinite scores"):
        attack(black_box(answer, 3), images, torch.zeros(4, dtype=torch.int64), region=inside_box((4, 4), 1, 1, 2, 2))


def test_checks_leave_the_callers_random_state_alone():
    """R10: with a classifier that draws."""

    class Noisy(nn.Module):
        def forward(self, images):
            return images.flatten(1)[:, :3] + 0.01 * torch.randn(len(images), 3)

    classifier, images = Classifier(Noisy(), 3), images_of(4)
    state = torch.random.get_rng_state()
    results = [strongest(classifier, images, torch.zeros(4, dtype=torch.int64), eps=0.01, steps=3, targets=1, queries=5) for _ in range(2)]
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(results[0].attempts, results[1].attempts)


def test_a_goal_that_nothing_reaches_is_climbed_all_the_way_and_sought_nowhere_else():
    """R4: adversarial training pays for the passes of its attack, and for none at the clean images."""
    classifier = Classifier(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), 3)
    images, goal = images_of(6, 1, 8), AnyError("cross_entropy", confidence=NEVER)
    labels = classifier.predict(images)
    labels[:3] = (labels[:3] + 1) % 3  # wrong already, and yet not done
    found = pgd(classifier, images, labels, eps=0.1, steps=4, random_start=True, goal=goal, precision="float32")
    assert not found.found.any() and (found.forwards == 5).all() and (found.backwards == 4).all()
    before, after = (goal.loss(classifier.scores(shown), labels, 3) for shown in (images, found.attempts))
    assert (after > before).all()
