"""Optimised lines and branching: sound, tighter than CROWN, and complete on tiny networks."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from demur import Classifier, ThreatModel, data
from demur.attacks import PGD
from demur.bounds import Propagation, Region, trace
from demur.bounds.curved import Relaxation
from demur.bounds.optimised import branched, optimised, rectifiers
from demur.certificates import METHODS, certify
from demur.defenses import ConfidenceThreshold
from demur.goals import AnyError
from demur.training import fit
from tiny_networks import exact_minimum, tiny

SIZES = (4, 8, 7, 3)


def question(seed, eps=0.25, shift=None):
    """A tiny network, its bounds over a box, and a row whose exact minimum is known.

    With a shift, the last bias moves so that the exact minimum is the shift.
    """
    network = tiny(seed, SIZES)
    draw = torch.Generator().manual_seed(seed)
    images = torch.rand(1, 4, generator=draw, dtype=torch.float64)
    row = torch.randn(1, 3, generator=draw, dtype=torch.float64)
    region = Region.around(images, eps)
    box = [one[0].numpy() for one in region.box]
    exact = exact_minimum(network, *box, row[0].numpy())
    if shift is not None:
        network = copy.deepcopy(network).double()
        with torch.no_grad():
            network[-1].bias += row[0] * ((shift - exact) / float(row[0] @ row[0]))
        exact = shift
    graph, _ = trace(network, images.to(network[0].weight.dtype))
    propagation = Propagation(graph, network, region)
    with torch.no_grad():
        propagation.forwards(tighten=True)
    return propagation, graph.output, row, exact


@pytest.mark.parametrize("seed", range(6))
def test_optimised_bounds_lie_between_crown_and_the_exact_minimum(seed):
    propagation, place, row, exact = question(seed, eps=0.4)
    with torch.no_grad():
        crown = propagation.backwards(place, row, torch.zeros(1, dtype=torch.int64)).lower
        best, _ = optimised(propagation, place, row)
    assert float(crown) <= float(best.lower) <= exact + 1e-9


def test_optimised_lines_gain_something():
    gained = []
    for seed in range(8):
        propagation, place, row, exact = question(seed, eps=0.4, shift=-0.5)
        with torch.no_grad():
            crown = propagation.backwards(place, row, torch.zeros(1, dtype=torch.int64)).lower
            best, _ = optimised(propagation, place, row)
        gained.append(float((best.lower - crown) / (exact - crown).clamp(min=1e-9)))
    assert max(gained) > 0.1


@pytest.mark.parametrize("seed", range(8))
def test_branching_decides_what_is_a_hundredth_from_the_exact_minimum(seed):
    with torch.no_grad():
        propagation, place, row, exact = question(seed, shift=0.01)
        assert 0 < float(branched(propagation, place, row, 400)) <= exact + 1e-9
        propagation, place, row, exact = question(seed, shift=-0.01)
        assert float(branched(propagation, place, row, 400)) <= exact + 1e-9


def test_without_splits_less_is_decided():
    proven = {}
    for splits in (0, 400):
        with torch.no_grad():
            asked = [question(seed, shift=0.01) for seed in range(8)]
            found = [float(branched(*one[:3], splits)) > 0 for one in asked]
        proven[splits] = sum(found)
    assert proven[0] < proven[400] == 8


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**20), eps=st.floats(0.01, 0.6))
def test_any_slopes_and_multipliers_of_the_known_sign_are_sound(seed, eps):
    propagation, place, row, _ = question(seed % 50, eps)
    draw = torch.Generator().manual_seed(seed)
    like = propagation.intervals
    sources = rectifiers(propagation, place)
    low, high = propagation.allowed.box
    points = low + (high - low) * torch.rand(400, 4, generator=draw, dtype=torch.float64)
    network = tiny(seed % 50, SIZES).double()
    values, inputs = points, {}
    for number, layer in enumerate(network, start=1):
        if number in sources:
            inputs[number] = values
        values = layer(values)
    # The known sign of one input of each rectifier: that of the first point.
    slopes, signed, inside = {}, {}, torch.ones(len(points), dtype=torch.bool)
    for number, source in sources.items():
        shape = like[source].lower.shape
        slopes[number] = torch.rand(shape, generator=draw, dtype=torch.float64)
        sign = torch.zeros(shape, dtype=torch.float64)
        sign[0, 0] = inputs[number][0, 0].sign()
        signed[number] = 3 * sign * torch.rand(shape, generator=draw, dtype=torch.float64)
        inside &= inputs[number][:, 0].sign() == sign[0, 0]
    with torch.no_grad():
        found = propagation.backwards(place, row, torch.arange(1), Relaxation(slopes, signed))
    assert bool(((values @ row[0])[inside] >= float(found.lower) - 1e-9).all())


def test_a_slope_above_one_is_unsound_and_would_be_noticed():
    """Negative control of the test before."""
    broken = False
    for seed in range(20):
        propagation, place, row, exact = question(seed)
        sources = rectifiers(propagation, place)
        shapes = {n: propagation.intervals[source].lower for n, source in sources.items()}
        slopes = {n: torch.full_like(one, -2.0) for n, one in shapes.items()}
        with torch.no_grad():
            found = propagation.backwards(place, row, torch.arange(1), Relaxation(slopes))
        broken |= float(found.lower) > exact + 1e-6
    assert broken


@pytest.fixture(scope="module")
def trained():
    """A small network that is trained as usual: intervals and CROWN prove little of it."""
    train, test = data.load("digits"), data.load("digits", "test")
    network = nn.Sequential(
        nn.AvgPool2d(4), nn.Flatten(), nn.Linear(49, 24), nn.ReLU(), nn.Linear(24, 10)
    )
    fit(network, train.images, train.labels, epochs=4, batch_size=64)
    return network.eval(), test.to_float()[:24], test.labels[:24]


def test_branching_proves_more_than_crown_and_nothing_that_is_broken(trained):
    network, images, labels = trained
    classifier = Classifier(network, 10)
    threat = ThreatModel("linf", 0.06)
    result = PGD(steps=20)(classifier, images, labels, threat)
    shares = []
    for methods in (("ibp", "crown-ibp", "crown"), ("ibp", "alpha-crown"), ("ibp", "branching")):
        found = certify(classifier, images, labels, threat, methods, result, splits=60)
        shares.append(found.bounds().proven)
        assert found.bounds().proven <= found.bounds().not_broken
    assert shares[0] <= shares[1] <= shares[2]
    assert shares[2] > shares[0]


def test_gradient_methods_certify_other_goals_and_rules(trained):
    network, images, labels = trained
    few = images[:6], labels[:6]
    for classifier in (
        ConfidenceThreshold(network, 10, score="margin", threshold=2.0),
        ConfidenceThreshold(network, 10, score="energy", threshold=3.0),
    ):
        for goal in (None, AnyError()):
            options = {} if goal is None else {"goal": goal}
            threat = ThreatModel("l2", 0.15, **options)
            crown = certify(classifier, *few, threat)
            more = certify(classifier, *few, threat, (*METHODS, "branching"), splits=5)
            assert bool((more.margin >= crown.margin).all())
