"""R17, R21: figures for classifiers that reject, each against an independent computation."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from demur import Classifier, DemurError, Outcome
from demur.metrics import Rates
from demur.metrics import rejection as r
from models import Constant, images_of

COUNT = 40


def drawn(seed, count=COUNT):
    """(wrong, confidence) of clean images and of two attacks, with ties."""
    generator = torch.Generator().manual_seed(seed)
    wrong = torch.rand(3, count, generator=generator) < 0.4
    confidence = (torch.rand(3, count, generator=generator) * 8).round() / 8
    return wrong, confidence


@given(st.integers(0, 10_000), st.sampled_from([0.0, 0.125, 0.5, 0.9, 1.0, 2.0]))
def test_robust_error_equals_a_loop_over_images(seed, threshold):
    wrong, confidence = drawn(seed)
    errors = 0
    accepted = 0
    for i in range(COUNT):
        seen = [(bool(wrong[k, i]), float(confidence[k, i])) for k in range(3)]
        errors += any(bad and sure >= threshold for bad, sure in seen)
        accepted += any(sure >= threshold for _, sure in seen)
    found = r.robust_error(wrong[0], confidence[0], wrong[1:], confidence[1:], threshold)
    assert found == pytest.approx(errors / accepted) if accepted else np.isnan(found)


@given(st.integers(0, 10_000))
def test_without_a_threshold_it_is_the_plain_robust_error(seed):
    wrong, confidence = drawn(seed)
    found = r.robust_error(wrong[0], confidence[0], wrong[1], confidence[1], -1.0)
    assert found == pytest.approx(float((wrong[0] | wrong[1]).double().mean()))


@given(st.integers(0, 10_000), st.sampled_from([0.5, 0.9, 0.95, 0.99, 1.0]))
def test_the_acceptance_threshold_is_the_largest_that_accepts_the_share(seed, share):
    wrong, confidence = drawn(seed)
    correct = ~wrong[0]
    threshold = r.acceptance_threshold(confidence[0], correct, share)
    sure = confidence[0][correct].numpy()
    assert (sure >= threshold).mean() >= share - 1e-9
    assert all(
        (sure >= larger).mean() < share + 1e-9 for larger in np.unique(sure[sure > threshold])
    )


def test_auroc_is_the_share_of_ordered_pairs():
    _, confidence = drawn(3)
    clean = confidence[0].numpy()
    attacked = confidence[1][:20].numpy()
    pairs = np.mean([(a > b) + 0.5 * (a == b) for a in clean for b in attacked])
    assert r.auroc(confidence[0], confidence[1][:20]) == pytest.approx(pairs)
    assert np.isnan(r.auroc(confidence[0], confidence[1][:0]))


@given(st.integers(0, 10_000), st.sampled_from([0.0, 0.05, 0.1, 0.5]))
def test_detection_and_accepted_accuracy_use_the_validation_threshold(seed, rate):
    wrong, confidence = drawn(seed)
    ordered = sorted(confidence[0].tolist())
    threshold = max(
        t for t in ordered if sum(value < t for value in ordered) <= rate * len(ordered) + 1e-9
    )
    attacked = confidence[1].tolist()
    assert r.tpr_at_fpr(confidence[0], confidence[1], rate) == pytest.approx(
        sum(c < threshold for c in attacked) / COUNT
    )
    kept = [not bool(w) for w, c in zip(wrong[1], attacked, strict=True) if c >= threshold]
    found = r.accepted_accuracy(confidence[0], ~wrong[1], confidence[1], 1 - rate)
    assert found == pytest.approx(np.mean(kept)) if kept else np.isnan(found)
    accepted_errors = sum(
        bool(w) and c >= threshold for w, c in zip(wrong[1], attacked, strict=True)
    )
    assert r.false_positive_rate(wrong[1], confidence[1], threshold) == pytest.approx(
        accepted_errors / COUNT
    )


@given(st.integers(0, 10_000))
def test_error_with_rejection_and_total_robust_loss_equal_a_loop(seed):
    generator = torch.Generator().manual_seed(seed)
    broken = torch.rand(COUNT, generator=generator) < 0.3
    radius = torch.rand(COUNT, generator=generator) * 2
    radius[radius > 1.2] = torch.inf
    radius[radius < 0.1] = 0.0
    eps = 0.8
    alphas = [0, 0.05, 0.25, 1]
    pairs = [(bool(b), float(at)) for b, at in zip(broken, radius, strict=True)]
    expected = [np.mean([b or at <= alpha * eps for b, at in pairs]) for alpha in alphas]
    found = r.error_with_rejection(broken, radius, eps, alphas)
    assert found == pytest.approx(expected) and found == sorted(found)
    for alpha in alphas:  # the step loss at alpha is R_eps(f, alpha): Chen et al. 2023, after eq. 3
        assert r.total_robust_loss(broken, radius, r.step_loss(eps, alpha)) == pytest.approx(
            found[alphas.index(alpha)]
        )
    ramp = np.mean([1.0 if b else max(0.0, 1 - at / eps) ** 2 for b, at in pairs])
    assert r.total_robust_loss(broken, radius, r.ramp_loss(eps, 2)) == pytest.approx(ramp)


def test_a_detector_implies_a_classifier_that_counts_clean_rejections_as_errors():
    """Tramer 2022: two of five are correct when clean and never broken."""
    clean = torch.tensor(
        [Outcome.CORRECT, Outcome.CORRECT, Outcome.REJECTED, Outcome.WRONG, Outcome.CORRECT]
    )
    assert r.implied_robust_accuracy(
        clean, torch.tensor([False, True, False, False, False])
    ) == pytest.approx(0.4)


def test_a_rejection_is_an_error_at_eps_0_only():
    found = Rates(correct=5, rejected=3, wrong=2)
    assert (r.accuracy_or_rejection(found, 0), r.accuracy_or_rejection(found, 0.5)) == (0.5, 0.8)
    accuracy = found.selective_accuracy
    coverage = found.coverage
    assert found.selective_f1 == pytest.approx(2 * accuracy * coverage / (accuracy + coverage))
    assert Rates(0, 4, 0).selective_f1 == 0 and Rates(0, 0, 4).selective_f1 == 0


def test_confidence_is_the_margin_over_rejection_or_over_the_second_best():
    images = images_of(2)
    for scores, sure in (
        ([1.0, 4.0, 3.0, 2.5], 1.5),
        ([1.0, 4.0, 3.0, 6.0], -2.0),
        ([1.0, 4.0, 3.0], 1.0),
    ):
        confidence, classes = r.confidences(Classifier(Constant(scores), 3), images)
        assert confidence.tolist() == [sure, sure] and classes.tolist() == [1, 1]


def test_bad_arguments_are_refused():
    none = torch.zeros(3, dtype=torch.bool)
    with pytest.raises(DemurError, match="at least one image"):
        r.acceptance_threshold(torch.ones(3), none)
    with pytest.raises(DemurError, match="alpha"):
        r.error_with_rejection(none, torch.ones(3), 0.3, [2.0])
