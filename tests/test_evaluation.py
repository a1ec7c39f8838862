"""Counts of outcomes, intervals, curves, offsets of the reject score, and the store."""

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from scipy.stats import binomtest
from sklearn.metrics import accuracy_score

from demur import REJECT, Classifier, DemurError, Outcome, outcomes
from demur.attacks import FGSM
from demur.evaluation import Store, offset_for, security_curve, shifted
from demur.metrics import rates, spread, wilson_interval
from demur.progress import Silent, reporting
from demur.threat import ThreatModel
from models import Linear, images_of, linear

outcome_lists = st.lists(st.sampled_from(list(Outcome)), min_size=1, max_size=50)


@given(outcome_lists)
def test_rates_equal_a_count_and_scikit_learn(found):
    measured = rates(torch.tensor([int(outcome) for outcome in found]))
    assert measured.n == len(found)
    as_answers = ["right" if one == Outcome.CORRECT else "not" for one in found]
    assert measured.accuracy == pytest.approx(accuracy_score(["right"] * len(found), as_answers))
    assert measured.accuracy + measured.rejection_rate + measured.error_rate == pytest.approx(1)
    assert measured.coverage == pytest.approx(
        sum(one != Outcome.REJECTED for one in found) / len(found)
    )
    answered = [one for one in found if one != Outcome.REJECTED]
    if answered:
        assert measured.selective_accuracy == pytest.approx(
            sum(one == Outcome.CORRECT for one in answered) / len(answered)
        )
    else:
        assert math.isnan(measured.selective_accuracy)


@pytest.mark.parametrize(
    "bad",
    [
        torch.tensor([], dtype=torch.int64),
        torch.tensor([3]),
        torch.tensor([-1]),
        torch.zeros(2, 2),
        torch.zeros(2),
        [0, 1, 2],
    ],
)
def test_rates_refuse_other_values_than_outcomes(bad):
    with pytest.raises(DemurError, match="outcomes"):
        rates(bad)


@given(
    st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))),
    st.sampled_from([0.9, 0.95, 0.99]),
)
def test_wilson_intervals_are_scipys(counts, confidence):
    successes, n = counts
    expected = binomtest(successes, n).proportion_ci(confidence, method="wilson")
    assert wilson_interval(successes, n, confidence) == pytest.approx(
        (expected.low, expected.high), abs=1e-12
    )


def test_wilson_of_no_trial_is_the_whole_range_and_bad_arguments_are_refused():
    assert wilson_interval(0, 0) == (0.0, 1.0)
    for nonsense in ((3, 2), (-1, 2), (1, 2, 1.0)):
        with pytest.raises(DemurError):
            wilson_interval(*nonsense)


def test_spread_is_the_sample_standard_deviation():
    found = spread([1.0, 2.0, 4.0])
    assert (found.mean, found.sd, found.n) == (
        pytest.approx(7 / 3),
        pytest.approx(torch.tensor([1.0, 2, 4]).std().item()),
        3,
    )
    assert spread([5.0]).sd is None
    with pytest.raises(DemurError):
        spread([])


def test_a_security_curve_starts_at_the_clean_outcomes_and_its_errors_grow_with_eps():
    """R2, R12."""
    classifier = linear(3, 64, 3)
    images = images_of(40)
    labels = classifier.predict(images)

    def outcomes_at(eps):
        result = FGSM()(classifier, images, labels, ThreatModel("linf", eps))
        return outcomes(classifier, result.candidates, labels)

    curve = security_curve(outcomes_at, [0.0, 0.05, 0.1, 0.3, 1.0])
    assert curve.rates[0].accuracy == 1.0
    errors = [point.error_rate for point in curve.rates]
    assert errors == sorted(errors) and errors[-1] > 0.9
    for bad in ([], [0.2, 0.1], [-0.1, 0.2]):
        with pytest.raises(DemurError, match="increasing"):
            security_curve(outcomes_at, bad)


@given(st.integers(0, 99), st.floats(0, 0.99), st.integers(1, 30), st.booleans())
def test_an_offset_rejects_the_requested_share(seed, rate, count, ties):
    """R17: also with fewer images than one rejection needs, and with ties."""
    classifier = linear(4, 64, 3, seed)
    images = images_of(count, seed=seed)
    if ties:
        images = images[torch.arange(count) // 3]
    moved = shifted(classifier, offset_for(classifier, images, rate))
    rejected = int((moved.predict(images) == REJECT).sum())
    assert rejected <= int(rate * count + 1e-9)
    if not ties:
        assert rejected == int(rate * count + 1e-9)


def test_a_shifted_reject_score_does_not_depend_on_the_sign_of_the_scores():
    """R23: the same decisions for positive and for negative scores, and more rejections."""
    images = images_of(60)
    classifier = linear(4, 64, 3)
    weights = classifier.module.weights.detach()
    decided = []
    for constant in (0.0, 100.0, -100.0):
        moved = Classifier(Linear(weights, torch.full((4,), constant)), 3)
        decided.append(shifted(moved, 1.0).predict(images))
        rejected = moved.predict(images) == REJECT
        assert bool((decided[-1][rejected] == REJECT).all())
    assert torch.equal(decided[0], decided[1])
    assert torch.equal(decided[0], decided[2])


def test_an_offset_needs_a_reject_column_and_a_rate():
    with pytest.raises(DemurError, match="no reject column"):
        offset_for(linear(3, 64, 3), images_of(4), 0.1)
    with pytest.raises(DemurError, match="rejection rate"):
        offset_for(linear(4, 64, 3), images_of(4), 1.0)


class Listening(Silent):
    def __init__(self):
        self.messages = []

    def message(self, text):
        self.messages.append(text)


def compute_with(calls, value=1.5):
    def compute(checkpoint):
        calls.append(checkpoint)
        return {"value": value}, {
            "images": torch.arange(6, dtype=torch.uint8).reshape(2, 3),
            "mask": torch.tensor([True, False]),
        }

    return compute


def test_a_result_is_computed_once_and_stored(tmp_path):
    calls = []
    first = Store(tmp_path).cell({"attack": "fgs", "eps": 0.1}, compute_with(calls))
    again = Store(tmp_path).cell({"eps": 0.1, "attack": "fgs"}, compute_with(calls))
    assert (
        len(calls) == 1
        and again.values == first.values == {"value": 1.5}
        and again.seconds == first.seconds
    )
    assert all(torch.equal(again.tensors[name], first.tensors[name]) for name in first.tensors)
    Store(tmp_path).cell({"attack": "fgs", "eps": 0.2}, compute_with(calls))
    assert len(calls) == 2


def _rewrite(path, change):
    with safe_open(path, "pt") as file:
        about = dict(file.metadata())
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    change(about, tensors)
    save_file(tensors, path, metadata=about)


def _flip(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))


DAMAGE = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-3]),
    "empty": lambda path: path.write_bytes(b""),
    "rubbish": lambda path: path.write_bytes(b"rubbish" * 100),
    "a bit of a tensor flipped": _flip,
    "values changed": lambda path: _rewrite(
        path, lambda about, _: about.update(values=json.dumps({"value": 2.5}))
    ),
    "a tensor changed": lambda path: _rewrite(
        path, lambda _, tensors: tensors.update(mask=torch.tensor([True, True]))
    ),
    "seconds changed": lambda path: _rewrite(path, lambda about, _: about.update(seconds="0.0")),
    "no seal": lambda path: _rewrite(path, lambda about, _: about.pop("seal")),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_result_is_computed_again_with_a_warning(tmp_path, damage):
    calls = []
    listening = Listening()
    Store(tmp_path).cell({"a": 1}, compute_with(calls))
    (path,) = tmp_path.glob("*.safetensors")
    DAMAGE[damage](path)
    with reporting(listening):
        cell = Store(tmp_path).cell({"a": 1}, compute_with(calls))
    assert (
        len(calls) == 2
        and cell.values == {"value": 1.5}
        and "damaged or belongs to another" in listening.messages[0]
    )
    with reporting(listening):
        Store(tmp_path).cell({"a": 1}, compute_with(calls))
    assert len(calls) == 2 and len(listening.messages) == 1


def test_the_result_of_another_configuration_is_computed_again(tmp_path):
    calls = []
    listening = Listening()
    store = Store(tmp_path)
    store.cell({"a": 1}, compute_with(calls, 1.0))
    (ours,) = tmp_path.glob("*.safetensors")
    store.cell({"a": 2}, compute_with(calls, 2.0))
    (theirs,) = set(tmp_path.glob("*.safetensors")) - {ours}
    ours.write_bytes(theirs.read_bytes())
    with reporting(listening):
        assert store.cell({"a": 1}, compute_with(calls, 1.0)).values == {"value": 1.0}
    assert len(calls) == 3 and listening.messages


def test_a_failed_computation_leaves_no_file(tmp_path):
    def fail(checkpoint):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Store(tmp_path).cell({"a": 1}, fail)
    assert list(tmp_path.iterdir()) == []
