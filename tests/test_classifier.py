"""The contract of classifiers: scores, decisions, outcomes, rejection, thresholds and modes."""

import threading

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from demur import REJECT, Classifier, DemurError, Outcome, black_box, outcomes, seeds
from demur.classifier import check_classifier, evaluating
from demur.files import fingerprint
from models import Constant, convolutional, images_of, linear


def test_the_decision_is_the_argmax_and_the_last_column_is_rejection():
    images = images_of(1)
    assert Classifier(Constant([0.0, 2.0, 1.0]), 3).predict(images).tolist() == [1]
    assert Classifier(Constant([0.0, 1.0, 2.0]), 2).predict(images).tolist() == [REJECT]
    assert Classifier(Constant([0.0, 3.0, 2.0]), 2).predict(images).tolist() == [1]


def test_every_image_has_one_of_three_outcomes():
    images = images_of(3)
    scores = iter([[1.0, 0.0, 0.5], [0.0, 0.5, 1.0], [0.0, 1.0, 0.5]])
    found = [
        int(outcomes(Classifier(Constant(next(scores)), 2), images[i : i + 1], torch.tensor([0])))
        for i in range(3)
    ]
    assert found == [Outcome.CORRECT, Outcome.REJECTED, Outcome.WRONG] == [0, 1, 2]


def test_scores_are_differentiable_through_the_classifier():
    images = images_of(2).requires_grad_()
    linear(3, 64, 3)(images).sum().backward()
    assert images.grad is not None and bool(images.grad.any())


# Rejection and the threshold


def test_rejection_is_learnt_at_the_first_forward_pass():
    for outputs in (3, 4):
        classifier = linear(outputs, 64, 3)
        with pytest.raises(DemurError, match="not known before its first forward pass"):
            _ = classifier.rejects
        with pytest.raises(DemurError, match="not known"):
            _ = classifier.threshold
        classifier.predict(images_of(1))
        assert classifier.rejects is (outputs == 4)
        assert classifier.threshold == (0.0 if outputs == 4 else None)


def test_what_is_learnt_does_not_change_a_classifiers_fingerprint():
    classifier = linear(4, 64, 3)
    before = fingerprint(classifier)
    classifier.predict(images_of(1))
    assert fingerprint(classifier) == before
    classifier.set_threshold(1.0)
    assert fingerprint(classifier) != before


@pytest.mark.parametrize("rejects", [True, False])
def test_a_forward_pass_that_contradicts_rejects_is_an_error(rejects):
    right = linear(3 + rejects, 64, 3).module
    wrong = linear(4 - rejects, 64, 3).module
    classifier = Classifier(right, 3, rejects=rejects)
    assert classifier.rejects is rejects
    classifier.predict(images_of(2))
    with pytest.raises(DemurError, match=f"rejects={rejects} needs"):
        Classifier(wrong, 3, rejects=rejects).predict(images_of(2))
    learnt = Classifier(right, 3)
    learnt.predict(images_of(2))
    learnt.module = wrong
    with pytest.raises(DemurError, match=f"rejects={rejects} needs"):
        learnt(images_of(2))


@given(st.floats(-5, 5, width=32))
def test_the_threshold_is_the_smallest_reject_margin_that_is_accepted(value):
    classifier = linear(4, 64, 3)
    images = images_of(30)
    scores = classifier.scores(images)
    margins = scores[:, :3].amax(1) - scores[:, 3]
    classifier.set_threshold(value)
    assert classifier.threshold == value
    accepted = classifier.predict(images) != REJECT
    clear = (margins - value).abs() > 1e-4
    assert torch.equal(accepted[clear], (margins >= value)[clear])
    assert torch.equal(classifier.scores(images)[:, :3], scores[:, :3])
    classifier.set_threshold(0.0)
    assert torch.equal(classifier.scores(images), scores)


def test_the_threshold_is_exact_at_the_margin():
    classifier = Classifier(Constant([2.0, 0.0, 1.0]), 2)
    classifier.predict(images_of(1))
    for value, accepted in ((1.0, True), (1.0 + 2**-20, False)):
        classifier.set_threshold(value)
        assert bool((classifier.predict(images_of(1)) != REJECT).all()) is accepted


def test_thresholds_that_make_no_sense_are_refused():
    with pytest.raises(DemurError, match="no reject score"):
        Classifier(Constant([0.0, 1.0]), 2, rejects=False).set_threshold(1.0)
    for value in (float("nan"), float("inf")):
        with pytest.raises(DemurError, match="finite"):
            Classifier(Constant([0.0, 1.0, 2.0]), 2, rejects=True).set_threshold(value)


def test_probabilities_are_the_softmax_of_the_classes_alone():
    for outputs in (3, 4):
        classifier = linear(outputs, 64, 3)
        images = images_of(7)
        expected = classifier.scores(images)[:, :3].softmax(1)
        assert torch.equal(classifier.predict_proba(images), expected)
        nested = Classifier(classifier, 3).predict_proba(images, 2)
        torch.testing.assert_close(nested, expected)


# Modes


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


class Merging(nn.Linear):
    """Like a LoRA layer: `train(mode)` merges or splits the weights."""

    merged = False

    def train(self, mode=True):
        super().train(mode)
        self.merged = not mode
        return self


def test_d9_modes_are_switched_by_train_and_eval_so_that_overrides_run():
    """D9."""
    inner = Merging(64, 3)
    classifier = Classifier(nn.Sequential(nn.Flatten(), nn.Sequential(inner)), 3).train()
    for mode in (True, False):
        inner.train(mode)
        with evaluating(classifier):
            assert inner.merged and not inner.training
        assert inner.training is mode and inner.merged is not mode
        assert classifier.training


def test_modes_are_restored_after_an_error_and_nested_use():
    classifier = convolutional(3).train()
    with pytest.raises(KeyError), evaluating(classifier), evaluating(classifier.module):
        raise KeyError
    assert all(part.training for part in classifier.modules())
    with evaluating(classifier):
        with evaluating(classifier.module):
            pass
        assert not any(part.training for part in classifier.modules())


def test_d8_threads_predict_alike_on_a_classifier_in_training_mode():
    """D8."""
    classifier = convolutional(3).train()
    images = images_of(64)
    running = classifier.module[1].running_mean.clone()
    expected = classifier.scores(images, 8)
    wrong = []

    def work():
        for _ in range(15):
            if not torch.equal(classifier.scores(images, 8), expected):
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert all(part.training for part in classifier.modules())
    assert torch.equal(running, classifier.module[1].running_mean)


# Modules of all kinds


class InPlace(nn.Module):
    def forward(self, images):
        return images.mul_(-1).flatten(1)[:, :3]


def test_d10_a_module_that_works_in_place_does_not_change_the_callers_images():
    """D10."""
    images = images_of(4)
    before = images.clone()
    classifier = Classifier(InPlace(), 3)
    assert torch.equal(classifier.predict(images), classifier.predict(images))
    classifier(images)
    assert torch.equal(images, before)
    differentiated = images.clone().requires_grad_()
    classifier(differentiated).sum().backward()
    assert float(differentiated.grad.sum()) == -12.0


class Rows(nn.Module):
    def __init__(self, rows, columns):
        super().__init__()
        self.shape = rows, columns

    def forward(self, images):
        return torch.zeros(self.shape)


@pytest.mark.parametrize("shape", [(1, 3), (1, 4), (5, 3), (0, 3), (4, 5), (4, 2)])
def test_d11_scores_of_another_number_of_rows_or_columns_are_refused(shape):
    """D11."""
    with pytest.raises(DemurError, match=r"4 images; a classifier of 3 classes"):
        Classifier(Rows(*shape), 3).predict(images_of(4))


def test_scores_of_a_wrong_shape_or_not_finite_are_refused():
    with pytest.raises(DemurError, match=r"gave scores of shape \(1, 5\)"):
        linear(5, 64, 3)(images_of(1))
    with pytest.raises(DemurError, match="NaN or infinite scores"):
        Classifier(Constant([0.0, float("nan")]), 2).predict(images_of(1))
    with pytest.raises(DemurError, match="at least 2 classes"):
        Classifier(nn.Identity(), 1)


@pytest.mark.parametrize("wrap", [tuple, lambda scores: {"logits": scores}])
def test_d29_outputs_that_are_no_tensor_are_refused_with_the_remedy(wrap):
    """D29."""

    class Wrapped(nn.Module):
        def forward(self, images):
            return wrap([images.flatten(1)]) if wrap is tuple else wrap(images.flatten(1))

    with pytest.raises(DemurError, match="instead of a tensor of scores: wrap it"):
        Classifier(Wrapped(), 64).predict(images_of(2))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_d27_images_are_taken_in_the_precision_of_the_module(dtype):
    """D27."""
    classifier = linear(3, 64, 3).to(dtype)
    for images in (images_of(3), images_of(3).double()):
        assert classifier(images).dtype == dtype
        assert classifier.scores(images).dtype == torch.float32


@pytest.mark.filterwarnings("ignore")
def test_d28_frozen_and_exported_modules_predict():
    """D28."""
    images = images_of(6)
    module = nn.Sequential(nn.Flatten(), nn.Linear(64, 3)).eval()
    expected = Classifier(module, 3).predict(images)
    frozen = torch.jit.freeze(torch.jit.script(module))
    exported = torch.export.export(module, (images,)).module()
    for other in (frozen, exported):
        assert torch.equal(Classifier(other, 3).predict(images), expected)


def test_d30_a_black_box_of_one_image_at_a_time_is_measured_by_batches_of_one():
    """D30."""

    def one(array):
        assert len(array) == 1
        return array.reshape(1, -1)[:, :3]

    classifier = black_box(one, 3)
    images = images_of(5)
    labels = images.flatten(1)[:, :3].argmax(1)
    assert outcomes(classifier, images, labels, batch_size=1).tolist() == [0] * 5
    assert torch.equal(classifier.predict(images, 1), labels)
    with pytest.raises(DemurError, match="batch_size"):
        classifier.predict(images, 0)
    with pytest.raises(DemurError, match="one row of numbers"):
        black_box(lambda array: array.reshape(1, -1)[:, :3], 3).predict(images)


# Checks


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
        (torch.zeros(0, 1, 8, 8), "no pixels"),
        (torch.zeros(2, 0, 8, 8), "no pixels"),
        (torch.zeros(2, 1, 0, 8), "no pixels"),
        (torch.zeros(8), "shape"),
        (torch.zeros(1, 8, 8), r"images\[None\]"),
    ],
)
def test_d29_bad_images_end_at_the_boundary(images, said):
    """D29."""
    with pytest.raises(DemurError, match=said):
        linear(3, 64, 3).predict(images)


@pytest.mark.parametrize(
    "labels",
    [
        torch.tensor([0, 3]),
        torch.tensor([-1, 0]),
        torch.tensor([0.0, 1.0]),
        torch.tensor([0]),
        torch.tensor([True, False]),
        torch.tensor([0, 1], dtype=torch.uint16),
    ],
)
def test_d29_bad_labels_end_at_the_boundary(labels):
    """D29."""
    with pytest.raises(DemurError, match="labels"):
        outcomes(linear(3, 64, 3), images_of(2), labels)


def test_a_bare_network_is_refused_with_the_remedy():
    bare = linear(3, 64, 3).module
    remedy = r"not Linear. Wrap it: Classifier\(module, num_classes=...\)"
    with pytest.raises(DemurError, match=remedy):
        outcomes(bare, images_of(1), torch.tensor([0]))
    with pytest.raises(DemurError, match="not str"):
        check_classifier("network")


def test_a_module_around_an_evaluated_one_leaves_it_in_evaluation_mode():
    """A regularizer evaluates features of a network under attack: dropout stays off (R3)."""
    inner = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))
    outer = nn.Sequential(inner)
    with evaluating(inner):
        with evaluating(outer):
            assert not outer.training
        assert outer.training
        assert not any(part.training for part in inner.modules())
    assert all(part.training for part in outer.modules())


@pytest.mark.parametrize("answer", [3.0, [[1.0], [1.0, 2.0]], None, [1.0]])
def test_a_black_box_that_gives_no_rows_is_refused(answer):
    with pytest.raises(DemurError, match="the black box gave"):
        black_box(lambda images: answer, 2).predict(images_of(2))


@pytest.mark.parametrize("value", [2.0, "2", None, True])
def test_counts_that_are_no_integers_are_refused(value):
    with pytest.raises(DemurError, match="batch_size must be an integer"):
        linear(3, 64, 3).predict(images_of(2), batch_size=value)
    with pytest.raises(DemurError, match="num_classes must be an integer"):
        Classifier(nn.Flatten(), value)


def test_integers_of_numpy_are_integers():
    classifier = linear(3, 64, 3)
    images = images_of(3)
    whole = classifier.scores(images)
    torch.testing.assert_close(classifier.scores(images, batch_size=np.int64(2)), whole)
    drawn = [seeds.uniform([7], (3,), seed, "test") for seed in (1, np.int64(1), torch.tensor(1))]
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[0], drawn[2])
    assert seeds.derive(1, "order") == seeds.derive(np.int64(1), "order")


def test_a_seed_of_another_run_has_the_old_stream():
    """R10: figures of the past stay reproducible."""
    assert seeds.derive(0, "order", 1) == 5497976924323847302


@pytest.mark.parametrize("seed", [None, 1.0, "1"])
def test_a_seed_that_is_no_integer_is_refused(seed):
    with pytest.raises(DemurError, match="seed must be an integer"):
        seeds.derive(seed, "order")


def test_a_threshold_without_a_reject_column_changes_no_score():
    """A file once brought one: the last class took it."""
    classifier = linear(3, 64, 3)
    images = images_of(3)
    scores = classifier.scores(images)
    classifier._threshold = 1e6
    assert torch.equal(classifier.scores(images), scores)
