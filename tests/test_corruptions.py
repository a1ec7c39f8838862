"""Common corruptions: ranges, draws, severities, and independent references."""

import io

import numpy as np
import pytest
import torch
from matplotlib.colors import hsv_to_rgb, rgb_to_hsv
from PIL import Image
from scipy import ndimage

from demur import DemurError, data
from demur.data.corruptions import CORRUPTIONS, SEVERITIES, _filtered, _gaussian, corrupt
from models import images_of


def photos(count=3, size=48):
    """Smooth coloured images, on the grid of 8 bits."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, 6, 6, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (size, size), mode="bicubic").clamp(0, 1)
    return (255 * smooth).round() / 255


def test_the_families_are_those_of_imagenet_c():
    assert len(CORRUPTIONS) == 15
    with pytest.raises(DemurError, match="unknown corruption 'rain'"):
        corrupt(photos(), "rain", 1)
    with pytest.raises(DemurError, match="1 to 5"):
        corrupt(photos(), "fog", 6)


@pytest.mark.parametrize("family", CORRUPTIONS)
def test_images_stay_images_and_change(family):
    for images in (photos(), data.load("digits").to_float()[:3], images_of(2, 1, 8)):
        found = corrupt(images, family, 3)
        assert found.shape == images.shape
        assert found.dtype == images.dtype
        assert found.min() >= 0
        assert found.max() <= 1
        if min(images.shape[2:]) > 8:  # a blur of less than a pixel changes nothing
            assert not torch.equal(found, images)


@pytest.mark.parametrize("family", CORRUPTIONS)
def test_draws_depend_on_the_image_and_the_seed_alone(family):
    """R10."""
    images = photos()
    together = corrupt(images, family, 2, seed=1)
    alone = torch.cat([corrupt(one, family, 2, seed=1) for one in images.split(1)])
    assert torch.allclose(together, alone, atol=1e-6)


ORDERED = sorted({*CORRUPTIONS} - {"elastic transform", "fog", "snow"})


@pytest.mark.parametrize("family", ORDERED)
def test_a_higher_severity_changes_more(family):
    """The authors' severities of fog, snow and the elastic transform trade one number for another:
    the mean change says little of them. Glass blur rounds its reach to pixels: it needs their size.
    """
    images = photos(2, 224) if family == "glass blur" else photos(6)
    sizes = [float((corrupt(images, family, level) - images).abs().mean()) for level in SEVERITIES]
    assert sizes[0] < sizes[2] < sizes[4]


def test_fog_takes_contrast_by_the_authors_factor():
    """White and black stay apart by brightest / (brightest + amount), where fog is the same."""
    image = torch.zeros(1, 1, 64, 64)
    image[..., ::2] = 1.0
    for severity, amount in enumerate((1.5, 2, 2.5, 2.5, 3), 1):
        found = corrupt(image, "fog", severity)
        apart = float((found[..., ::2] - found[..., 1::2]).mean())
        assert apart == pytest.approx(1 / (1 + amount), abs=0.02)


def test_noise_has_the_known_spread():
    grey = torch.full((1, 1, 200, 200), 0.5)
    gaussian = corrupt(grey, "gaussian noise", 1)
    assert float(gaussian.std()) == pytest.approx(0.08, rel=0.03)
    shot = corrupt(grey, "shot noise", 2)
    assert float(shot.mean()) == pytest.approx(0.5, rel=0.02)
    assert float(shot.std()) == pytest.approx((0.5 / 25) ** 0.5, rel=0.03)
    impulse = corrupt(grey, "impulse noise", 4)
    assert float((impulse == 1).float().mean()) == pytest.approx(0.085, abs=0.006)
    assert float((impulse == 0).float().mean()) == pytest.approx(0.085, abs=0.006)


def test_brightness_is_that_of_hsv():
    images = photos()
    found = corrupt(images, "brightness", 3)
    hsv = rgb_to_hsv(images.permute(0, 2, 3, 1).numpy())
    hsv[..., 2] = np.clip(hsv[..., 2] + 0.3, 0, 1)
    assert np.allclose(found.permute(0, 2, 3, 1).numpy(), hsv_to_rgb(hsv), atol=1e-5)


def test_filters_are_those_of_scipy():
    images = photos(1)
    generator = torch.Generator().manual_seed(0)
    kernel = torch.rand(1, 5, 5, generator=generator)
    found = _filtered(images, kernel)
    expected = [
        ndimage.correlate(one.numpy(), kernel[0].numpy(), mode="mirror") for one in images[0]
    ]
    assert np.allclose(found[0].numpy(), np.stack(expected), atol=1e-5)
    blurred = _gaussian(images, 1.5)[0, 0].numpy()
    reference = ndimage.gaussian_filter(images[0, 0].numpy(), 1.5, mode="mirror", radius=5)
    assert np.allclose(blurred, reference, atol=1e-4)


def test_pixelation_and_compression_are_those_of_pillow():
    images = photos(1)
    pixels = (255 * images[0]).to(torch.uint8).permute(1, 2, 0).numpy()
    small = Image.fromarray(pixels).resize((24, 24), Image.Resampling.BOX)
    large = np.array(small.resize((48, 48), Image.Resampling.NEAREST)) / 255
    found = corrupt(images, "pixelate", 2)[0].permute(1, 2, 0).numpy()
    assert np.abs(found - large).max() < 1.01 / 255
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=15)
    found = corrupt(images, "JPEG compression", 3)[0].permute(1, 2, 0).numpy()
    assert np.allclose(found, np.array(Image.open(file)) / 255, atol=1e-6)


def test_blurs_keep_a_constant_image():
    grey = torch.full((2, 3, 40, 40), 0.4)
    for family in ("defocus blur", "glass blur", "motion blur", "zoom blur", "elastic transform"):
        assert torch.allclose(corrupt(grey, family, 5), grey, atol=1e-5)
