import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from demur import DemurError
from demur.attacks import AnyError, Evade, ForceReject, Target

CLASSES = 3


def score_tables(columns):
    return st.lists(st.lists(st.floats(-50, 50, width=32), min_size=columns, max_size=columns), min_size=1, max_size=6).map(torch.tensor)


@given(score_tables(CLASSES + 1), st.integers(0, CLASSES - 1))
def test_evading_is_equation_2_5_1_of_the_rejection_paper_and_never_counts_a_rejection(scores, label):
    """R18, R19: wrong *and accepted*; the joint margin max over c not in {y, K} of s_c minus max(s_y, s_K)."""
    labels = torch.full((len(scores),), label)
    others = [c for c in range(CLASSES) if c != label]
    expected = scores[:, others].amax(1) - torch.maximum(scores[:, label], scores[:, CLASSES])
    assert torch.equal(Evade().loss(scores, labels, CLASSES), expected)
    decided = scores.argmax(1)
    assert torch.equal(Evade().success(scores, labels, CLASSES), (decided != label) & (decided != CLASSES))


@given(score_tables(CLASSES), st.integers(0, CLASSES - 1))
def test_without_a_reject_column_evading_is_any_error(scores, label):
    labels = torch.full((len(scores),), label)
    for by in ("margin", "cross_entropy"):
        assert torch.equal(Evade(by).loss(scores, labels, CLASSES), AnyError(by).loss(scores, labels, CLASSES))
    assert torch.equal(Evade().success(scores, labels, CLASSES), AnyError().success(scores, labels, CLASSES))


@given(score_tables(CLASSES + 1), st.integers(0, CLASSES - 1))
def test_any_error_counts_rejection_and_force_reject_only_that(scores, label):
    labels = torch.full((len(scores),), label)
    decided = scores.argmax(1)
    assert torch.equal(AnyError().success(scores, labels, CLASSES), decided != label)
    assert torch.equal(ForceReject().success(scores, labels, CLASSES), decided == CLASSES)
    assert torch.equal(ForceReject().loss(scores, labels, CLASSES), scores[:, CLASSES] - scores[:, :CLASSES].amax(1))


@settings(max_examples=50)
@given(
    score_tables(CLASSES + 1),
    st.sampled_from([-50.0, -1.0, 64.0]),
    st.sampled_from([Evade(), AnyError(), ForceReject(), Target(1), Evade("cross_entropy")]),
)
def test_a_constant_added_to_all_scores_changes_nothing(scores, constant, goal):
    """R6: masking is by -inf, never by a factor of 0."""
    scores, labels = scores.double(), torch.zeros(len(scores), dtype=torch.int64)
    assert torch.allclose(goal.loss(scores + constant, labels, CLASSES), goal.loss(scores, labels, CLASSES), atol=1e-9)
    assert torch.equal(goal.success(scores + constant, labels, CLASSES), goal.success(scores, labels, CLASSES))


def test_cross_entropy_of_any_error_points_where_the_usual_cross_entropy_does():
    scores = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 1, 2, 0, 1])
    (ours,) = torch.autograd.grad(AnyError("cross_entropy").loss(scores, labels, CLASSES).sum(), scores)
    (usual,) = torch.autograd.grad(torch.nn.functional.cross_entropy(scores, labels, reduction="sum"), scores)
    assert torch.allclose(ours / ours.norm(dim=1, keepdim=True), usual / usual.norm(dim=1, keepdim=True))


def test_cross_entropy_of_any_error_does_not_vanish_where_the_softmax_saturates():
    scores = torch.tensor([[200.0, 0.0, -5.0]], requires_grad=True)
    labels = torch.tensor([0])
    (ours,) = torch.autograd.grad(AnyError("cross_entropy").loss(scores, labels, CLASSES).sum(), scores)
    (usual,) = torch.autograd.grad(torch.nn.functional.cross_entropy(scores, labels), scores)
    assert not usual.any() and ours.any()


def test_targets_may_differ_between_images_and_follow_a_selection():
    goal = Target(torch.tensor([1, 2, 0]))
    scores, labels = torch.eye(3), torch.tensor([0, 0, 1])
    assert goal.success(scores, labels, CLASSES).tolist() == [False, False, False]
    assert goal.success(scores[[1, 2, 0]], labels, CLASSES).tolist() == [True, True, True]
    part = goal.select(torch.tensor([2]))
    assert part.success(scores[:1], labels[:1], CLASSES).tolist() == [True]


@pytest.mark.parametrize(
    ("goal", "said"),
    [
        (Target(5), "0..2"),
        (Target(CLASSES), "ForceReject"),  # R22: never the reject column unless asked
        (Target(torch.tensor([1, 2])), "one class, or one for each"),
        (Target(0), "true class"),
        (ForceReject(), "reject column"),
    ],
)
def test_goals_that_do_not_fit_are_refused(goal, said):
    with pytest.raises(DemurError, match=said):
        goal.check(torch.tensor([0, 1, 2]), CLASSES, CLASSES)


def test_an_unknown_loss_is_refused():
    with pytest.raises(DemurError, match="margin"):
        Evade("margn")
