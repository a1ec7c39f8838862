import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from demur import REJECT, Classifier, DemurError, Outcome, outcomes
from demur.classifier import check_classifier
from demur.evaluation import offset_for, shifted
from models import Constant, convolutional, images_of, linear


def test_the_decision_is_the_argmax_and_the_last_column_is_rejection():
    images = images_of(1)
    assert Classifier(Constant([0.0, 2.0, 1.0]), 3).predict(images).tolist() == [1]
    assert Classifier(Constant([0.0, 1.0, 2.0]), 2).predict(images).tolist() == [REJECT]
    assert Classifier(Constant([0.0, 3.0, 2.0]), 2).predict(images).tolist() == [1]


def test_every_image_has_one_of_three_outcomes():
    images = images_of(3)
    scores = iter([[1.0, 0.0, 0.5], [0.0, 0.5, 1.0], [0.0, 1.0, 0.5]])
    found = [int(outcomes(Classifier(Constant(next(scores)), 2), images[i : i + 1], torch.tensor([0]))) for i in range(3)]
    assert found == [Outcome.CORRECT, Outcome.REJECTED, Outcome.WRONG] == [0, 1, 2]


def test_scores_are_differentiable_through_the_classifier():
    images = images_of(2).requires_grad_()
    linear(3, 64, 3)(images).sum().backward()
    assert images.grad is not None and bool(images.grad.any())


def test_predicting_uses_evaluation_mode_and_restores_the_mode_of_every_part():
    classifier = convolutional(3)
    classifier.train()
    classifier.module[1].eval()
    modes = [part.training for part in classifier.modules()]
    running = classifier.module[1].running_mean.clone()
    first, second = classifier.predict(images_of(20)), classifier.predict(images_of(20))
    assert torch.equal(first, second)  # dropout was off
    assert [part.training for part in classifier.modules()] == modes
    assert torch.equal(running, classifier.module[1].running_mean)


@given(st.integers(1, 20))
def test_batch_size_does_not_change_decisions(batch_size):
    classifier = linear(4, 64, 3)
    images = images_of(11)
    assert torch.equal(classifier.predict(images, batch_size), classifier.predict(images))


@pytest.mark.parametrize(
    ("images", "said"),
    [
        (torch.zeros(2, 1, 8, 8, dtype=torch.uint8), "float"),
        (torch.full((2, 1, 8, 8), 1.5), "reach from"),
        (torch.full((2, 1, 8, 8), -0.1), "reach from"),
        (torch.full((2, 1, 8, 8), torch.nan), "NaN"),
        (torch.full((2, 1, 8, 8), torch.inf), "NaN or infinite"),
        (torch.zeros(0, 1, 8, 8), "empty"),
        (torch.zeros(8), "shape"),
    ],
)
def test_bad_images_end_at_the_boundary(images, said):
    with pytest.raises(DemurError, match=said):
        linear(3, 64, 3).predict(images)


@pytest.mark.parametrize(
    "labels", [torch.tensor([0, 3]), torch.tensor([-1, 0]), torch.tensor([0.0, 1.0]), torch.tensor([0]), torch.tensor([True, False])]
)
def test_bad_labels_end_at_the_boundary(labels):
    with pytest.raises(DemurError, match="labels"):
        outcomes(linear(3, 64, 3), images_of(2), labels)


def test_a_bare_network_is_refused_with_the_remedy():
    bare = linear(3, 64, 3).module
    for call in (
        lambda: outcomes(bare, images_of(1), torch.tensor([0])),
        lambda: offset_for(bare, images_of(1), 0.1),
        lambda: shifted(bare, 0.0),
    ):
        with pytest.raises(DemurError, match=r"not Linear. Wrap it: Classifier\(module, num_classes=...\)"):
            call()
    with pytest.raises(DemurError, match="not str"):
        check_classifier("network")


def test_scores_of_a_wrong_shape_or_not_finite_are_refused():
    with pytest.raises(DemurError, match=r"gave scores of shape \(1, 5\)"):
        linear(5, 64, 3)(images_of(1))
    with pytest.raises(DemurError, match="NaN or infinite scores"):
        Classifier(Constant([0.0, float("nan")]), 2).predict(images_of(1))
    with pytest.raises(DemurError, match="at least 2 classes"):
        Classifier(nn.Identity(), 1)
