"""Neural rejection and deep neural rejection. R14, R17-R21."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from demur import Classifier, DemurError, Outcome, data, outcomes
from demur.attacks import PGD, AnyError, ForceReject, Strongest, wider_kernels
from demur.defenses import DeepNeuralRejection, NeuralRejection
from demur.defenses.rbf_fitting import search_rbf_svm
from demur.metrics.rejection import quantile_threshold
from demur.networks import FeatureExtractor
from demur.threat import ThreatModel
from demur.training import fit


@pytest.mark.slow
def test_a_search_sets_what_each_layers_machines_are_fitted_with(trained):
    network, images, labels = trained
    images, labels, tried = images[:300], labels[:300], {"Cs": [1e-4, 10.0], "gammas": [1e-6, 0.01]}
    deep = DeepNeuralRejection(network, 10, LAYERS, threshold=0.5).search(images, labels, **tried)
    with torch.no_grad():
        features = FeatureExtractor(network, LAYERS)(data.to_float(images))
    best = [search_rbf_svm(layer, labels, 10, **tried)[:2] for layer in features]
    assert list(zip(deep.C, deep.gamma, strict=True)) == best
    assert deep.fit(images, labels).gammas_ == [*deep.gamma, deep.combiner_gamma]


@given(
    st.lists(st.sampled_from([0.0, 0.1, 0.25, 0.3, 0.9]), min_size=1, max_size=30),
    st.floats(0, 0.99),
)
def test_the_threshold_rejects_at_most_the_asked_share_and_no_larger_one_does(scores, rate):
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
        *(
            nn.Flatten(),
            nn.LazyLinear(64),
            nn.Dropout(0.3),
            nn.ReLU(inplace=True),
            nn.Linear(64, 32),
            nn.ReLU(),
            nn.Linear(32, 10),
        ),
    )


@pytest.fixture(scope="module")
def trained():
    """A network trained on half of the embedded digits, and the other half."""
    train = data.load("digits", "train")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = small_network()
        network(train.to_float()[:1])
    half = len(train.labels) // 2
    fit(network, train.images[:half], train.labels[:half], epochs=15, batch_size=64)
    return network, train.images[half:], train.labels[half:]


@pytest.fixture(scope="module")
def deep(trained):
    network, images, labels = trained
    return DeepNeuralRejection(
        network, 10, LAYERS, C=10.0, combiner_C=1.0, combiner_gamma=1.0, false_rejection_rate=0.1
    ).fit(images, labels)


@pytest.fixture(scope="module")
def single(trained):
    network, images, labels = trained
    return NeuralRejection(network, 10, "8", C=10.0, gamma=0.01, false_rejection_rate=0.1).fit(
        images, labels
    )


@pytest.mark.parametrize("name", ["deep", "single"])
def test_it_answers_digits_and_rejects_noise(name, request):
    """R21: far from the training images, all scores are low."""
    classifier, test = request.getfixturevalue(name), data.load("digits", "test")
    came = outcomes(classifier, test.to_float(), test.labels)
    share = [
        float((came == one).float().mean())
        for one in (Outcome.CORRECT, Outcome.REJECTED, Outcome.WRONG)
    ]
    assert classifier.false_rejection_rate_ <= 0.1
    assert share[0] > 0.75 and share[1] < 0.25 and share[2] < 0.05, share
    assert classifier(test.to_float()[:3]).shape == (3, 11)


@pytest.mark.slow
def test_a_defence_aware_attack_does_better_than_a_defence_unaware_one(deep, trained):
    """R18, R19: flipping to rejection is no success for Evade."""
    test = data.load("digits", "test")
    images = test.to_float()[:60]
    labels = test.labels[:60]
    attack = PGD(steps=40)
    network = Classifier(trained[0], 10)
    unaware = attack(network, images, labels, "l2:2", precision="float32").candidates
    with wider_kernels(deep, 0.1):
        aware = attack(deep, images, labels, "l2:2", precision="float32")
    wrong = [
        float((outcomes(deep, given, labels) == Outcome.WRONG).float().mean())
        for given in (images, unaware, aware.candidates)
    ]
    assert wrong[0] < wrong[2] and wrong[1] < wrong[2], wrong
    assert torch.equal(aware.success, outcomes(deep, aware.images, labels) == Outcome.WRONG)
    reject = ThreatModel("l2", 2.0, goal=ForceReject())
    rejected = attack(deep, images, labels, reject, precision="float32")
    assert torch.equal(rejected.success, deep.predict(rejected.images) == -1)
    assert int(rejected.success.sum()) > 1.5 * int((deep.predict(images) == -1).sum())
    ensemble = Strongest(steps=20, n_targets=2, n_queries=50)(deep, images, labels, "l2:2")
    assert ensemble.success.sum() >= aware.success.sum()
    assert any("ernels" in str(name) for name in ensemble.by)


@pytest.mark.slow
def test_bfloat16_gradients_lead_through_the_machines(deep):
    """R20: distances are taken in float32, whatever the network computes in."""
    test = data.load("digits", "test")
    images = test.to_float()[:40]
    labels = test.labels[:40]
    found = [
        PGD(steps=30)(deep, images, labels, "l2:2", precision=kind).success
        for kind in ("float32", "bfloat16")
    ]
    assert abs(int(found[0].sum()) - int(found[1].sum())) <= 2
    any_error = ThreatModel("l2", 2.0, goal=AnyError())
    assert int(PGD(steps=5)(deep, images, labels, any_error).zero_gradients.sum()) == 0


def test_wider_kernels_decide_alike_and_are_put_back(deep):
    """R14, R18."""
    images = data.load("digits", "test").to_float()[:40]
    noise = torch.rand(40, *images.shape[1:], generator=torch.Generator().manual_seed(0))
    mixed = torch.cat([images, noise])
    before = deep(mixed)
    scores = deep.scores(mixed)
    with wider_kernels(deep, 0.1):
        assert [machine.wider_kernels for machine in deep.machines_] == [0.1] * 3
        assert deep.combiner_.wider_kernels == 0.1
        torch.testing.assert_close(deep(mixed), before, atol=1e-5, rtol=1e-5)
        assert torch.equal(deep.scores(mixed), scores)
    assert [machine.wider_kernels for machine in deep.machines_] == [1.0] * 3
    with pytest.raises(DemurError, match="factor"), wider_kernels(deep, 0.0):
        pass


def again(layers=("3", "6", "8"), **options):
    network = small_network()
    network(torch.zeros(1, 1, 28, 28))
    return DeepNeuralRejection(network, 10, layers, **options)


def test_the_state_of_a_fitted_one_is_restored_with_the_same_scores(deep):
    test = data.load("digits", "test").to_float()[:20]
    restored = again().restore(deep.state_dict(), deep.gammas_)
    torch.testing.assert_close(restored.scores(test), deep.scores(test))
    assert restored.threshold == deep.threshold and restored.gammas_ == deep.gammas_


def without(state, name):
    return {key: value for key, value in state.items() if key != name}


@pytest.mark.parametrize(
    ("spoil", "gammas", "said"),
    [
        (lambda state: state, None, "list of 4 gammas, not None"),
        (lambda state: state, [0.1], "list of 4 gammas"),
        (lambda state: state, ["a"] * 4, "positive and finite"),
        (lambda state: state, [0.1, 0.1, float("nan"), 0.1], "positive and finite"),
        (lambda state: without(state, "module.machines.0.platt"), [0.1] * 4, "no tensor"),
        (lambda state: without(state, "module.threshold"), [0.1] * 4, "'module.threshold'"),
        (lambda state: {**state, "other": torch.zeros(1)}, [0.1] * 4, "'other'"),
        (
            lambda state: {**state, "module.machines.1.support": torch.zeros(3, 2)},
            [0.1] * 4,
            "module.machines.1.support",
        ),
        (
            lambda state: {**state, "module.extractor.network.7.bias": torch.zeros(5)},
            [0.1] * 4,
            "another network",
        ),
    ],
)
def test_d7_a_refused_state_changes_nothing(deep, spoil, gammas, said):
    """D7."""
    images = data.load("digits", "test").to_float()[:20]
    fitted = again().restore(deep.state_dict(), deep.gammas_)
    before = {name: tensor.clone() for name, tensor in fitted.state_dict().items()}
    scores = fitted.scores(images)
    fresh = again()
    for one in (fitted, fresh):
        with pytest.raises(DemurError, match=said):
            one.restore(spoil(dict(deep.state_dict())), gammas)
    after = fitted.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(fitted.scores(images), scores)
    assert not fresh.fitted_ and not fresh.machines_


def test_the_threshold_is_the_constant_reject_score(deep, single):
    images = data.load("digits", "test").to_float()
    for fitted in (deep, single):
        before = fitted.threshold
        scores = fitted.scores(images)
        assert fitted.rejects and torch.equal(scores[:, -1], torch.full((len(images),), before))
        fitted.set_threshold(0.75)
        try:
            assert fitted.threshold == 0.75
            moved = fitted.scores(images)
            assert torch.equal(moved[:, :-1], scores[:, :-1])
            assert float(moved[:, -1].min()) == float(moved[:, -1].max()) == 0.75
            accepted = fitted.predict(images) != -1
            assert torch.equal(accepted, scores[:, :-1].amax(1) >= 0.75)
        finally:
            fitted.set_threshold(before)
        assert torch.equal(fitted.scores(images), scores)
    with pytest.raises(DemurError, match="not fitted"):
        again().set_threshold(0.5)
    with pytest.raises(DemurError, match="finite"):
        deep.set_threshold(float("nan"))


def test_the_given_threshold_is_used_without_a_false_rejection_rate(trained):
    network, images, labels = trained
    fitted = NeuralRejection(network, 10, "8", C=10.0, threshold=0.625)
    fitted.fit(images[:200], labels[:200])
    assert fitted.threshold == 0.625 and fitted.false_rejection_rate_ is None


def test_probabilities_are_platts_or_the_softmax_of_decision_values(deep, trained):
    network, images, labels = trained
    test = data.load("digits", "test").to_float()[:30]
    found = deep.predict_proba(test)
    assert torch.equal(found, deep.scores(test)[:, :10])
    torch.testing.assert_close(found.sum(1), torch.ones(30))
    decided = NeuralRejection(network, 10, "8", C=10.0, scores="decision", threshold=0.0)
    decided.fit(images[:200], labels[:200])
    assert torch.equal(decided.predict_proba(test), decided.scores(test)[:, :10].softmax(1))


@torch.no_grad()
def test_the_network_is_left_as_it_was_and_in_place_layers_do_not_reach_back(trained):
    network, images, _ = trained
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    linear, rectified = FeatureExtractor(network.eval(), ["7", "8"])(images[:5].float() / 255)
    assert float(linear.min()) < 0 <= float(rectified.min())
    hidden, _ = FeatureExtractor(network, ["5", "6"])(images[:5].float() / 255)
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
        (lambda n, x, y: NeuralRejection(n, 10, "8", folds=1), "folds must be at least 2"),
        (
            lambda n, x, y: NeuralRejection(n, 10, "8").search(x, y, Cs=[], gammas=[1.0]),
            "at least one C",
        ),
        (
            lambda n, x, y: NeuralRejection(n, 10, "8").search(x, y, Cs=[-1.0], gammas=[1.0]),
            "positive",
        ),
        (lambda n, x, y: NeuralRejection(n, 10, "8").fit(x, y, validation=x), "a pair"),
    ],
)
def test_what_does_not_fit_is_said(call, message, trained):
    with pytest.raises(DemurError, match=message):
        call(*trained)


def test_a_layer_that_is_not_called_is_said():
    class Apart(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Flatten(), nn.Linear(3, 3)

        def forward(self, images):
            return self.used(images)

    with pytest.raises(DemurError, match="does not call"):
        FeatureExtractor(Apart(), ["unused"])(torch.zeros(1, 1, 2, 2))


@pytest.mark.parametrize(
    ("validation", "said"),
    [
        (lambda x, y: (torch.rand(3, 1, 9, 9), y[:3]), "do not fit images"),
        (lambda x, y: (x[:3], y[:2]), "labels must have shape"),
        (lambda x, y: (x[:3], y[:3] + 10), "labels must lie in"),
        (lambda x, y: (torch.full((3, *x.shape[1:]), torch.nan), y[:3]), "NaN"),
    ],
)
@pytest.mark.parametrize("kind", [NeuralRejection, DeepNeuralRejection])
def test_a_fit_that_fails_keeps_the_old_state(kind, validation, said, trained):
    """New machines with the old threshold were a defence that nobody had fitted."""
    network, images, labels = trained
    layers = "8" if kind is NeuralRejection else ["6", "8"]
    defense = kind(network, 10, layers, C=10.0, false_rejection_rate=0.1)
    defense.fit(images[:200], labels[:200])
    before = {name: tensor.clone() for name, tensor in defense.state_dict().items()}
    rate = defense.false_rejection_rate_
    with pytest.raises(DemurError, match=said):
        defense.fit(images[200:400], labels[200:400], validation=validation(images, labels))
    after = defense.state_dict()
    assert defense.fitted_ and defense.false_rejection_rate_ == rate
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
