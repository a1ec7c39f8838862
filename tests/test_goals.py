"""What counts as success, and what an attack climbs. R6, R18, R19, R22."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from demur import DemurError
from demur.attacks import PGD, AnyError, Evade, ForceReject, Target
from demur.goals import Goal, as_goal, check_loss

CLASSES = 3


def score_tables(columns):
    return st.lists(
        st.lists(st.floats(-50, 50, width=32), min_size=columns, max_size=columns),
        min_size=1,
        max_size=6,
    ).map(torch.tensor)


@given(score_tables(CLASSES + 1), st.integers(0, CLASSES - 1))
def test_evading_is_equation_2_5_1_of_the_rejection_paper_and_never_counts_a_rejection(
    scores, label
):
    """R18, R19: wrong *and accepted*; the margin is the largest of s_c over c not in {y, K}, minus
    max(s_y, s_K).
    """
    labels = torch.full((len(scores),), label)
    others = [c for c in range(CLASSES) if c != label]
    expected = scores[:, others].amax(1) - torch.maximum(scores[:, label], scores[:, CLASSES])
    assert torch.equal(Evade().loss(scores, labels, CLASSES), expected)
    assert torch.equal(Evade().margin(scores, labels, CLASSES), expected)
    decided = scores.argmax(1)
    assert torch.equal(
        Evade().success(scores, labels, CLASSES), (decided != label) & (decided != CLASSES)
    )


@given(score_tables(CLASSES), st.integers(0, CLASSES - 1))
def test_without_a_reject_column_evading_is_any_error(scores, label):
    labels = torch.full((len(scores),), label)
    for loss in ("margin", "cross_entropy"):
        assert torch.equal(
            Evade().loss(scores, labels, CLASSES, loss),
            AnyError().loss(scores, labels, CLASSES, loss),
        )
    assert torch.equal(
        Evade().success(scores, labels, CLASSES), AnyError().success(scores, labels, CLASSES)
    )


@given(score_tables(CLASSES + 1), st.integers(0, CLASSES - 1))
def test_any_error_counts_rejection_and_force_reject_only_that(scores, label):
    labels = torch.full((len(scores),), label)
    decided = scores.argmax(1)
    assert torch.equal(AnyError().success(scores, labels, CLASSES), decided != label)
    assert torch.equal(ForceReject().success(scores, labels, CLASSES), decided == CLASSES)
    assert torch.equal(
        ForceReject().loss(scores, labels, CLASSES),
        scores[:, CLASSES] - scores[:, :CLASSES].amax(1),
    )


@settings(max_examples=50)
@given(
    score_tables(CLASSES + 1),
    st.sampled_from([-50.0, -1.0, 64.0]),
    st.sampled_from([Evade(), AnyError(), ForceReject(), Target(1)]),
    st.sampled_from(["margin", "scaled_margin", "cross_entropy"]),
)
def test_a_constant_added_to_all_scores_changes_nothing(scores, constant, goal, loss):
    """R6: masking is by -inf, never by a factor of 0."""
    scores = scores.double()
    labels = torch.zeros(len(scores), dtype=torch.int64)
    one, other = (goal.loss(table, labels, CLASSES, loss) for table in (scores + constant, scores))
    assert torch.allclose(one, other, atol=1e-9)
    assert torch.equal(
        goal.success(scores + constant, labels, CLASSES), goal.success(scores, labels, CLASSES)
    )


@given(score_tables(CLASSES + 1), st.floats(0, 20))
def test_with_a_confidence_the_wanted_column_must_win_by_it(scores, confidence):
    labels = torch.zeros(len(scores), dtype=torch.int64)
    for goal in (Evade(), AnyError(), ForceReject(), Target(1)):
        sure = goal.success(scores, labels, CLASSES, confidence)
        won = goal.success(scores, labels, CLASSES)
        margin = goal.margin(scores, labels, CLASSES)
        assert torch.equal(sure, won & (margin >= confidence))


@given(
    score_tables(CLASSES + 1),
    st.sampled_from([0.25, 64.0]),
    st.sampled_from([Evade(), AnyError(), ForceReject(), Target(1)]),
)
def test_the_scaled_margin_has_the_sign_of_the_margin_and_no_unit(scores, factor, goal):
    scores = scores.double()
    labels = torch.zeros(len(scores), dtype=torch.int64)
    margin = goal.loss(scores, labels, CLASSES)
    scaled = goal.loss(scores, labels, CLASSES, "scaled_margin")
    assert torch.equal(scaled > 0, margin > 0)
    largest = scores.amax(1) - scores.mean(1)
    clear = largest > 1e-6
    assert torch.allclose((scaled * largest)[clear], margin[clear])
    multiplied = goal.loss(factor * scores, labels, CLASSES, "scaled_margin")
    assert torch.allclose(multiplied[clear], scaled[clear])


def test_the_scaled_margin_of_two_columns_is_the_margin():
    """Divided by half of itself, it would have no gradient."""
    scores = torch.tensor([[3.0, 1.0]], requires_grad=True)
    loss = Evade().loss(scores, torch.tensor([0]), 2, "scaled_margin")
    (gradient,) = torch.autograd.grad(loss.sum(), scores)
    assert float(loss.detach()) == -2.0
    assert gradient.tolist() == [[-1.0, 1.0]]


def test_scores_that_are_not_finite_are_no_success():
    scores = torch.tensor([[0.0, torch.nan, 1.0], [0.0, torch.inf, 1.0], [0.0, -torch.inf, 1.0]])
    labels = torch.zeros(3, dtype=torch.int64)
    assert not AnyError().success(scores, labels, CLASSES).any()


def test_toward_raises_one_wanted_column_and_every_wanted_column_still_counts():
    scores = torch.tensor([[5.0, 3.0, 1.0]])
    labels = torch.tensor([0])
    toward = torch.tensor([2])
    for loss in ("margin", "cross_entropy"):
        raised = scores.clone().requires_grad_()
        value = Evade().loss(raised, labels, CLASSES, loss, toward)
        (gradient,) = torch.autograd.grad(value.sum(), raised)
        assert gradient.tolist() == [[-1.0, 0.0, 1.0]]
        assert float(value.detach()) == -4.0
    other = torch.tensor([[1.0, 5.0, 0.0]])
    assert Evade().success(other, labels, CLASSES).all()


def test_cross_entropy_of_any_error_points_where_the_usual_cross_entropy_does():
    scores = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 1, 2, 0, 1])
    value = AnyError().loss(scores, labels, CLASSES, "cross_entropy")
    (ours,) = torch.autograd.grad(value.sum(), scores)
    usual = torch.nn.functional.cross_entropy(scores, labels, reduction="sum")
    (theirs,) = torch.autograd.grad(usual, scores)
    assert torch.allclose(
        ours / ours.norm(dim=1, keepdim=True), theirs / theirs.norm(dim=1, keepdim=True)
    )


def test_cross_entropy_of_any_error_does_not_vanish_where_the_softmax_saturates():
    scores = torch.tensor([[200.0, 0.0, -5.0]], requires_grad=True)
    labels = torch.tensor([0])
    value = AnyError().loss(scores, labels, CLASSES, "cross_entropy")
    (ours,) = torch.autograd.grad(value.sum(), scores)
    (usual,) = torch.autograd.grad(torch.nn.functional.cross_entropy(scores, labels), scores)
    assert not usual.any()
    assert ours.any()


def test_the_hinge_is_that_of_one_versus_rest_scores_and_does_not_see_the_reject_column():
    """Sec. 2.5.2 of the rejection paper."""
    scores = torch.tensor([[0.2, 0.9, -0.3, 5.0]], requires_grad=True)
    loss = Evade().loss(scores, torch.tensor([1]), 3, "hinge")
    assert float(loss.detach()) == pytest.approx(-(0.8 + 1.9 + 0.7))
    (gradient,) = torch.autograd.grad(loss.sum(), scores)
    assert gradient.tolist() == [[1.0, -1.0, -1.0, 0.0]]


def test_targets_may_differ_between_images_and_follow_a_selection():
    goal = Target(torch.tensor([1, 2, 0]))
    scores = torch.eye(3)
    labels = torch.tensor([0, 0, 1])
    assert goal.success(scores, labels, CLASSES).tolist() == [False, False, False]
    assert goal.success(scores[[1, 2, 0]], labels, CLASSES).tolist() == [True, True, True]
    part = goal.select(torch.tensor([2]))
    assert part.success(scores[:1], labels[:1], CLASSES).tolist() == [True]


@pytest.mark.parametrize(
    ("goal", "said"),
    [
        (Target(5), r"0\.\.2"),
        (Target(-1), r"0\.\.2"),
        (Target(CLASSES), "ForceReject"),  # R22: never the reject column unless asked
        (Target(torch.tensor([1, 2])), "one class, or one for each"),
        (Target(torch.ones(3, 1, dtype=torch.int64)), "one class, or one for each"),
        (Target(0), "true class"),
        (ForceReject(), "reject column"),
    ],
)
def test_goals_that_do_not_fit_are_refused(goal, said):
    with pytest.raises(DemurError, match=said):
        goal.check(torch.tensor([0, 1, 2]), CLASSES, CLASSES)


@pytest.mark.parametrize("classes", [1.0, torch.tensor([0.5]), torch.tensor([True, False])])
def test_a_target_takes_integers(classes):
    with pytest.raises(DemurError, match="integer classes"):
        Target(classes)


def test_an_unknown_loss_offers_the_nearest():
    with pytest.raises(DemurError, match="Did you mean 'margin'"):
        check_loss("margn")
    with pytest.raises(DemurError, match="margin"):
        PGD(loss="margn")


def test_goals_compare_by_value_and_print_readably():
    kinds = [Evade(), AnyError(), ForceReject(), Target(1), Target(2), Target(torch.tensor([1]))]
    for number, goal in enumerate(kinds):
        again = eval(repr(goal))  # repr of this test's own values
        assert again == (Target([1]) if number == 5 else goal)
        assert hash(again) == hash(goal)
        assert [other == goal for other in kinds] == [other is goal for other in kinds]
        assert as_goal(goal) is goal
    assert Target(torch.tensor([1, 2])) == Target(torch.tensor([1, 2], dtype=torch.int32))
    assert Target(torch.tensor([1, 2])) != Target(torch.tensor([2, 1]))
    assert len({*kinds, Evade(), Target(1)}) == len(kinds)


def test_goals_describe_themselves_as_plain_dicts():
    assert Evade().to_dict() == {"goal": "Evade"}
    assert Target(2).to_dict() == {"goal": "Target", "classes": 2}
    assert Target(torch.tensor([2, 0])).to_dict() == {"goal": "Target", "classes": [2, 0]}


@pytest.mark.parametrize("value", ["evade", Evade, None, 3])
def test_what_is_no_goal_is_refused(value):
    with pytest.raises(DemurError, match="a goal is Evade"):
        as_goal(value)
    with pytest.raises(TypeError):
        Goal()


@pytest.mark.parametrize("classes", ["a", None, [[1], [1, 2]], 1.5, True])
def test_classes_that_are_no_integers_are_refused(classes):
    with pytest.raises(DemurError, match="Target takes integer classes"):
        Target(classes)
