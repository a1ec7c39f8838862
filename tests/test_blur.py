"""Filters against scipy's, and the defences that are made of them. R24, R25."""

import numpy as np
import pytest
import scipy.ndimage
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from demur import Classifier, DemurError, Outcome, attacks, data, outcomes
from demur.defenses import GaussianBlur, MedianBlur, filters, gaussian_blur, median_blur
from demur.defenses.filters import GaussianFilter, MedianFilter
from models import convolutional, images_of

SHAPES = st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(8, 17), st.integers(8, 17))


def drawn(shape, seed, dtype=torch.float64):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@given(SHAPES, st.floats(0.2, 2.3), st.integers(0, 99))
def test_the_gaussian_is_scipys(shape, sigma, seed):
    images = drawn(shape, seed)
    radius = int(np.ceil(3 * sigma))
    expected = scipy.ndimage.gaussian_filter(
        images.numpy(), sigma, mode="mirror", radius=(0, 0, radius, radius), axes=None
    )
    if radius:
        expected = scipy.ndimage.gaussian_filter(
            images.numpy(), sigma, mode="mirror", radius=radius, axes=(2, 3)
        )
    torch.testing.assert_close(gaussian_blur(images, sigma), torch.from_numpy(expected))


@pytest.mark.parametrize("sigma", [0.5, 1.5, 5.0])
def test_the_gaussian_of_large_images_which_goes_in_blocks_is_scipys_and_so_is_its_gradient(
    monkeypatch, sigma
):
    images, radius = drawn((2, 1, 61, 130), 7), int(np.ceil(3 * sigma))
    expected = scipy.ndimage.gaussian_filter(
        images.numpy(), sigma, mode="mirror", radius=radius, axes=(2, 3)
    )
    torch.testing.assert_close(gaussian_blur(images, sigma), torch.from_numpy(expected))
    monkeypatch.setattr(filters, "BLOCK", 4)
    small = drawn((1, 1, 7, 19), 8).requires_grad_()
    assert torch.autograd.gradcheck(lambda given: gaussian_blur(given, sigma / 2.5), small)


def test_the_gaussian_keeps_the_images_precision_where_a_network_computes_in_bfloat16():
    images = drawn((1, 3, 60, 60), 9, torch.float32)
    expected = gaussian_blur(images, 1.5)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(gaussian_blur(images, 1.5), expected)


@given(SHAPES, st.sampled_from([1, 3, 5, 7]), st.integers(0, 99), st.booleans())
def test_the_median_is_scipys(shape, size, seed, few):
    images = drawn(shape, seed)
    images = (4 * images).round() / 4 if few else images  # few values: many are equal
    expected = scipy.ndimage.median_filter(images.numpy(), size=(1, 1, size, size), mode="mirror")
    assert torch.equal(median_blur(images, size), torch.from_numpy(expected))


def test_gradients_are_exact_through_the_gaussian_and_a_subgradient_through_the_median():
    """R24: against finite differences without equal pixels; and no part of a gradient is lost."""
    images = drawn((2, 2, 8, 9), 0).requires_grad_()
    assert torch.autograd.gradcheck(lambda given: gaussian_blur(given, 0.8), images)
    for size in (3, 5):
        assert torch.autograd.gradcheck(lambda given, size=size: median_blur(given, size), images)
    for values in (drawn((1, 1, 8, 8), 1), torch.zeros(1, 1, 8, 8)):
        given_images = values.clone().requires_grad_()
        weights = drawn((1, 1, 8, 8), 2).to(values)
        (weights * median_blur(given_images, 3)).sum().backward()
        torch.testing.assert_close(given_images.grad.sum(), weights.sum())


def test_the_median_of_a_large_batch_is_that_of_its_parts(monkeypatch):
    images = drawn((9, 3, 40, 40), 3, torch.float32)
    whole = {size: median_blur(images, size) for size in (3, 5)}
    monkeypatch.setattr(filters, "CHUNK", 1)
    for size, expected in whole.items():
        assert torch.equal(median_blur(images, size), expected)


@given(st.floats(0.3, 2.0), st.floats(0, 1))
def test_filters_keep_flat_images_and_the_range(sigma, level):
    flat = torch.full((1, 1, 9, 9), level)
    torch.testing.assert_close(gaussian_blur(flat, sigma), flat)
    assert torch.equal(median_blur(flat, 3), flat)
    images = drawn((2, 1, 9, 9), 5)
    for blurred in (gaussian_blur(images, sigma), median_blur(images, 3)):
        assert (
            float(blurred.min()) >= float(images.min()) - 1e-9
            and float(blurred.max()) <= float(images.max()) + 1e-9
        )


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf"), "1", None])
def test_a_sigma_that_is_no_width_is_refused(value):
    for make in (
        lambda: gaussian_blur(images_of(1, 1), value),
        lambda: GaussianFilter(value),
        lambda: GaussianBlur(nn.Identity(), 3, value),
    ):
        with pytest.raises(DemurError, match="sigma must be a number of pixels above 0"):
            make()


@pytest.mark.parametrize("value", [0, 2, 4, -3, 3.0, float("nan"), "3"])
def test_a_median_of_an_even_window_is_refused(value):
    for make in (
        lambda: median_blur(images_of(1, 1), value),
        lambda: MedianFilter(value),
        lambda: MedianBlur(nn.Identity(), 3, value),
    ):
        with pytest.raises(DemurError, match=f"median size must be odd, got {value!r}"):
            make()


def test_filters_that_are_too_large_and_inputs_that_are_no_images_are_refused():
    with pytest.raises(DemurError, match="sigma 3 reaches 9 pixels"):
        gaussian_blur(images_of(1, 1, 8), 3)
    with pytest.raises(DemurError, match="median of 13x13 reaches 6 pixels"):
        median_blur(images_of(1, 1, 6), 13)
    with pytest.raises(DemurError, match="at most 15, got 17"):
        median_blur(images_of(1, 1, 30), 17)
    for filtered in (gaussian_blur, median_blur):
        with pytest.raises(DemurError, match="float images"):
            filtered(torch.zeros(1, 1, 8, 8, dtype=torch.uint8), 1)


@pytest.mark.parametrize(
    "make", [lambda module: GaussianBlur(module, 3, 1.0), lambda module: MedianBlur(module, 3, 3)]
)
def test_no_attack_goes_around_the_filter(make):
    """R24: the attack differentiates the filtered network, and its result is measured on it."""
    network = convolutional(3, 3).module.eval()
    defended = make(network).eval()
    images = images_of(12)
    labels = defended.predict(images)
    torch.testing.assert_close(defended(images), network(defended.filter(images)))
    seen = []
    handle = network.register_forward_hook(
        lambda module, given, output: seen.append(given[0].detach().clone())
    )
    attack = attacks.PGD(steps=5)
    result = attack(defended, images, labels, "linf:0.2", precision="float32")
    handle.remove()
    smooth = torch.cat([one for one in seen if one.shape[1:] == images.shape[1:]])
    roughness = lambda batch: float((batch - defended.filter(batch)).abs().mean())  # noqa: E731
    assert len(smooth) and roughness(smooth) < 0.7 * roughness(images)
    assert torch.equal(outcomes(defended, result.images, labels) == Outcome.WRONG, result.success)


def test_it_is_trained_behind_the_filter_and_nests_with_other_defences():
    train, test = data.load("digits", "train"), data.load("digits", "test")
    network = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    defended = GaussianBlur(network, 10, 1.0).fit(
        train.images, train.labels, epochs=12, batch_size=32
    )
    assert (
        float((defended.predict(test.to_float()) == test.labels).double().mean()) > 0.85
        and len(defended.history_) == 12
    )
    nested = MedianBlur(Classifier(defended, 10), 10, 3)
    torch.testing.assert_close(
        nested(test.to_float()[:4]),
        network(gaussian_blur(median_blur(test.to_float()[:4], 3), 1.0)),
    )
    with pytest.raises(DemurError, match="label"):
        GaussianBlur(network, 5, 1.0).fit(train.images, train.labels, epochs=1)
