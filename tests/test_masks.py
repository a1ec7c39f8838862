"""Where an attacker may act: boxes, strokes, segmentations, class-activation maps, and the control
of the same area. R26.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from demur import Classifier, DemurError, ThreatModel, data
from demur.attacks import PGD, masks
from models import Constant, convolutional, images_of, linear


def test_boxes_are_left_top_right_bottom_and_each_image_has_its_own():
    mask = masks.inside_boxes((6, 8), [[(1, 2, 4, 5)], [], [(0, 0, 8, 1), (7, 0, 8, 6)]])
    assert mask.shape == (3, 1, 6, 8)
    expected = torch.zeros(6, 8)
    expected[2:5, 1:4] = 1
    assert torch.equal(mask[0, 0], expected) and not mask[1].any()
    assert mask[2, 0, 0].all() and mask[2, 0, :, 7].all() and int(mask[2].sum()) == 8 + 5
    for box in ((0, 0, 9, 6), (-1, 0, 2, 2), (3, 0, 2, 2), (0, 5, 2, 7)):
        with pytest.raises(DemurError, match="does not lie in an image"):
            masks.inside_boxes((6, 8), [[box]])


def test_strokes_are_where_the_image_is_bright_and_grow_by_dilation():
    image = torch.zeros(1, 1, 7, 7)
    image[0, 0, 3, 3] = 1
    assert int(masks.foreground(image).sum()) == 1
    grown = masks.foreground(image, dilation=2)
    assert int(grown.sum()) == 25 and bool(grown[0, 0, 1:6, 1:6].all())
    assert not masks.foreground(torch.zeros(2, 3, 4, 4)).any() and masks.foreground(
        torch.ones(2, 3, 4, 4)
    ).shape == (2, 1, 4, 4)
    with pytest.raises(DemurError, match="dilation"):
        masks.foreground(image, dilation=-1)


def test_a_segmentation_is_a_mask_where_it_is_not_0():
    segmentation = torch.tensor([[[0, 2], [255, 0]]])
    mask = masks.inside_mask(segmentation)
    assert mask.tolist() == [[[[0.0, 1.0], [1.0, 0.0]]]]
    assert torch.equal(masks.inside_mask(segmentation[:, None].bool()), mask)
    with pytest.raises(DemurError, match="segmentation masks"):
        masks.inside_mask(torch.zeros(1, 3, 2, 2))


@given(st.integers(0, 1000), st.integers(1, 5), st.sampled_from([1, 3]), st.integers(2, 9))
def test_the_control_has_the_same_area_and_is_drawn_anew_for_each_image(
    seed, count, channels, size
):
    mask = (
        torch.rand(count, channels, size, size, generator=torch.Generator().manual_seed(seed)) < 0.3
    ).float()
    images = images_of(count, channels, size, seed)
    control = masks.same_area(mask, images, seed)
    assert control.shape == (count, 1, size, size)
    assert torch.equal(control.flatten(1).sum(1), (mask > 0).any(1).flatten(1).sum(1).float())
    assert torch.equal(
        control[-1:], masks.same_area(mask[-1:], images[-1:], seed)
    )  # R10: whatever image comes before it


def test_empty_and_full_masks_have_empty_and_full_controls():
    for value in (0.0, 1.0):
        assert torch.equal(
            masks.same_area(torch.full((1, 1, 4, 4), value), images_of(2, 1, 4)),
            torch.full((2, 1, 4, 4), value),
        )


class _Corner(nn.Module):
    """Class 1 is brightness at the top left, class 0 brightness at the bottom right, after a
    convolution of single pixels.
    """

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 1, bias=False)
        nn.init.constant_(self.conv.weight, 1.0)

    def forward(self, images):
        seen = self.conv(images)
        return torch.stack([seen[:, 0, 4:, 4:].mean((1, 2)), seen[:, 1, :4, :4].mean((1, 2))], 1)


def test_the_activation_map_shows_what_the_network_looks_at():
    """Of the channel of the class only: the gradient is averaged over places, so the map is where
    the channel is active.
    """
    images = torch.zeros(2, 1, 8, 8)
    images[:, 0, 1:3, 1:3] = 1
    classifier = Classifier(_Corner(), 2)
    mask = masks.class_activation(classifier, images, torch.tensor([1, 1]), threshold=0.5)
    assert mask.shape == (2, 1, 8, 8) and torch.equal(mask[0, 0].bool(), images[0, 0].bool())
    assert not masks.class_activation(classifier, torch.zeros(1, 1, 8, 8), torch.tensor([1])).any()


def test_the_activation_map_leaves_the_network_as_it_was_and_is_enlarged_to_the_images():
    classifier, images = convolutional(4), images_of(5)
    labels = classifier.predict(images)
    classifier.train()
    mask = masks.class_activation(classifier, images, labels, batch_size=2)
    assert (
        mask.shape == (5, 1, 8, 8)
        and set(mask.unique().tolist()) <= {0.0, 1.0}
        and classifier.module.training
    )
    assert all(parameter.grad is None for parameter in classifier.parameters())
    assert torch.equal(
        mask, masks.class_activation(classifier, images, labels, batch_size=5, layer="module.0")
    )


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (
            lambda: masks.class_activation(
                convolutional(4), images_of(2), torch.tensor([0, 1]), layer="conv"
            ),
            "unknown layer",
        ),
        (
            lambda: masks.class_activation(
                convolutional(4), images_of(2), torch.tensor([0, 1]), layer="module.5"
            ),
            "channels and pixels",
        ),
        (
            lambda: masks.class_activation(linear(3, 64, 3), images_of(2), torch.tensor([0, 1])),
            "no convolution",
        ),
        (
            lambda: masks.class_activation(convolutional(4), images_of(2), torch.tensor([0, 4])),
            r"0\.\.3",
        ),
        (
            lambda: masks.class_activation(
                convolutional(4), images_of(2), torch.tensor([0, 1]), threshold=1.5
            ),
            "share of the map",
        ),
        (
            lambda: masks.class_activation(
                convolutional(4), images_of(2), torch.tensor([0, 1]), batch_size=0
            ),
            "batch_size must be at least 1",
        ),
        (
            lambda: masks.class_activation(
                convolutional(4).module, images_of(2), torch.tensor([0, 1])
            ),
            "Wrap it: Classifier",
        ),
        (lambda: masks.same_area(torch.ones(1, 1, 9, 9), images_of(2)), "does not broadcast"),
        (lambda: masks.same_area(None, images_of(2)), "needs the mask"),
    ],
)
def test_what_does_not_fit_has_a_message(call, said):
    with pytest.raises(DemurError, match=said):
        call()


def test_an_attack_keeps_to_each_of_them_bit_for_bit_and_an_empty_one_changes_nothing():
    """R26: the object is the digit's strokes; around it, on it, and on as many pixels anywhere."""
    digits = data.load("digits", "test")
    images = digits.to_float()[:6]
    labels = digits.labels[:6]
    classifier = linear(10, 784, 10)
    strokes = masks.foreground(images, dilation=1)
    for mask in (strokes, masks.outside(strokes), masks.same_area(strokes, images)):
        threat = ThreatModel("linf", 0.3, mask=mask)
        result = PGD(steps=10, random_start=True)(classifier, images, labels, threat)
        where = mask.expand_as(images)
        assert bool((result.candidates == images)[where == 0].all())
        assert bool((result.candidates != images)[where == 1].any())
    nowhere = ThreatModel("linf", 0.3, mask=torch.zeros(1, 1, 28, 28))
    empty = PGD(steps=3)(classifier, images, labels, nowhere)
    assert torch.equal(empty.candidates, images)


def test_a_constant_classifier_has_no_map():
    with pytest.raises(DemurError, match="no convolution"):
        masks.class_activation(Classifier(Constant([1.0, 0.0]), 2), images_of(1), torch.tensor([0]))


def test_labels_of_every_integer_type_have_a_map():
    classifier = convolutional(4)
    images = images_of(2)
    labels = torch.tensor([0, 1])
    whole = masks.class_activation(classifier, images, labels)
    assert torch.equal(whole, masks.class_activation(classifier, images, labels.to(torch.uint8)))
