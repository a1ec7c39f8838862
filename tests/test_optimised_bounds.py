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
from demur.bounds import optimised as module
from demur.bounds.curved import Relaxation
from demur.bounds.optimised import branched, optimised, rectifiers
from demur.certificates import certify
from demur.certificates.certify import proofs
from demur.defenses import ConfidenceThreshold
from demur.goals import AnyError, Evade
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


def test_rows_and_images_are_not_exchanged():
    """Rows that can be proven stand between rows that cannot, each with an image of its own."""
    network = tiny(3, SIZES).double()
    last = nn.Linear(SIZES[-2], 4).double()  # one score more, which is 1
    with torch.no_grad():
        last.weight.copy_(torch.cat([network[-1].weight, torch.zeros(1, SIZES[-2])]))
        last.bias.copy_(torch.cat([network[-1].bias, torch.ones(1)]))
    draw = torch.Generator().manual_seed(0)
    images = torch.rand(6, 4, generator=draw, dtype=torch.float64)
    region = Region.around(images, 0.25)
    rows = torch.randn(6, 4, generator=draw, dtype=torch.float64)
    for number, row in enumerate(rows):
        box = [one[number].numpy() for one in region.box]
        exact = exact_minimum(network, *box, row[:3].numpy())
        row[3] = (0.01 if number % 2 else -0.01) - exact
    network[-1] = last
    graph, _ = trace(network, images)
    propagation = Propagation(graph, network, region)
    with torch.no_grad():
        propagation.forwards(tighten=True)
        found = branched(propagation, graph.output, rows, 200)
        assert (found > 0).tolist() == [False, True] * 3
        for number in range(6):
            one = propagation.select(torch.tensor([number]))
            alone = branched(one, graph.output, rows[number : number + 1], 200)
            assert bool(alone > 0) == bool(number % 2)


@pytest.mark.parametrize("splits", [1, 5, 12])
def test_no_more_splits_are_made_than_allowed(splits, monkeypatch):
    made = []
    original = module._split

    def counted(parts):
        made.append(len(parts.owner))
        return original(parts)

    monkeypatch.setattr(module, "_split", counted)
    with torch.no_grad():
        propagation, place, row, _ = question(5, shift=-0.001)
        branched(propagation, place, row, splits)
    assert 0 < sum(made) <= splits


def test_a_negative_slope_is_unsound_and_would_be_noticed():
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
    assert bool(result.success.any())
    shares = []
    for methods in (("ibp", "crown-ibp", "crown"), ("alpha-crown",), ("branching",)):
        everything = torch.ones(len(images), dtype=torch.bool)
        found = proofs(classifier, images, labels, threat, methods, everything, 32, 60)
        assert not bool((found.margin > 0)[result.success].any())
        shares.append(int((found.margin > 0).sum()))
    assert shares[0] <= shares[1] <= shares[2]
    assert shares[2] > shares[0]


@pytest.mark.parametrize("goal", [Evade(), AnyError()])
@pytest.mark.parametrize("score", ["margin", "energy"])
def test_thresholds_are_certified_and_nothing_that_is_broken(trained, score, goal):
    network, images, labels = trained
    limit = {"margin": 0.1, "energy": 2.0}[score]
    classifier = ConfidenceThreshold(network, 10, score=score, threshold=limit)
    threat = ThreatModel("l2", 0.3, goal=goal)
    result = PGD(steps=20)(classifier, images, labels, threat)
    everything = torch.ones(len(images), dtype=torch.bool)
    found = proofs(classifier, images, labels, threat, ("branching",), everything, 32, 5)
    assert not bool((found.margin > 0)[result.success].any())
    assert bool((found.margin > 0).any())


def test_networks_without_rectifiers_are_certified():
    images = torch.tensor([0.75, 0.25]).view(1, 1, 1, 2)
    linear = nn.Sequential(nn.Flatten(), nn.Linear(2, 2, bias=False))
    with torch.no_grad():
        linear[1].weight.copy_(torch.eye(2))
    for network in (linear, nn.Sequential(*linear, nn.Sigmoid())):
        for method in ("alpha-crown", "branching"):
            for eps, expected in ((0.2, 0), (0.3, 1)):
                threat = ThreatModel("linf", eps)
                found = certify(
                    Classifier(network, 2), images, torch.tensor([0]), threat, (method,)
                )
                assert found.status.tolist() == [expected]


def test_the_weights_of_a_model_get_no_gradient(trained):
    network, images, labels = trained
    classifier = Classifier(copy.deepcopy(network).double(), 10)
    certify(classifier, images[:8], labels[:8], "linf:0.06", ("branching",), splits=3)
    assert all(one.grad is None for one in classifier.parameters())
