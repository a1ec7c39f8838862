"""Bounds are sound: points inside a region never leave them, and independent oracles agree."""

import math
from collections import OrderedDict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from demur import Classifier, networks
from demur.bounds import Propagation, Region, UnsupportedLayerError, trace
from demur.bounds.affine import Convolution, Linear
from demur.bounds.folding import Folded
from demur.bounds.optimised import branched, optimised
from demur.certificates import certify
from demur.certificates.problem import SLOPES, Problem
from demur.classifier import evaluating
from demur.defenses import CertifiedConsistency
from demur.defenses.filters import GaussianFilter, MedianFilter
from demur.defenses.rbf_svm import OneVsRestRBFSVM
from tiny_networks import exact_minimum, plain_intervals, tiny

SHAPE = (2, 6, 6)
PIXELS = math.prod(SHAPE)


class Residual(nn.Module):
    """A sum of two branches, a functional rectifier in place, and a flatten call."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(2, 3, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(3)
        self.second = nn.Conv2d(3, 2, 3, padding="same")
        self.last = nn.Linear(PIXELS, 4)

    def forward(self, images):
        inner = F.relu(self.norm(self.first(images)), inplace=True)
        out = self.second(inner)
        out += images
        joined = torch.cat([out, 1 - out[:, :1]], dim=1)[:, 1:]
        return self.last(F.leaky_relu(joined, 0.1).view(images.size(0), -1))


class TwoReaders(nn.Module):
    """A convolution that a batch norm reads, and a sum."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(2, 3, 3)
        self.norm = nn.BatchNorm2d(3)

    def forward(self, images):
        values = self.first(images)
        return self.norm(values) + values


class Normalised(nn.Module):
    """Centring and normalisation with numbers and buffers, and a shortcut that is padded."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.4, 0.6]))
        self.register_buffer("std", torch.tensor([0.2, 0.3]).view(1, 2, 1, 1))

    def forward(self, images):
        values = ((images - 0.5) - self.mean.view(2, 1, 1)) / self.std * 2
        small = -F.avg_pool2d(values, 2)
        return F.pad(small, (0, 0, 0, 0, 1, 2)).mean(dim=(2, 3)) + torch.tensor([1.0] * 5)


def machines():
    draw = torch.Generator().manual_seed(3)
    support = torch.rand(7, PIXELS, generator=draw)
    parts = (support, torch.rand(PIXELS, generator=draw), torch.randn(7, 3, generator=draw))
    return OneVsRestRBFSVM(*parts, torch.randn(3, generator=draw), torch.zeros(3, 2), gamma=0.05)


LAYERS = OrderedDict(
    linear=lambda: nn.Sequential(nn.Flatten(), nn.Linear(PIXELS, 5)),
    convolution=lambda: nn.Conv2d(2, 4, 3, stride=2, padding=1, groups=2),
    dilated=lambda: nn.Conv2d(2, 3, (3, 2), dilation=2, padding=(2, 1), bias=False),
    norm=lambda: nn.BatchNorm2d(2),
    norm1d=lambda: nn.Sequential(nn.Flatten(), nn.BatchNorm1d(PIXELS, affine=False)),
    relu=lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(inplace=True)),
    leaky=lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.LeakyReLU(0.2)),
    maximum=lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.MaxPool2d(2)),
    overlapping=lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.MaxPool2d(3, 2, padding=1)),
    ceil=lambda: nn.MaxPool2d(4, ceil_mode=True),
    average=lambda: nn.AvgPool2d(3, 2, padding=1),
    adaptive=lambda: nn.AdaptiveAvgPool2d(2),
    dropout=lambda: nn.Sequential(nn.Dropout(0.5), nn.Dropout2d(), nn.Flatten()),
    gaussian=lambda: nn.Sequential(GaussianFilter(0.6), nn.Conv2d(2, 2, 3), nn.ReLU()),
    median=lambda: nn.Sequential(MedianFilter(3), nn.Conv2d(2, 2, 3)),
    machines=lambda: nn.Sequential(nn.Flatten(), machines()),
    sigmoid=lambda: nn.Sequential(nn.Flatten(), nn.Linear(PIXELS, 4), nn.Sigmoid()),
    sequence=lambda: nn.Sequential(nn.Flatten(2), nn.Linear(36, 2), nn.BatchNorm1d(2)),
    softmax=lambda: nn.Sequential(nn.Flatten(), nn.Linear(PIXELS, 4), nn.Softmax(1)),
    residual=Residual,
    readers=TwoReaders,
    normalised=Normalised,
    dense=lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(PIXELS, 12), nn.ReLU(), nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 4)
    ),
    small=lambda: networks.certified_cnn(4, channels=2, size=8)[:6],
    wide=lambda: networks.wide_resnet(3, channels=2, size=4, widen=1, units=1)[1:3],
)


def made(name, seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = LAYERS[name]()
        for part in module.modules():
            if isinstance(part, nn.BatchNorm2d | nn.BatchNorm1d):
                part.running_mean.normal_(0, 0.3)
                part.running_var.uniform_(0.2, 2)
                if part.affine:
                    part.weight.data.normal_()
                    part.bias.data.normal_()
        return module.eval()


def inside(region, images, eps, norm, mask, module, seed):
    """Random points, corners, and ends of gradient steps, of the region, in float64."""
    draw = torch.Generator().manual_seed(seed)
    for number in range(24):
        step = torch.randn(images.shape, generator=draw, dtype=torch.float64)
        if number % 3 == 0:
            step = step.sign()
        elif number % 3 == 1:
            step = torch.rand(step.shape, generator=draw, dtype=torch.float64) * 2 - 1
        else:  # towards larger values of a random sum of outputs
            given = images.clone().requires_grad_(True)
            out = module(given)
            weights = torch.randn(out.shape, generator=draw, dtype=torch.float64)
            (step,) = torch.autograd.grad((out * weights).sum(), given)
            step = step.sign() if norm == "linf" else step
        step = step * mask
        if norm == "l2":
            length = step.flatten(1).norm(dim=1).clamp(min=1e-12).view(-1, 1, 1, 1)
            step = step / length
        yield (images + eps * step.clamp(-1, 1)).clamp(0, 1).detach()


def contained(values, lower, upper):
    size = torch.maximum(lower.abs(), upper.abs()) + 1
    return bool(((values >= lower - 1e-9 * size) & (values <= upper + 1e-9 * size)).all())


def soundness(name, eps, norm, masked, seed, loosened=0.0):
    """Count the points of which no node and no linear function leaves its bounds."""
    module = made(name, seed).double()
    draw = torch.Generator().manual_seed(seed)
    images = torch.rand(3, *SHAPE, generator=draw, dtype=torch.float64)
    mask = torch.ones(1, *SHAPE, dtype=torch.float64)
    if masked:
        mask = (torch.rand(mask.shape, generator=draw) > 0.4).double()
    graph, scores = trace(module, images)
    assert torch.equal(scores, module(images))
    region = Region.around(images, eps, norm, mask if masked else None)
    bounds = []
    shape = graph.nodes[graph.output].shape
    count = min(4, math.prod(shape))
    rows = torch.randn(count, *shape, generator=draw, dtype=torch.float64)
    rows[0] = 0
    rows[0].view(-1)[0] = 1
    for tighten in (False, True):
        propagation = Propagation(graph, module, region)
        lower, upper = propagation.forwards(tighten)[graph.output]
        bounds.append((lower + loosened, upper - loosened))
        owner = torch.arange(3).repeat_interleave(count)
        for slope in ("adaptive", "flat", "steep"):
            found = propagation.backwards(
                graph.output, rows.repeat(3, *[1] * len(shape)), owner, slope
            )
            bounds.append((found.lower.view(3, count), None))
        some, each = propagation.select(owner), rows.repeat(3, *[1] * len(shape))
        with torch.no_grad():
            best, _ = optimised(some, graph.output, each, steps=3)
            parts = branched(some, graph.output, each, splits=2)
        bounds += [(best.lower.view(3, count), None), (parts.view(3, count), None)]
    if len(shape) == 1:
        found = propagation.lower_by_intervals(graph.output, rows.expand(3, -1, -1))
        bounds.append((found.lower, None))
    points = 0
    for point in inside(region, images, eps, norm, mask, module, seed):
        values = module(point).detach()
        sums = (values.flatten(1) @ rows.flatten(1).T).detach()
        for lower, upper in bounds:
            if upper is None:
                assert contained(sums, lower, torch.full_like(lower, 1e300)), name
            else:
                assert contained(values, lower, upper), name
        points += len(point)
    return points


COUNTED = {}


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("name", LAYERS)
@settings(max_examples=4)
@given(eps=st.sampled_from([0.0, 0.01, 0.1, 0.6]), masked=st.booleans(), seed=st.integers(0, 99))
def test_no_point_of_a_region_leaves_the_bounds(name, norm, eps, masked, seed):
    COUNTED[name, norm] = COUNTED.get((name, norm), 0) + soundness(name, eps, norm, masked, seed)


def test_more_than_ten_thousand_points_were_tried():
    if len(COUNTED) < 2 * len(LAYERS):
        pytest.skip("the tests above did not all run")
    assert sum(COUNTED.values()) >= 10_000


@pytest.mark.parametrize("name", ["dense", "residual", "gaussian"])
def test_bounds_that_are_too_tight_are_noticed(name):
    """Negative control."""
    with pytest.raises(AssertionError):
        soundness(name, 0.1, "linf", False, 0, loosened=1.0)


def test_an_unsound_operation_is_noticed(monkeypatch):
    """Negative control: a convolution that forgets the sign of its weights."""
    original = Convolution.interval

    def wrong(self, tensors, given):
        low, high = original(self, tensors, given)
        return type(given[0])(low + 0.3 * (high - low), high)

    monkeypatch.setattr(Convolution, "interval", wrong)
    with pytest.raises(AssertionError):
        soundness("convolution", 0.1, "linf", False, 0)


# Oracles


def test_batch_norms_are_folded_only_into_layers_that_nothing_else_reads():
    images = torch.rand(2, *SHAPE)
    for module, expected in (
        (nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)), 1),
        (nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.BatchNorm2d(3)), 1),
        (TwoReaders(), 0),
        (nn.Sequential(nn.Flatten(2), nn.Linear(36, 2), nn.BatchNorm1d(2)), 0),
        (nn.Sequential(nn.BatchNorm2d(2), nn.Conv2d(2, 3, 3)), 0),
    ):
        graph, _ = trace(module.eval(), images)
        assert sum(isinstance(node.operation, Folded) for node in graph.nodes) == expected


@pytest.mark.parametrize("seed", range(3))
def test_ibp_is_plain_interval_arithmetic(seed):
    network = tiny(seed)
    images = torch.rand(1, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    graph, _ = trace(network, images.float())
    region = Region.around(images, 0.1)
    with torch.no_grad():
        low, high = Propagation(graph, network, region).forwards()[graph.output]
    box = [one[0].numpy() for one in region.box]
    expected = plain_intervals(network, *box)
    assert np.allclose(low[0].numpy(), expected[0], atol=1e-12)
    assert np.allclose(high[0].numpy(), expected[1], atol=1e-12)


@pytest.mark.parametrize("seed", range(6))
def test_exact_minima_lie_above_all_bounds_and_crown_is_the_tightest(seed):
    network = tiny(seed)
    draw = torch.Generator().manual_seed(seed)
    images = torch.rand(1, 4, generator=draw, dtype=torch.float64)
    graph, _ = trace(network, images.float())
    region = Region.around(images, 0.15)
    row = torch.randn(1, 3, generator=draw, dtype=torch.float64)
    exact = exact_minimum(network, *[one[0].numpy() for one in region.box], row[0].numpy())
    best = {}
    for tighten in (False, True):
        propagation = Propagation(graph, network, region)
        propagation.forwards(tighten)
        owner = torch.zeros(1, dtype=torch.int64)
        best["crown" if tighten else "crown-ibp"] = max(
            float(propagation.backwards(graph.output, row, owner, slope).lower)
            for slope in ("adaptive", "flat", "steep")
        )
        if not tighten:
            best["ibp"] = float(propagation.lower_by_intervals(graph.output, row[None]).lower)
    assert max(best.values()) <= exact + 1e-9
    assert best["crown"] >= best["crown-ibp"] - 1e-4
    # Negative control: the bounds are not vacuous.
    assert best["crown"] >= exact - 2


def test_an_affine_network_has_exact_bounds():
    network = nn.Sequential(nn.Flatten(), nn.Linear(PIXELS, 3), nn.Linear(3, 2)).double()
    images = torch.rand(2, *SHAPE, dtype=torch.float64) * 0.4 + 0.3
    graph, scores = trace(network, images)
    weight = network[2].weight @ network[1].weight
    row = torch.tensor([[1.0, -1.0]], dtype=torch.float64)
    length = {"linf": (row @ weight).abs().sum(), "l2": (row @ weight).norm()}
    for norm, expected in length.items():
        propagation = Propagation(graph, network, Region.around(images, 0.1, norm))
        propagation.forwards()
        rows = row.repeat(2, 1)
        found = propagation.backwards(graph.output, rows, torch.arange(2)).lower
        exact = (scores @ row[0]) - 0.1 * expected
        assert torch.allclose(found, exact, atol=2e-4) and bool((found <= exact).all())


# What is refused


class Custom(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, images):
        return self.function(images)


class Hidden(torch.autograd.Function):
    @staticmethod
    def forward(context, images):
        return images * (images.detach().numpy() > 0.5).astype("float32")

    @staticmethod
    def backward(context, gradient):
        return gradient


REFUSED = {
    "gelu": nn.GELU(),
    "a conversion": Custom(lambda x: x.bfloat16()),
    "a product": Custom(lambda x: x * x),
    "a quotient": Custom(lambda x: 1 / (x + 1)),
    "a branch": Custom(lambda x: x if x.sum() > 3 else -x),
    "item": Custom(lambda x: x * x.max().item()),
    "numpy": Custom(lambda x: torch.from_numpy(x.detach().numpy().copy())),
    "data": Custom(lambda x: torch.relu(x.data)),
    "hidden": Custom(Hidden.apply),
    "batch": Custom(lambda x: x - x.mean(0)),
    "mixed": Custom(lambda x: x.view(-1, 2, 6, 3)),
    "shared": Custom(lambda x: F.relu_(x.view(len(x), -1)).sum(1, keepdim=True) + x.flatten(1)),
    "constant": Custom(lambda x: torch.ones(len(x), 3)),
    "pad": Custom(lambda x: F.pad(x, (1, 1), value=3.0)),
    "script": torch.jit.script(nn.Sequential(nn.Flatten(), nn.Linear(PIXELS, 2))),
    "dropout": Custom(lambda x: F.dropout(x, 0.5, training=True)),
    "noise": Custom(lambda x: x + torch.rand(len(x), 1, 1, 1)),
    "layer norm": nn.LayerNorm(6),
    "no statistics": nn.BatchNorm2d(2, track_running_stats=False),
    "steep": nn.LeakyReLU(2.0),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_has_no_bounds_is_refused_with_the_name_of_its_layer(name):
    network = nn.Sequential(OrderedDict(first=nn.ReLU(), odd=REFUSED[name])).eval()
    with pytest.raises(UnsupportedLayerError) as caught:
        trace(network, torch.rand(2, *SHAPE))
    expected = "the model itself" if name == "constant" else "odd"
    assert caught.value.layer.split(".")[0] == expected and "\n" not in str(caught.value)
    assert nn.Module.__call__.__qualname__ == nn.Module().__class__.__call__.__qualname__
    assert torch.equal(nn.ReLU()(torch.ones(1)), torch.ones(1))  # calls are as before


def test_batch_norms_in_training_take_the_statistics_of_the_clean_images():
    network = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten())
    network.append(nn.Linear(48, 2))
    images = torch.rand(8, *SHAPE)
    before = network[1].running_mean.clone()
    graph, scores = trace(network, images)
    assert not torch.equal(network[1].running_mean, before)
    again = nn.Sequential(*network)
    with torch.no_grad():
        assert torch.allclose(again(images), scores, atol=1e-6)
    propagation = Propagation(graph, network, Region.around(images, 0.0))
    low, high = propagation.forwards()[graph.output]
    assert torch.allclose(low, scores, atol=1e-4) and torch.allclose(high, scores, atol=1e-4)
    propagation.lower_by_intervals(
        graph.output, torch.eye(2).expand(8, 2, 2)
    ).lower.sum().backward()
    assert float(network[0].weight.grad.abs().sum()) > 0


def test_the_box_is_clipped_and_a_mask_shrinks_it():
    images = torch.tensor([[[[0.05, 0.5], [0.97, 0.5]]]], dtype=torch.float64)
    mask = torch.tensor([[[[1.0, 0.5], [1.0, 0.0]]]])
    low, high = Region.around(images, 0.1, "linf", mask).box
    assert torch.allclose(low[0, 0], torch.tensor([[0, 0.45], [0.87, 0.5]]).double(), atol=1e-6)
    assert torch.allclose(high[0, 0], torch.tensor([[0.15, 0.55], [1, 0.5]]).double(), atol=1e-6)
    whole = Region.around(images, math.inf, "linf", mask > 0).box
    assert whole.lower.flatten().tolist() == [0, 0, 0, 0.5]
    narrow = Region.around(images, 0.1, "linf", mask, less=0.06).box
    assert torch.allclose(
        narrow.upper - images, torch.tensor([[0.04, 0], [0.03, 0]]).double(), atol=1e-6
    )


def test_weights_are_found_by_name_after_a_copy():
    network = nn.Sequential(nn.Flatten(), nn.Linear(PIXELS, 2)).eval()
    images = torch.rand(1, *SHAPE)
    with evaluating(network):
        graph, _ = trace(network, images)
    assert isinstance(graph.nodes[-1].operation, Linear)
    with torch.no_grad():
        network[1].weight.zero_()
        network[1].bias.copy_(torch.tensor([1.0, 2.0]))
    low, _ = Propagation(graph, network, Region.around(images, 0.5)).forwards()[-1]
    assert low.tolist() == [[1.0, 2.0]]


@pytest.mark.parametrize("name", ["convolutions", "residual", "pooling"])
def test_bounds_that_go_back_in_parts_are_equal_and_take_little_memory(name, monkeypatch):
    module, images = parts_of(name)
    graph, scores = trace(module, images)
    rows = torch.randn(images.shape[0] * 7, scores.shape[1], dtype=torch.float64)
    owner = torch.arange(images.shape[0]).repeat_interleave(7)
    largest = max(torch.Size(node.shape).numel() for node in graph.nodes)
    seen = []
    original = Propagation._back

    def counted(self, number, sent, *rest):
        seen.append(sent.numel())
        return original(self, number, sent, *rest)

    monkeypatch.setattr(Propagation, "_back", counted)
    found = {}
    for entries in (1 << 40, 3 * largest, 1):
        monkeypatch.setattr("demur.bounds.propagation.ENTRIES", entries)
        seen.clear()
        propagation = Propagation(graph, module, Region.around(images.double(), 0.1))
        propagation.forwards(tighten=True)
        of_all = [propagation.backwards(graph.output, rows, owner, slope) for slope in SLOPES]
        of_one = propagation.backwards(graph.output, rows[:5], 0)
        found[entries] = [*propagation.intervals[graph.output], *of_one]
        found[entries] += [values for one in of_all for values in one]
        assert max(seen) <= max(entries, largest)
    whole, *others = found.values()
    for one in others:
        for expected, values in zip(whole, one, strict=True):
            assert torch.allclose(values, expected, rtol=1e-12, atol=1e-12)


def test_certificates_of_few_images_at_a_time_are_equal(monkeypatch):
    module, images = parts_of("convolutions")
    model = Classifier(module, 3)
    labels = model.predict(images)
    whole = certify(model, images, labels, "linf:0.01")
    monkeypatch.setattr("demur.certificates.problem.VALUES", 1)
    monkeypatch.setattr("demur.bounds.propagation.ENTRIES", 1)
    parts = certify(model, images, labels, "linf:0.01")
    assert torch.equal(parts.status, whole.status) and parts.by == whole.by
    assert torch.allclose(parts.margin, whole.margin, rtol=1e-9, atol=1e-12)


def test_rows_that_intervals_prove_are_left_out_and_change_no_status(monkeypatch):
    """With a reject column: 11 options for each wrong class."""
    module, images = parts_of("convolutions")
    model = Classifier(nn.Sequential(module, nn.Linear(3, 4)), 3)
    labels = model.scores(images)[:, :3].argmax(1)
    seen = []
    original = Propagation.backwards

    def counted(self, place, rows, *rest):
        seen.append(len(rows))
        return original(self, place, rows, *rest)

    monkeypatch.setattr(Propagation, "backwards", counted)
    sizes = [0.003, 0.03, 0.1, 0.2, 0.4, 0.8]
    fewer = [certify(model, images, labels, f"linf:{eps}", ("crown-ibp",)) for eps in sizes]
    work = sum(seen)
    seen.clear()
    whole = Problem._lower
    monkeypatch.setattr(Problem, "_lower", lambda self, *given: whole(self, *given[:3]))
    every = [certify(model, images, labels, f"linf:{eps}", ("crown-ibp",)) for eps in sizes]
    assert work < sum(seen)
    statuses = [one.status.tolist() for one in every]
    assert [one.status.tolist() for one in fewer] == statuses
    assert len({value for status in statuses for value in status}) > 1
    for one, other in zip(fewer, every, strict=True):
        unknown = other.status != 0
        assert torch.allclose(one.margin[unknown], other.margin[unknown], rtol=1e-9)
        assert bool((one.margin <= other.margin + 1e-12).all())


def test_methods_that_have_no_image_left_do_nothing():
    """All images are proven by the first method, or all are broken."""
    module, images = parts_of("convolutions")
    model = Classifier(module, 3)
    labels = model.predict(images)
    assert certify(model, images, labels, "linf:0.000001").by == ("ibp",) * 3
    assert certify(model, images, (labels + 1) % 3, "linf:0.01").status.tolist() == [2] * 3


def test_a_check_by_linear_bounds_takes_little_memory(monkeypatch):
    module, images = parts_of("convolutions")
    whole = CertifiedConsistency(module, 3, 0.01, "crown-ibp").scores(images)
    seen = []
    original = Propagation._back

    def counted(self, number, sent, *rest):
        seen.append(len(sent))
        return original(self, number, sent, *rest)

    monkeypatch.setattr(Propagation, "_back", counted)
    monkeypatch.setattr("demur.bounds.propagation.ENTRIES", 1)
    parts = CertifiedConsistency(module, 3, 0.01, "crown-ibp").scores(images)
    assert max(seen) == 1 and torch.allclose(parts, whole, atol=1e-5)


def parts_of(name):
    """A small network and images: with convolutions, a sum of branches, or pooling."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        images = torch.rand(3, 1, 8, 8)
        start = [nn.Conv2d(1, 4, 3, padding=1), nn.ReLU()]
        middle = {
            "convolutions": [nn.Conv2d(4, 6, 3, stride=2), nn.ReLU()],
            "residual": [Branches(), nn.ReLU()],
            "pooling": [nn.MaxPool2d(2), nn.Conv2d(4, 6, 3), nn.ReLU()],
        }[name]
        layers = [*start, *middle, nn.Flatten()]
        width = nn.Sequential(*layers)(images).shape[1]
        return nn.Sequential(*layers, nn.Linear(width, 3)).eval(), images


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, images):
        return images + self.inner(images).relu()
