"""The self-tests that ask the model: each sees the fault that it is for, and no other."""

import polars as pl
import pytest
import torch
from scipy import stats
from torch import nn

import demur
from demur import Classifier, attacks
from demur.evaluation.audit_counts import averaged, counted, low_of, power, worst_of
from demur.evaluation.audit_results import CheckRow
from demur.evaluation.audit_rows import Ran, computed_rows
from demur.evaluation.handshake import HandshakeError, handshake
from demur.evaluation.records import SCHEMA
from demur.evaluation.selftests import Binarization, Constancy, Convergence, Stability
from demur.evaluation.selftests.binarization import _separated, last_layer
from demur.threat import ThreatModel
from models import Constant, Linear, images_of

THREAT = ThreatModel("linf", 0.1)


def dense(outputs=3, seed=0, size=8):
    """A network with a rectifier, whose last layer reads 60 features."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        parts = nn.Flatten(), nn.Linear(size**2, 60), nn.ReLU(), nn.Linear(60, outputs)
        return nn.Sequential(*parts).eval()


def network(outputs=3, rejects=False):
    return Classifier(dense(outputs), 3, rejects=rejects)


def some(count=6):
    images = images_of(count)
    return images, network().predict(images)


class Around(nn.Module):
    """A network inside a function."""

    def __init__(self, function, inner=None):
        super().__init__()
        self.function = function
        self.inner = inner or dense()

    def forward(self, images):
        return self.function(self.inner, images)


def classifier(function):
    return Classifier(Around(function), 3, rejects=False)


# Counts and bounds


@pytest.mark.parametrize(("count", "n"), [(0, 10), (1, 50), (3, 8), (8, 8)])
def test_the_bound_is_the_one_sided_one_of_clopper_and_pearson(count, n):
    """A binomial share at the bound gives so many successes or more in 5 % of all samples."""
    low = low_of(count, n)
    if not count:
        assert low == 0
    else:
        assert stats.binom.sf(count - 1, n, low) == pytest.approx(0.05)


@pytest.mark.parametrize("limit", [0.0, 0.002, 0.01, 0.05])
@pytest.mark.parametrize("n", [5, 20, 100])
def test_the_power_is_the_smallest_count_that_is_flagged(n, limit):
    states = [counted("x", count, n, limit, "").state for count in range(n + 1)]
    flagged = [count for count, state in enumerate(states) if state == "flagged"]
    assert power(n, limit) == flagged[0]
    assert flagged == list(range(flagged[0], n + 1))


def test_a_check_that_can_flag_nothing_says_so():
    assert "flags nothing" in counted("x", 0, 1, 0.5, "").text
    assert counted("x", 0, 0, 0.5, "").state == "not_run"


def test_a_mean_is_flagged_only_if_its_bound_is_above_the_limit():
    values = torch.tensor([0.0, 0.3] * 5)
    assert averaged("x", values, 0.1, "it").state == "passed"
    assert averaged("x", values.repeat(20), 0.1, "it").state == "flagged"
    assert averaged("x", values.repeat(20), 0.2, "it").state == "passed"


def test_one_row_stands_for_all_threats():
    rows = [
        CheckRow("x", value, 0, state, "") for value, state in ((0.3, "passed"), (0.1, "flagged"))
    ]
    assert worst_of(rows).state == "flagged"
    assert worst_of(rows[:1]).value == 0.3


# Unstable predictions


def test_the_change_of_a_linear_margin_is_known():
    """The mean of abs(d) is radius / 4 for d uniform in +-radius / 2."""
    model = Classifier(Linear(torch.tensor([[2.0], [0.0]])), 2)
    images, labels = torch.full((400, 1, 1, 1), 0.5), torch.zeros(400, dtype=torch.int64)
    images += torch.arange(400).view(-1, 1, 1, 1) * 1e-6  # so that the draws differ
    _, found = Stability(draws=20).run(model, images, labels, 0, 512)
    assert float(found["change"].mean()) == pytest.approx(8 / 255 / 4 / 0.5, rel=0.05)


def test_a_surface_like_a_checkerboard_is_unstable_and_a_constant_one_is_not():
    images, labels = some()
    board = classifier(lambda net, x: 50 * (999 * x.flatten(1)[:, :3]).sin() + net(x))
    assert float(Stability(20).run(board, images, labels, 0, 8)[1]["change"].mean()) > 0.3
    constant = Classifier(Constant([1.0, 0.0, 0.5]), 3)
    assert float(Stability(20).run(constant, images, labels, 0, 8)[1]["change"].max()) == 0


def test_stability_does_not_depend_on_batches():
    """R10."""
    images, labels = some()
    runs = [Stability(3).run(network(), images, labels, 0, size)[1]["change"] for size in (1, 6)]
    assert torch.allclose(*runs, atol=1e-6)


# Hidden state


class Counter(nn.Module):
    """Another answer from some call on."""

    def __init__(self, calls):
        super().__init__()
        self.inner = dense()
        self.calls = calls

    def forward(self, images):
        self.calls -= 1
        scores = self.inner(images)
        return scores if self.calls >= 0 else scores.roll(1, 1)


class Statistics(nn.Module):
    """A buffer that every pass changes."""

    def __init__(self):
        super().__init__()
        self.inner = dense()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, images):
        self.seen += 1
        return self.inner(images)


def with_gradients_other(net, images):
    scores = net(images)
    return scores.roll(1, 1) if torch.is_grad_enabled() else scores


def by_the_batch(net, images):
    return net(images).roll(int(1000 * images.sum()) % 3, 1)


def reseeding(net, images):
    torch.manual_seed(3)
    return net(images) + 1e-6 * torch.rand(1)


def constancy(model, images):
    first = tuple(model.predict(images).tolist())
    return Constancy(first).run(model, images, torch.zeros(len(images)), 0, 4)


@pytest.mark.parametrize(
    "module",
    [Counter(3), Around(with_gradients_other), Around(by_the_batch)],
    ids=["call counter", "answers attacks differently", "looks at the batch"],
)
def test_an_answer_that_depends_on_more_than_the_image_is_seen(module):
    """R15."""
    images, _ = some(8)
    _, found = constancy(Classifier(module, 3, rejects=False), images)
    assert found["differs"].any()


def test_a_model_that_seeds_the_process_or_changes_buffers_is_seen():
    images, _ = some(8)
    values, _ = constancy(classifier(reseeding), images)
    assert values["reseeds"]
    values, found = constancy(Classifier(Statistics(), 3, rejects=False), images)
    assert values["buffers"] == ["module.seen"]
    assert not found["differs"].any()


def test_a_plain_model_has_no_hidden_state():
    """Negative control."""
    images, _ = some(8)
    values, found = constancy(network(), images)
    assert not found["differs"].any()
    assert not values["reseeds"]
    assert values["buffers"] == []


# The path of an attack


def test_a_path_that_still_climbs_is_incomplete_and_a_flat_one_is_not():
    """The loss of a linear model climbs by the same amount in each step until eps is reached."""
    model = Classifier(Linear(torch.tensor([[1.0], [0.0]])), 2)
    images, labels = torch.full((2, 1, 1, 1), 0.9), torch.zeros(2, dtype=torch.int64)
    threat = ThreatModel("linf", 0.2)
    climbing = attacks.PGD(steps=20, step_size=0.01)
    _, found = Convergence(climbing, threat).run(model, images, labels, 0, 4)
    assert found["left"].all()
    assert found["change"].tolist() == pytest.approx([2 / 19] * 2, abs=1e-3)
    _, found = Convergence(attacks.PGD(steps=20), threat).run(model, images, labels, 0, 4)
    assert found["change"].tolist() == [0, 0]


def test_broken_images_have_no_path_and_a_second_answer_is_a_transfer_failure():
    """R14."""
    images, labels = some()
    wide = ThreatModel("linf", 1.0)
    _, found = Convergence(attacks.PGD(steps=20), wide).run(network(), images, labels, 0, 8)
    assert not found["left"].any()
    assert not found["differs"].any()
    other = classifier(with_gradients_other)
    _, found = Convergence(attacks.PGD(steps=20), THREAT).run(other, images, labels, 0, 8)
    assert found["differs"].any()


# Binarization


def binarized(model, attack=attacks.PGD(steps=40), threat=THREAT, points=29):
    images, labels = some(4)
    return Binarization(attack, threat, points).run(model, images, labels, 0, 16)


def test_an_attack_solves_the_tasks_of_a_plain_network_and_random_points_do_not():
    for threat in (THREAT, ThreatModel("l2", 1.0)):
        values, found = binarized(network(), threat=threat)
        assert values["layer"] == "Linear"
        assert found["built"].all()
        assert found["solved"].all()
        assert not found["random"].all()


def test_rounded_pixels_and_a_weak_attack_leave_tasks_unsolved():
    rounded = classifier(lambda net, x: net((x * 8).round() / 8))
    _, found = binarized(rounded)
    assert found["built"].any()
    assert not (found["solved"] & found["built"]).any()
    _, found = binarized(network(), attacks.RandomNoise(draws=5))
    assert not found["solved"].any()


def test_all_points_of_a_rejecting_model_are_accepted_and_so_is_a_success():
    """R18. The model rejects what is brighter than usual: half of all corners."""
    images, _ = some(4)
    bright = float(images.mean()) + 0.05

    def reject(net, x):
        scores = net(x)
        ahead = 20 * (x.flatten(1).mean(1) - bright)
        return torch.cat([scores, (scores.amax(1) + ahead)[:, None]], 1)

    model = Classifier(Around(reject), 3, rejects=True)
    seen = []
    probe = Binarization(attacks.PGD(steps=60), THREAT, 29)
    layer = last_layer(model, images)
    for image in images.split(1):
        task = probe._built(model, layer, image, 0, 16)
        if task is None:
            continue
        found = attacks.PGD(steps=60)(task, image, torch.tensor([0]), THREAT)
        seen += [int(model.predict(one[None])[0]) >= 0 for one in found.images[found.success]]
    assert seen
    assert all(seen)


def test_a_model_that_rejects_everything_has_no_task():
    shut = Classifier(Around(lambda net, x: torch.cat([net(x), net(x).amax(1)[:, None] + 1], 1)), 3)
    shut.predict(images_of(1))
    assert not binarized(shut)[1]["built"].any()


def test_without_a_linear_layer_there_is_no_task():
    model = Classifier(Linear(torch.randn(3, 64)), 3, rejects=False)
    values, found = binarized(model)
    assert values["layer"] == ""
    assert not found["built"].any()


def test_the_new_layer_separates_the_points_close_to_the_outer_one():
    generator = torch.Generator().manual_seed(0)
    inner = torch.randn(30, 50, generator=generator).numpy()
    outer = torch.randn(1, 50, generator=generator).numpy() + 1
    weight, bias = _separated(inner, outer)
    values = torch.from_numpy(inner).double() @ weight + bias
    above = float(torch.from_numpy(outer).double()[0] @ weight + bias)
    assert values.max() < 0 < above
    assert above / (above - float(values.max())) == pytest.approx(0.001, rel=0.01)
    assert _separated(inner, inner[:10].mean(0, keepdims=True)) is None


# Rows from records


def row(index, attack, outcome, success=None, **values):
    place = {"dataset": "a", "split": "test", "repeat": 0, "index": index, "image": f"i{index}"}
    about = {"attacker": "defence-aware", "norm": "linf", "eps": 0.1, "goal": "evade", "linf": 0.1}
    if attack is None:
        about = {"attacker": "none", "linf": 0.0}
    margin = -1.0 if outcome == "wrong" else 1.0
    told = {"attack": attack, "outcome": outcome, "success": success, "class_margin": margin}
    return {**place, **about, **told, **values}


def frame(*rows):
    filled = [{name: one.get(name) for name in SCHEMA} for one in rows]
    return pl.DataFrame(filled, schema=SCHEMA)


def found_of(name, records, threat=THREAT):
    return Ran(name, threat, tuple(records["image"]), {}, {}, records, 0.0)


def rows_of(records, *found):
    return {one.name: one for one in computed_rows(records, found, {})}


CLEAN = [row(index, None, "correct") for index in range(10)]
LEFT = [row(index, "PGD(steps=10)", "correct", False) for index in range(10)]


def test_an_image_that_only_the_doubled_attack_breaks_is_counted_and_named():
    """R11."""
    doubled = [row(i, "APGD(steps=80)", "wrong" if i < 2 else "correct", i < 2) for i in range(10)]
    found = rows_of(frame(*CLEAN, *LEFT), found_of("doubling", frame(*doubled)))["doubling"]
    assert (found.value, found.state) == (0.2, "flagged")
    assert "i0, i1" in found.text
    known = [row(i, "PGD(steps=10)", "wrong", True) for i in range(2)]
    found = rows_of(frame(*CLEAN, *LEFT, *known), found_of("doubling", frame(*doubled)))
    assert found["doubling"].state == "passed"


def test_a_twin_that_keeps_more_than_the_model_is_flagged():
    """R15."""
    broken = [row(i, "PGD(steps=10)", "wrong", True) for i in range(10)]
    twin = found_of("twin", frame(*LEFT))
    assert rows_of(frame(*CLEAN, *broken), twin)["twin"].state == "flagged"
    assert rows_of(frame(*CLEAN, *LEFT), twin)["twin"].state == "passed"
    other = found_of("twin", frame(*broken))
    assert rows_of(frame(*CLEAN, *LEFT), other)["twin"].state == "passed"


def test_an_attack_that_does_not_notice_its_success_is_flagged():
    """R5, R14."""
    silent = row(0, "PGD(steps=10)", "wrong", False)
    assert rows_of(frame(*CLEAN, *LEFT[1:], silent))["silent success"].state == "flagged"
    assert rows_of(frame(*CLEAN, *LEFT))["silent success"].state == "passed"
    rounded = {**silent, "class_margin": -1e-9}
    assert rows_of(frame(*CLEAN, *LEFT[1:], rounded))["silent success"].state == "passed"


def test_a_test_without_a_result_is_not_run_and_one_with_a_reason_not_applicable():
    found = {one.name: one for one in computed_rows(frame(*CLEAN, *LEFT), [], {"twin": "none"})}
    assert found["twin"].state == "not_applicable"
    assert found["doubling"].state == "not_run"


# Broken models, by the quickest test that sees them


def blind(model):
    images, labels = some()
    with pytest.warns(demur.errors.DemurWarning):
        found = attacks.PGD(steps=10)(model, images, labels, THREAT)
    return bool((found.zero_gradients > 0.5 * found.backwards).all())


@pytest.mark.parametrize(
    "function",
    [
        lambda net, x: net((x * 4).round() / 4),
        lambda net, x: (1e6 * net(x)).softmax(1),
        lambda net, x: net(torch.where((x - 0.5).abs() < 2, (x * 9).floor() / 9, x)),
    ],
    ids=["quantised", "saturated", "thresholded"],
)
def test_masked_gradients_are_unavailable(function):
    """R14, R20."""
    assert blind(classifier(function))


def test_randomness_and_batch_statistics_are_found_by_the_handshake():
    images, labels = some(8)
    noisy = classifier(lambda net, x: net(x + 0.1 * torch.randn_like(x)))
    assert handshake(noisy, images, labels).randomised
    whole = classifier(lambda net, x: net((x - x.mean()) / x.std()))
    with pytest.raises(HandshakeError, match="other images of the batch"):
        handshake(whole, images, labels)
