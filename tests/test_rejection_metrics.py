"""Figures for classifiers that reject, each against a computation of its own. R17, R21."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from demur import Classifier, DemurError, Outcome
from demur.evaluation import Rates
from demur.evaluation import rejection as r
from models import Constant, images_of

COUNT = 40


def drawn(seed, count=COUNT):
    """(wrong, confidence) of clean and of twice attacked images, with ties."""
    generator = torch.Generator().manual_seed(seed)
    wrong = torch.rand(3, count, generator=generator) < 0.4
    confidence = (torch.rand(3, count, generator=generator) * 8).round() / 8
    return wrong, confidence


@given(st.integers(0, 10_000), st.sampled_from([0.0, 0.125, 0.5, 0.9, 1.0, 2.0]))
def test_robust_error_is_that_of_a_loop_over_images(seed, threshold):
    wrong, confidence = drawn(seed)
    errors, accepted = 0, 0
    for i in range(COUNT):
        seen = [(bool(wrong[k, i]), float(confidence[k, i])) for k in range(3)]
        errors += any(bad and sure >= threshold for bad, sure in seen)
        accepted += any(sure >= threshold for _, sure in seen)
    found = r.robust_error(wrong[0], confidence[0], wrong[1:], confidence[1:], threshold)
    assert found == pytest.approx(errors / accepted) if accepted else np.isnan(found)


@given(st.integers(0, 10_000))
def test_with_a_threshold_of_nothing_it_is_the_plain_robust_error(seed):
    wrong, confidence = drawn(seed)
    found = r.robust_error(wrong[0], confidence[0], wrong[1], confidence[1], -1.0)
    assert found == pytest.approx(float((wrong[0] | wrong[1]).double().mean()))


@given(st.integers(0, 10_000), st.sampled_from([0.5, 0.9, 0.95, 0.99, 1.0]))
def test_the_acceptance_threshold_accepts_the_share_and_no_larger_one_does(seed, share):
    wrong, confidence = drawn(seed)
    correct = ~wrong[0]
    threshold = r.acceptance_threshold(confidence[0], correct, share)
    sure = confidence[0][correct].numpy()
    assert (sure >= threshold).mean() >= share - 1e-9
    assert all((sure >= larger).mean() < share + 1e-9 for larger in np.unique(sure[sure > threshold]))


def test_separability_is_the_share_of_pairs_in_order():
    _, confidence = drawn(3)
    clean, attacked = confidence[0].numpy(), confidence[1][:20].numpy()
    pairs = np.mean([(a > b) + 0.5 * (a == b) for a in clean for b in attacked])
    assert r.separability(confidence[0], confidence[1][:20]) == pytest.approx(pairs)
    assert np.isnan(r.separability(confidence[0], confidence[1][:0]))


@given(st.integers(0, 10_000), st.sampled_from([0.0, 0.05, 0.1, 0.5]))
def test_detection_and_accuracy_of_the_accepted_use_the_validation_threshold(seed, rate):
    wrong, confidence = drawn(seed)
    ordered = sorted(confidence[0].tolist())
    threshold = max(t for t in ordered if sum(value < t for value in ordered) <= rate * len(ordered) + 1e-9)
    attacked = confidence[1].tolist()
    assert r.detection_rate(confidence[0], confidence[1], rate) == pytest.approx(sum(c < threshold for c in attacked) / COUNT)
    kept = [not bool(w) for w, c in zip(wrong[1], attacked, strict=True) if c >= threshold]
    found = r.accepted_accuracy(confidence[0], ~wrong[1], confidence[1], 1 - rate)
    assert found == pytest.approx(np.mean(kept)) if kept else np.isnan(found)
    accepted_errors = sum(bool(w) and c >= threshold for w, c in zip(wrong[1], attacked, strict=True))
    assert r.false_acceptance(wrong[1], confidence[1], threshold) == pytest.approx(accepted_errors / COUNT)


@given(st.integers(0, 10_000))
def test_errors_with_rejection_and_total_robust_loss_are_those_of_a_loop(seed):
    generator = torch.Generator().manual_seed(seed)
    broken = torch.rand(COUNT, generator=generator) < 0.3
    radius = torch.rand(COUNT, generator=generator) * 2
    radius[radius > 1.2], radius[radius < 0.1] = torch.inf, 0.0
    eps, alphas = 0.8, [0, 0.05, 0.25, 1]
    pairs = [(bool(b), float(at)) for b, at in zip(broken, radius, strict=True)]
    expected = [np.mean([b or at <= alpha * eps for b, at in pairs]) for alpha in alphas]
    found = r.error_with_rejection(broken, radius, eps, alphas)
    assert found == pytest.approx(expected) and found == sorted(found)
    for alpha in alphas:  # the step loss at alpha is R_eps(f, alpha): Chen et al. 2023, after eq. 3
        assert r.total_robust_loss(broken, radius, r.step_loss(eps, alpha)) == pytest.approx(found[alphas.index(alpha)])
    ramp = np.mean([1.0 if b else max(0.0, 1 - at / eps) ** 2 for b, at in pairs])
    assert r.total_robust_loss(broken, radius, r.ramp_loss(eps, 2)) == pytest.approx(ramp)


def test_a_detector_implies_a_classifier_that_counts_clean_rejections_as_errors():
    """Tramer 2022: two of five are right when clean and never broken."""
    clean = torch.tensor([Outcome.CORRECT, Outcome.CORRECT, Outcome.REJECTED, Outcome.WRONG, Outcome.CORRECT])
    assert r.implied_robust_accuracy(clean, torch.tensor([False, True, False, False, False])) == pytest.approx(0.4)


def test_a_rejection_is_an_error_at_eps_0_and_right_from_there_on():
    found = Rates(correct=5, rejected=3, wrong=2)
    assert (r.accuracy_or_rejection(found, 0), r.accuracy_or_rejection(found, 0.5)) == (0.5, 0.8)
    accuracy, coverage = found.selective_accuracy, found.coverage
    assert found.balance == pytest.approx(2 * accuracy * coverage / (accuracy + coverage))
    assert Rates(0, 4, 0).balance == 0 and Rates(0, 0, 4).balance == 0


def test_confidence_is_won_against_rejection_or_else_against_the_second_best():
    images = images_of(2)
    for scores, sure in (([1.0, 4.0, 3.0, 2.5], 1.5), ([1.0, 4.0, 3.0, 6.0], -2.0), ([1.0, 4.0, 3.0], 1.0)):
        confidence, classes = r.confidences(Classifier(Constant(scores), 3), images)
        assert confidence.tolist() == [sure, sure] and classes.tolist() == [1, 1]


def test_what_does_not_fit_is_said():
    nobody = torch.zeros(3, dtype=torch.bool)
    with pytest.raises(DemurError, match="at least one image"):
        r.acceptance_threshold(torch.ones(3), nobody)
    with pytest.raises(DemurError, match="alpha"):
        r.error_with_rejection(nobody, torch.ones(3), 0.3, [2.0])
