"""RBF machines against scikit-learn's, and the two defences made of them. R17-R20."""

from copy import copy
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.calibration import CalibratedClassifierCV
from sklearn.model_selection import StratifiedKFold
from sklearn.multiclass import OneVsRestClassifier
from sklearn.svm import SVC
from torch import nn

from demur import Classifier, DemurError, Outcome, data, outcomes
from demur.attacks import AnyError, Evade, ForceReject, pgd, strongest, widened
from demur.defenses import DeepNeuralRejection, NeuralRejection, rbf_svm
from demur.defenses.neural_rejection import Taps, quantile_threshold
from demur.defenses.rbf_svm import RBFMachines, fit_rbf_svm, gram, search_rbf_svm
from demur.networks import fit


def digits_features(count=400):
    images = data.load("digits", "train")
    return images.floats()[:count].flatten(1), images.labels[:count]


@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-6), (torch.float32, 1e-4)])
def test_decision_values_are_scikit_learns(dtype, close):
    """R20, on real features."""
    features, labels = digits_features()
    features = features.to(dtype)
    machines, _ = fit_rbf_svm(features[:300], labels[:300], 10, C=1.0, gamma=0.01)
    reference = OneVsRestClassifier(SVC(kernel="rbf", C=1.0, gamma=0.01)).fit(features[:300].double().numpy(), labels[:300].numpy())
    expected = reference.decision_function(features.double().numpy())
    assert machines.support.dtype == dtype
    np.testing.assert_allclose(machines(features).numpy(), expected, atol=close * np.abs(expected).max())
    assert (machines(features).argmax(1).numpy() == reference.predict(features.double().numpy())).all()


def test_two_points_have_the_machine_that_can_be_worked_out():
    """With y = -1 and 1 at x = 0 and 1 both points lie on the margin: weight 1 / (1 - k(0, 1)), no intercept."""
    features, labels = torch.tensor([[0.0], [1.0]] * 5, dtype=torch.float64), torch.tensor([0, 1] * 5)
    machines, _ = fit_rbf_svm(features, labels, 2, C=1e3, gamma=0.5)
    apart = float(np.exp(-0.5))
    where = torch.linspace(-1, 2, 7, dtype=torch.float64)[:, None]
    exact = (torch.exp(-0.5 * (where - 1) ** 2) - torch.exp(-0.5 * where**2)).squeeze(1) / (1 - apart)
    torch.testing.assert_close(machines(where)[:, 1], exact, atol=2e-3, rtol=0)  # libsvm stops at a tolerance of 1e-3
    torch.testing.assert_close(machines(where)[:, 0], -exact, atol=2e-3, rtol=0)


def test_probabilities_are_platts_and_sum_to_one():
    """The sigmoids of scikit-learn's calibration, on the same folds."""
    features, labels = digits_features()
    features = features.double()
    machines, outside = fit_rbf_svm(features, labels, 10, C=1.0, gamma=0.01, folds=4, seed=3)
    folds = list(StratifiedKFold(4, shuffle=True, random_state=3).split(labels, labels))
    kernel = gram(features, 0.01)
    for k in (0, 8):
        one = CalibratedClassifierCV(SVC(kernel="precomputed", C=1.0), method="sigmoid", cv=folds, ensemble=False)
        sigmoid = one.fit(kernel, (labels == k).numpy()).calibrated_classifiers_[0].calibrators[0]
        np.testing.assert_allclose(machines.platt[k].numpy(), [sigmoid.a_, sigmoid.b_], rtol=1e-2, atol=1e-3)
    together = machines.probabilities(outside)
    torch.testing.assert_close(together.sum(1), torch.ones(len(features), dtype=torch.float64))
    assert float((together.argmax(1) == labels).double().mean()) > 0.85


def test_gradients_are_those_of_finite_differences():
    """R20: in float64, through the kernel, the sigmoids and the normalisation."""
    features, labels = digits_features(200)
    machines, _ = fit_rbf_svm(features.double(), labels, 10, C=1.0, gamma=0.01)
    start = features[:3].double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: machines.probabilities(machines(x)), start, atol=1e-6)


def test_pieces_and_half_precision_around_it_change_nothing(monkeypatch):
    features, labels = digits_features(200)
    machines, _ = fit_rbf_svm(features, labels, 10, C=1.0, gamma=0.01)
    whole = machines(features)
    monkeypatch.setattr(rbf_svm, "KERNEL_ENTRIES", 7 * len(machines.support))
    torch.testing.assert_close(machines(features), whole)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        torch.testing.assert_close(machines(features), whole)


def test_half_precision_is_for_gradients_and_leads_the_same_way():
    """The products alone are in bfloat16; decisions are made without gradients, in float32."""
    features, labels = digits_features(200)
    machines, _ = fit_rbf_svm(features, labels, 10, C=1.0, gamma=0.01)
    gradients = []
    for half in (False, True):
        given = features.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            values = machines(given)
        torch.testing.assert_close(values, machines(features), atol=0.02, rtol=0)
        gradients += torch.autograd.grad(values[:, 3].sum(), given)
    assert float(nn.functional.cosine_similarity(*gradients).min()) > 0.99
    with torch.no_grad():
        machines.support.mul_(0).add_(1)  # what was rounded before is not used again
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(machines._half().float(), machines.support)


def test_the_search_finds_what_cross_validation_finds():
    features, labels = digits_features()
    penalty, gamma, accuracy = search_rbf_svm(features, labels, 10, Cs=[1e-4, 1.0], gammas=[1e-5, 0.01])
    assert (penalty, gamma) == (1.0, 0.01) and len(accuracy) == 4
    _, outside = fit_rbf_svm(features, labels, 10, C=1.0, gamma=0.01)
    assert accuracy[1.0, 0.01] == pytest.approx(float((outside.argmax(1) == labels).double().mean()), abs=1e-3)


def test_a_search_sets_what_each_layers_machines_are_fitted_with(trained):
    network, images, labels = trained
    images, labels, tried = images[:300], labels[:300], {"Cs": [1e-4, 10.0], "gammas": [1e-6, 0.01]}
    deep = DeepNeuralRejection(network, 10, LAYERS, threshold=0.5).search(images, labels, **tried)
    with torch.no_grad():
        features = Taps(network, LAYERS)(data.as_floats(images))
    best = [search_rbf_svm(layer, labels, 10, **tried)[:2] for layer in features]
    assert list(zip(deep.C, deep.gamma, strict=True)) == best
    assert deep.fit(images, labels).gammas == [*deep.gamma, deep.combiner_gamma]


@given(st.lists(st.sampled_from([0.0, 0.1, 0.25, 0.3, 0.9]), min_size=1, max_size=30), st.floats(0, 0.99))
def test_the_threshold_declines_no_more_than_was_asked_for_and_no_larger_one_would_do(scores, rate):
    """R17: with few images, and with ties."""
    best = torch.tensor(scores, dtype=torch.float64)
    threshold = quantile_threshold(best, rate)
    assert int((best < threshold).sum()) <= rate * len(best) + 1e-9
    larger = best[best > threshold]
    if len(larger):
        assert int((best < larger.min()).sum()) > rate * len(best) - 1e-9


LAYERS = ["3", "6", "8"]


def small_network():
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.LazyLinear(64), nn.Dropout(0.3), nn.ReLU(inplace=True), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)),
    )


@pytest.fixture(scope="module")
def trained():
    """A network trained on half of the embedded digits, and the other half."""
    train = data.load("digits", "train")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = small_network()
        network(train.floats()[:1])
    half = len(train.labels) // 2
    fit(network, train.images[:half], train.labels[:half], epochs=15, batch_size=64)
    return network, train.images[half:], train.labels[half:]


@pytest.fixture(scope="module")
def deep(trained):
    network, images, labels = trained
    return DeepNeuralRejection(network, 10, LAYERS, C=10.0, combiner_C=1.0, combiner_gamma=1.0, false_rejection_rate=0.1).fit(
        images, labels
    )


@pytest.fixture(scope="module")
def single(trained):
    network, images, labels = trained
    return NeuralRejection(network, 10, "8", C=10.0, gamma=0.01, false_rejection_rate=0.1).fit(images, labels)


@pytest.mark.parametrize("name", ["deep", "single"])
def test_it_answers_digits_and_declines_noise(name, request):
    """R21: far away no machine is sure."""
    classifier, test = request.getfixturevalue(name), data.load("digits", "test")
    came = outcomes(classifier, test.floats(), test.labels)
    share = [float((came == one).float().mean()) for one in (Outcome.CORRECT, Outcome.REJECTED, Outcome.WRONG)]
    assert classifier.false_rejection_ <= 0.1
    assert share[0] > 0.75 and share[1] < 0.25 and share[2] < 0.05, share
    assert classifier(test.floats()[:3]).shape == (3, 11)


def test_an_attacker_who_knows_the_rejection_does_better_than_one_who_does_not(deep, trained):
    """R18, R19: flipping to rejection is no success for Evade."""
    test = data.load("digits", "test")
    images, labels = test.floats()[:60], test.labels[:60]
    attack = partial(pgd, norm="l2", eps=2.0, steps=40, precision="float32")
    network = Classifier(trained[0], 10)
    unaware = attack(network, images, labels).attempts
    with widened(deep, 0.1):
        aware = attack(deep, images, labels)
    wrong = [float((outcomes(deep, sent, labels) == Outcome.WRONG).float().mean()) for sent in (images, unaware, aware.attempts)]
    assert wrong[0] < wrong[2] and wrong[1] < wrong[2], wrong
    assert torch.equal(aware.found, outcomes(deep, aware.images, labels) == Outcome.WRONG)
    declined = attack(deep, images, labels, goal=ForceReject())
    assert torch.equal(declined.found, deep.predict(declined.images) == -1)
    assert int(declined.found.sum()) > 1.5 * int((deep.predict(images) == -1).sum())
    strong = strongest(deep, images, labels, norm="l2", eps=2.0, steps=20, targets=2, queries=50)
    assert strong.found.sum() >= aware.found.sum() and any("kernels" in name for name in strong.by)


def test_bfloat16_gradients_lead_through_the_machines(deep):
    """R20: distances are taken in float32, whatever the network computes in."""
    test = data.load("digits", "test")
    images, labels = test.floats()[:40], test.labels[:40]
    found = [pgd(deep, images, labels, norm="l2", eps=2.0, steps=30, precision=kind).found for kind in ("float32", "bfloat16")]
    assert abs(int(found[0].sum()) - int(found[1].sum())) <= 2
    flat = pgd(deep, images, labels, norm="l2", eps=2.0, steps=5, goal=AnyError()).flat
    assert int(flat.sum()) == 0


def test_widened_kernels_decide_alike_and_are_put_back(deep):
    """R14, R18."""
    images = data.load("digits", "test").floats()[:40]
    mixed = torch.cat([images, torch.rand(40, *images.shape[1:], generator=torch.Generator().manual_seed(0))])
    before, scores = deep(mixed), deep.scores(mixed)
    with widened(deep, 0.1):
        assert [machine.widened for machine in deep.rejecting.machines] == [0.1] * 3
        torch.testing.assert_close(deep(mixed), before, atol=1e-5, rtol=1e-5)
        assert torch.equal(deep.scores(mixed), scores)
    assert [machine.widened for machine in deep.rejecting.machines] == [1.0] * 3
    with pytest.raises(DemurError, match="factor"), widened(deep, 0.0):
        pass


def test_wider_kernels_reach_where_gradients_are_nothing():
    """R14: gamma is so large that another image is out of reach in float32."""
    features, labels = digits_features(100)
    machines, _ = fit_rbf_svm(features, labels, 10, C=1.0, gamma=30.0)
    flat, wide = [], copy(machines)
    wide.widened = 0.001
    for tried in (machines, wide):
        given = (features + 0.5).requires_grad_()
        values = tried(given)
        torch.testing.assert_close(values, machines(features + 0.5))
        (gradient,) = torch.autograd.grad(values.square().sum(), given)
        flat.append(float((gradient.abs().amax(1) == 0).double().mean()))
    assert flat == [1.0, 0.0]


def test_a_saved_one_comes_back_with_the_same_scores(deep, trained, tmp_path):
    test = data.load("digits", "test").floats()[:20]
    deep.save(tmp_path / "deep.safetensors")
    network = small_network()
    network(test[:1])
    again = DeepNeuralRejection(network, 10, LAYERS).load(tmp_path / "deep.safetensors")
    torch.testing.assert_close(again.scores(test), deep.scores(test))
    assert again.threshold_ == pytest.approx(deep.threshold_)
    with pytest.raises(DemurError, match="not those asked for"):
        DeepNeuralRejection(network, 10, ["3"]).load(tmp_path / "deep.safetensors")
    with pytest.raises(DemurError, match="cannot be read"):
        DeepNeuralRejection(network, 10, LAYERS).load(tmp_path / "none.safetensors")


@torch.no_grad()
def test_the_network_is_left_as_it_was_and_in_place_layers_do_not_reach_back(trained):
    network, images, _ = trained
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    linear, rectified = Taps(network.eval(), ["7", "8"])(images[:5].float() / 255)
    assert float(linear.min()) < 0 <= float(rectified.min())
    hidden, _ = Taps(network, ["5", "6"])(images[:5].float() / 255)
    assert float(hidden.min()) < 0  # though the rectifier after it works in place
    assert not any(module._forward_hooks for module in network.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda n, x, y: DeepNeuralRejection(n, 10, ["3", "fc"]), "'fc'"),
        (lambda n, x, y: DeepNeuralRejection(n, 10, []), "at least one"),
        (lambda n, x, y: DeepNeuralRejection(n, 10, ["3", "6"], C=[1.0]), "each of the 2 layers"),
        (lambda n, x, y: NeuralRejection(n, 10, "8", scores="odds"), "odds"),
        (lambda n, x, y: NeuralRejection(n, 10, "8", false_rejection_rate=1.0), r"\[0, 1\)"),
        (lambda n, x, y: NeuralRejection(n, 10, "8").scores(x[:2].float() / 255), "call fit"),
        (lambda n, x, y: NeuralRejection(n, 10, "8").fit(x[:20], y[:20]), "at least 5 images"),
        (lambda n, x, y: NeuralRejection(n, 10, "8").fit(x, y + 5), "label"),
        (lambda n, x, y: NeuralRejection(n, 10, "8", gamma=-1.0).fit(x, y), "positive"),
    ],
)
def test_what_does_not_fit_is_said(call, message, trained):
    with pytest.raises(DemurError, match=message):
        call(*trained)


def test_a_layer_off_the_way_is_said():
    class Apart(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Flatten(), nn.Linear(3, 3)

        def forward(self, images):
            return self.used(images)

    with pytest.raises(DemurError, match="not reached"):
        Taps(Apart(), ["unused"])(torch.zeros(1, 1, 2, 2))


def test_machines_without_a_support_vector_are_all_intercept():
    machines = RBFMachines(torch.zeros(0, 4), torch.zeros(4), torch.zeros(0, 2), torch.tensor([1.0, -1.0]), torch.zeros(2, 2), gamma=0.1)
    assert torch.equal(machines(torch.zeros(3, 4)), torch.tensor([[1.0, -1.0]] * 3))
    assert Evade().success(machines(torch.zeros(3, 4)), torch.ones(3, dtype=torch.int64), 2).all()
