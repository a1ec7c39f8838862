"""RBF machines against scikit-learn's. R14, R20."""

from copy import copy

import numpy as np
import pytest
import torch
from sklearn.calibration import CalibratedClassifierCV
from sklearn.model_selection import StratifiedKFold
from sklearn.multiclass import OneVsRestClassifier
from sklearn.svm import SVC
from torch import nn

from demur import DemurError, data
from demur.attacks import Evade
from demur.defenses import rbf_svm
from demur.defenses.rbf_fitting import fit_rbf_svm, gram, search_rbf_svm
from demur.defenses.rbf_svm import OneVsRestRBFSVM
from demur.hardware import changes_of


def digits_features(count=400):
    images = data.load("digits", "train")
    return images.to_float()[:count].flatten(1), images.labels[:count]


@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-6), (torch.float32, 1e-4)])
def test_decision_values_are_scikit_learns(dtype, close):
    """R20, on real features."""
    features, labels = digits_features()
    features = features.to(dtype)
    machines, _ = fit_rbf_svm(features[:300], labels[:300], 10, C=1.0, gamma=0.01)
    reference = OneVsRestClassifier(SVC(kernel="rbf", C=1.0, gamma=0.01)).fit(
        features[:300].double().numpy(), labels[:300].numpy()
    )
    expected = reference.decision_function(features.double().numpy())
    assert machines.support.dtype == dtype
    np.testing.assert_allclose(
        machines(features).numpy(), expected, atol=close * np.abs(expected).max()
    )
    assert (
        machines(features).argmax(1).numpy() == reference.predict(features.double().numpy())
    ).all()


def test_two_points_have_the_machine_that_can_be_worked_out():
    """With y = -1 and 1 at x = 0 and 1, both points are on the margin.

    The weight is then 1 / (1 - k(0, 1)), without an intercept.
    """
    features, labels = (
        torch.tensor([[0.0], [1.0]] * 5, dtype=torch.float64),
        torch.tensor([0, 1] * 5),
    )
    machines, _ = fit_rbf_svm(features, labels, 2, C=1e3, gamma=0.5)
    apart = float(np.exp(-0.5))
    where = torch.linspace(-1, 2, 7, dtype=torch.float64)[:, None]
    exact = (torch.exp(-0.5 * (where - 1) ** 2) - torch.exp(-0.5 * where**2)).squeeze(1) / (
        1 - apart
    )
    torch.testing.assert_close(
        machines(where)[:, 1], exact, atol=2e-3, rtol=0
    )  # libsvm stops at a tolerance of 1e-3
    torch.testing.assert_close(machines(where)[:, 0], -exact, atol=2e-3, rtol=0)


def test_probabilities_are_platts_and_sum_to_one():
    """The sigmoids of scikit-learn's calibration, on the same folds."""
    features, labels = digits_features()
    features = features.double()
    machines, outside = fit_rbf_svm(features, labels, 10, C=1.0, gamma=0.01, folds=4, seed=3)
    folds = list(StratifiedKFold(4, shuffle=True, random_state=3).split(labels, labels))
    kernel = gram(features, 0.01)
    for k in (0, 8):
        one = CalibratedClassifierCV(
            SVC(kernel="precomputed", C=1.0), method="sigmoid", cv=folds, ensemble=False
        )
        sigmoid = one.fit(kernel, (labels == k).numpy()).calibrated_classifiers_[0].calibrators[0]
        np.testing.assert_allclose(
            machines.platt[k].numpy(), [sigmoid.a_, sigmoid.b_], rtol=1e-2, atol=1e-3
        )
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
    penalty, gamma, accuracy = search_rbf_svm(
        features, labels, 10, Cs=[1e-4, 1.0], gammas=[1e-5, 0.01]
    )
    assert (penalty, gamma) == (1.0, 0.01) and len(accuracy) == 4
    _, outside = fit_rbf_svm(features, labels, 10, C=1.0, gamma=0.01)
    assert accuracy[1.0, 0.01] == pytest.approx(
        float((outside.argmax(1) == labels).double().mean()), abs=1e-3
    )


def test_wider_kernels_reach_where_gradients_are_nothing():
    """R14: gamma is so large that another image is out of reach in float32."""
    features, labels = digits_features(100)
    machines, _ = fit_rbf_svm(features, labels, 10, C=1.0, gamma=30.0)
    flat, wide = [], copy(machines)
    wide.wider_kernels = 0.001
    for tried in (machines, wide):
        given = (features + 0.5).requires_grad_()
        values = tried(given)
        torch.testing.assert_close(values, machines(features + 0.5))
        (gradient,) = torch.autograd.grad(values.square().sum(), given)
        flat.append(float((gradient.abs().amax(1) == 0).double().mean()))
    assert flat == [1.0, 0.0]


def test_machines_without_a_support_vector_are_all_intercept():
    machines = OneVsRestRBFSVM(
        torch.zeros(0, 4),
        torch.zeros(4),
        torch.zeros(0, 2),
        torch.tensor([1.0, -1.0]),
        torch.zeros(2, 2),
        gamma=0.1,
    )
    assert torch.equal(machines(torch.zeros(3, 4)), torch.tensor([[1.0, -1.0]] * 3))
    assert Evade().success(machines(torch.zeros(3, 4)), torch.ones(3, dtype=torch.int64), 2).all()


def test_d39_the_rounded_copy_follows_its_buffer_and_is_no_part_of_the_state(monkeypatch):
    """D39: also where torch does not count the changes of a tensor."""
    features, labels = digits_features(100)
    machines, _ = fit_rbf_svm(features, labels, 10, C=1.0, gamma=0.01)
    first = machines._half()
    assert machines._half() is first
    assert "_rounded" not in machines.state_dict()
    with torch.no_grad():
        machines.support.add_(1)
    assert torch.equal(machines._half(), machines.support.bfloat16())
    monkeypatch.setattr(rbf_svm, "changes_of", lambda tensor: None)
    with torch.no_grad():
        machines.support.add_(1)
    assert torch.equal(machines._half(), machines.support.bfloat16())
    with torch.inference_mode():
        assert changes_of(torch.zeros(1)) is None


def test_features_of_another_size_and_classes_that_are_too_small_are_refused():
    features, labels = digits_features(100)
    machines, _ = fit_rbf_svm(features, labels, 10, C=1.0, gamma=0.01)
    with pytest.raises(DemurError, match="take 784 features"):
        machines(features[:, :100])
    with pytest.raises(DemurError, match="at least 5 images"):
        search_rbf_svm(features[:20], labels[:20], 10, Cs=[1.0], gammas=[0.1])
