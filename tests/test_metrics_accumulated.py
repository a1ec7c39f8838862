"""Metrics that are updated and merged, and intervals against scipy's."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from demur import DemurError
from demur.metrics import (
    OutcomeCurve,
    OutcomeShares,
    RejectionFigures,
    clopper_pearson,
    wilson_interval,
)
from demur.metrics.rejection import auroc

outcome_lists = st.lists(st.integers(0, 2), min_size=1, max_size=30)


@given(outcome_lists, st.randoms(use_true_random=False))
def test_the_order_of_updates_and_merges_changes_nothing(outcomes, random):
    names = [str(place % 7) for place in range(len(outcomes))]
    whole = OutcomeShares()
    whole.update(torch.tensor(outcomes), names)
    parts = [(torch.tensor([one]), [name]) for one, name in zip(outcomes, names, strict=True)]
    random.shuffle(parts)
    merged = OutcomeShares()
    for outcome, name in parts:
        single = OutcomeShares()
        single.update(outcome, name)
        merged.merge(single)
    for name, share in whole.compute().items():
        other = merged.compute()[name]
        assert other.value == pytest.approx(share.value)
        assert (other.low, other.high, other.n) == pytest.approx((share.low, share.high, share.n))


@given(outcome_lists)
def test_shares_of_outcomes_sum_to_one(outcomes):
    metric = OutcomeShares()
    metric.update(torch.tensor(outcomes), [str(place) for place in range(len(outcomes))])
    found = metric.compute()
    assert sum(share.value for share in found.values()) == pytest.approx(1)
    for name, place in (("correct", 0), ("rejected", 1), ("wrong", 2)):
        assert found[name].value == pytest.approx(outcomes.count(place) / len(outcomes))
        assert found[name].low <= found[name].value + 1e-9
        assert found[name].value - 1e-9 <= found[name].high


def test_more_repetitions_on_the_same_images_give_no_narrower_interval():
    """Each image counts once, whatever the number of splits."""
    outcomes = torch.tensor([0, 0, 2, 1, 0, 2])
    names = [str(place) for place in range(6)]
    once = OutcomeShares()
    once.update(outcomes, names)
    often = OutcomeShares()
    for repeat in range(10):
        often.update(outcomes, names, repeat)
    for name, share in once.compute().items():
        repeated = often.compute()[name]
        assert (repeated.low, repeated.high) == pytest.approx((share.low, share.high))
        assert repeated.n == 6
        assert repeated.sd == pytest.approx(0)
        assert share.sd is None


@pytest.mark.parametrize(("successes", "n"), [(0, 5), (5, 5), (3, 10), (90, 100), (1, 1000)])
@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.99])
def test_intervals_agree_with_scipy(successes, n, confidence):
    test = stats.binomtest(successes, n)
    exact = test.proportion_ci(confidence, "exact")
    assert clopper_pearson(successes, n, confidence) == pytest.approx((exact.low, exact.high))
    wilson = test.proportion_ci(confidence, "wilson")
    assert wilson_interval(successes, n, confidence) == pytest.approx((wilson.low, wilson.high))
    for side, alternative in (("lower", "greater"), ("upper", "less")):
        one_sided = stats.binomtest(successes, n, alternative=alternative)
        bound = one_sided.proportion_ci(confidence, "exact")
        found = clopper_pearson(successes, n, confidence, side)
        assert found == pytest.approx((bound.low, bound.high))


def test_intervals_of_nothing_and_of_nonsense():
    assert clopper_pearson(0, 0) == (0, 1)
    assert wilson_interval(0, 0) == (0, 1)
    for wrong in ((2, 1, 0.95), (-1, 1, 0.95), (0, 1, 1.0)):
        with pytest.raises(DemurError):
            clopper_pearson(*wrong)
    with pytest.raises(DemurError, match="side"):
        clopper_pearson(1, 2, side="both")
    with pytest.raises(DemurError, match="at least one image"):
        OutcomeShares().compute()
    with pytest.raises(DemurError, match="as many names"):
        OutcomeShares().update(torch.tensor([0]), [])


def test_rejection_figures_merge():
    generator = torch.Generator().manual_seed(0)
    clean = torch.randn(50, generator=generator) + 1
    attacked = torch.randn(40, generator=generator)
    merged = RejectionFigures()
    for part in clean.split(7):
        other = RejectionFigures()
        other.update(clean=part)
        merged.merge(other)
    merged.update(attacked=attacked)
    found = merged.compute(threshold=0.5)
    assert found["auroc"] == pytest.approx(auroc(clean, attacked))
    assert found["false_rejection_rate"] == pytest.approx(float((clean < 0.5).double().mean()))
    assert found["detection_rate"] == pytest.approx(float((attacked < 0.5).double().mean()))
    with pytest.raises(DemurError):
        RejectionFigures().compute()


def test_a_curve_counts_the_three_outcomes_at_each_threshold():
    first, second = OutcomeCurve(), OutcomeCurve()
    first.update(torch.tensor([0.5, 1.5]), torch.tensor([True, False]))
    second.update(torch.tensor([-1.0]), torch.tensor([True]))
    first.merge(second)
    found = first.compute([0.0, 1.0, 2.0])
    assert found["correct"] == pytest.approx([1 / 3, 0, 0])
    assert found["rejected"] == pytest.approx([1 / 3, 2 / 3, 1])
    assert found["wrong"] == pytest.approx([1 / 3, 1 / 3, 0])
    with pytest.raises(DemurError):
        OutcomeCurve().compute([0.0])
