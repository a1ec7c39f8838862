"""Image sets from npz archives and from folders of images."""

import io
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from demur.data import ImageSet, NoSplitError, load
from demur.errors import DemurError

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 4, 5), dtype=np.uint8)
LABELS = np.array([0, 1, 2, 0, 1, 2])


def saved(folder, **arrays):
    path = folder / "set.npz"
    np.savez(path, **arrays)
    return path


def test_npz_of_grey_images(tmp_path):
    images = load(
        saved(
            tmp_path,
            images=PIXELS,
            labels=LABELS.astype(np.uint8),
            class_names=np.array(["x", "y", "z"]),
        )
    )
    assert images.images.shape == (6, 1, 4, 5)
    assert np.array_equal(images.images[:, 0].numpy(), PIXELS)
    assert images.labels.tolist() == LABELS.tolist() and images.labels.dtype == torch.int64
    assert images.class_names == ("x", "y", "z")
    assert images.name == "set"


def test_npz_in_other_layouts_and_dtypes(tmp_path):
    colour = np.random.default_rng(0).integers(0, 256, (6, 3, 4, 5), dtype=np.uint8)
    last = np.moveaxis(colour, 1, -1)
    for form in (colour, last, (last / 255).astype(np.float32), last / 255):
        images = load(str(saved(tmp_path, images=form, labels=LABELS)))
        assert np.array_equal(images.images.numpy(), colour)
        assert images.class_names == ("0", "1", "2")
    assert load(saved(tmp_path, images=PIXELS[..., None], labels=LABELS)).images.shape == (
        6,
        1,
        4,
        5,
    )


def test_npz_with_splits(tmp_path):
    path = saved(
        tmp_path,
        train_images=PIXELS,
        train_labels=LABELS,
        test_images=PIXELS[:2],
        test_labels=LABELS[:2] * np.int8(1),
    )
    assert len(load(path)) == 6
    test = load(path, "test")
    assert len(test) == 2 and test.class_names == ("0", "1", "2")
    one = saved(tmp_path, train_images=PIXELS, train_labels=LABELS)
    with pytest.raises(NoSplitError, match="no test split"):
        load(one, "test")
    with pytest.raises(DemurError, match="no array 'test_images'"):
        load(saved(tmp_path, train_images=PIXELS, train_labels=LABELS, test_image=PIXELS), "test")
    with pytest.raises(DemurError, match=r"no test split.*split\(fraction, seed\)"):
        load(saved(tmp_path, images=PIXELS, labels=LABELS), "test")
    with pytest.raises(DemurError, match=r"unknown split 'tset'. Did you mean 'test'"):
        load(path, "tset")


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"labels": LABELS}, "no array 'images', only labels"),
        ({"images": PIXELS}, "no array 'labels'"),
        ({}, "no array 'images', only nothing"),
        ({"images": PIXELS.astype(object), "labels": LABELS}, "'images' holds Python objects"),
        ({"images": PIXELS, "labels": LABELS.astype(object)}, "'labels' holds Python objects"),
        ({"images": PIXELS.astype(np.float32), "labels": LABELS}, r"reach from 0 to 255|\[0, 1\]"),
        ({"images": PIXELS / 255 - 0.5, "labels": LABELS}, r"in \[0, 1\], but reach from -0.5"),
        ({"images": np.full((6, 4, 5), np.nan), "labels": LABELS}, "NaN"),
        ({"images": np.full((6, 4, 5), np.inf), "labels": LABELS}, "infinite"),
        ({"images": PIXELS.astype(np.int64), "labels": LABELS}, "int64; they must be uint8"),
        ({"images": PIXELS.astype(bool), "labels": LABELS}, "bool; they must be uint8"),
        ({"images": PIXELS.reshape(6, 20), "labels": LABELS}, r"shape \(6, 20\)"),
        ({"images": PIXELS[None, None], "labels": LABELS}, "shape"),
        ({"images": PIXELS.reshape(6, 2, 2, 5), "labels": LABELS}, "1 or 3 channels"),
        ({"images": PIXELS[:5], "labels": LABELS}, r"\(5,\), one for each image"),
        ({"images": PIXELS, "labels": LABELS[:, None]}, "one for each image"),
        ({"images": PIXELS, "labels": LABELS.astype(float)}, "float64; they must be integers"),
        ({"images": PIXELS, "labels": LABELS == 1}, "bool; they must be integers"),
        ({"images": PIXELS, "labels": LABELS.astype(str)}, "must be integers"),
        ({"images": PIXELS, "labels": LABELS - 1}, "out of range"),
        ({"images": PIXELS, "labels": LABELS.astype(np.uint64) + np.uint64(2**63)}, "out of range"),
        ({"images": PIXELS, "labels": LABELS * 10**8}, "out of range"),
        (
            {"images": PIXELS, "labels": LABELS, "class_names": np.array(["x", "y"])},
            r"lie in 0\.\.1, but reach from 0 to 2",
        ),
        (
            {"images": PIXELS, "labels": LABELS, "class_names": np.array(["x", "y", "x"])},
            "'x' stands for two",
        ),
        ({"images": PIXELS, "labels": LABELS * 0}, "one class only"),
        ({"images": PIXELS[:0], "labels": LABELS[:0]}, "no images"),
        ({"images": PIXELS[:, :0], "labels": LABELS}, "no images"),
        ({"images": PIXELS, "labels": LABELS[:0]}, "no labels"),
    ],
)
def test_npz_with_bad_arrays_is_a_one_line_error_that_names_the_file(tmp_path, arrays, words):
    path = saved(tmp_path, **arrays)
    with pytest.raises(DemurError, match=words) as caught:
        load(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_files_that_are_no_npz_are_refused(tmp_path):
    whole = saved(tmp_path, images=PIXELS, labels=LABELS).read_bytes()
    array = io.BytesIO()
    np.save(array, PIXELS)
    stray = io.BytesIO()
    with zipfile.ZipFile(stray, "w") as archive:
        archive.writestr("images", "not an array")
        archive.writestr("labels", "not an array")
    for content in (
        b"",
        b"nonsense" * 99,
        whole[: len(whole) // 2],
        whole[50:],
        array.getvalue(),
        stray.getvalue(),
    ):
        path = tmp_path / "bad.npz"
        path.write_bytes(content)
        with pytest.raises(DemurError) as caught:
            load(path)
        assert "bad.npz" in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(
        DemurError, match=r"absent.npz: there is no data set of this name, and no such file"
    ):
        load(tmp_path / "absent.npz")


@given(where=st.floats(0, 1, exclude_max=True), value=st.integers(0, 255), cut=st.booleans())
def test_damage_anywhere_is_a_demur_error_or_harmless(tmp_path_factory, where, value, cut):
    folder = tmp_path_factory.mktemp("damaged")
    path = folder / "set.npz"
    np.savez_compressed(path, images=PIXELS, labels=LABELS)
    content = bytearray(path.read_bytes())
    position = int(where * len(content))
    if cut:
        del content[position:]
    else:
        content[position] = value
    path.write_bytes(content)
    try:
        assert isinstance(load(path), ImageSet)
    except DemurError as error:
        assert "\n" not in str(error)


def save_image(path, pixels, mode=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image = image.convert(mode) if mode else image
    image.save(path, **options)


def test_folder_of_grey_images_by_class(tmp_path):
    for index, name in enumerate(["b/0.png", "b/1.PNG", "a/x.bmp", "a/y.tif"]):
        save_image(tmp_path / name, PIXELS[index])
    (tmp_path / "a" / "notes.txt").write_text("not an image")
    (tmp_path / "a" / ".hidden.png").write_text("not an image")
    (tmp_path / ".cache").mkdir()
    (tmp_path / "readme.md").write_text("not a class")
    images = load(tmp_path)
    assert images.class_names == ("a", "b")
    assert images.labels.tolist() == [0, 0, 1, 1]
    assert images.name == tmp_path.name
    assert np.array_equal(images.images[:, 0].numpy(), PIXELS[[2, 3, 0, 1]])
    with pytest.raises(DemurError, match="no test split"):
        load(tmp_path, "test")


def test_odd_modes_of_grey_become_grey(tmp_path):
    ramp = np.tile(np.arange(0, 256, 17, dtype=np.uint8), (4, 1))
    grey = Image.fromarray(ramp)
    save_image(tmp_path / "a" / "16 bits.png", ramp.astype(np.uint16) * 257)
    save_image(tmp_path / "a" / "16 bits.tif", ramp.astype(np.uint16) * 257)
    save_image(tmp_path / "a" / "grey palette.png", grey, "P")
    opaque = grey.copy()
    opaque.putalpha(255)
    save_image(tmp_path / "b" / "with alpha.png", opaque)
    save_image(tmp_path / "b" / "plain.png", grey)
    images = load(tmp_path)
    assert images.images.shape == (5, 1, 4, 16)
    assert (images.images == torch.from_numpy(ramp)).all()
    save_image(tmp_path / "b" / "black and white.png", grey, "1")
    assert set(load(tmp_path).images[3].unique().tolist()) == {0, 255}


def test_odd_modes_of_colour_become_rgb(tmp_path):
    red = np.zeros((4, 5, 3), np.uint8)
    red[..., 0] = 200
    save_image(tmp_path / "a" / "0 rgb.png", red)
    save_image(tmp_path / "a" / "1 palette.png", Image.fromarray(red).quantize(4))
    half = Image.fromarray(red)
    half.putalpha(Image.fromarray(np.repeat([[255, 255, 0, 0, 0]], 4, 0).astype(np.uint8)))
    save_image(tmp_path / "b" / "0 rgba.png", half)
    see_through = Image.fromarray(red).quantize(4)
    save_image(
        tmp_path / "b" / "1 palette.png", see_through, transparency=see_through.getpixel((0, 0))
    )
    save_image(tmp_path / "b" / "2 grey.png", PIXELS[0])
    save_image(tmp_path / "b" / "3 cmyk.tif", red, "CMYK")
    images = load(tmp_path).images
    assert images.shape == (6, 3, 4, 5)
    assert images[0, :, 0, 0].tolist() == images[1, :, 0, 0].tolist() == [200, 0, 0]
    assert images[2, :, 0, 0].tolist() == [200, 0, 0]
    assert (
        images[2, :, 0, 4].tolist() == images[3, :, 0, 0].tolist() == [255, 255, 255]
    )  # transparent, on white
    assert np.array_equal(images[4].numpy(), np.stack([PIXELS[0]] * 3))
    assert (images[5, :, 0, 0].int() - torch.tensor([200, 0, 0])).abs().max() < 3


def test_the_recorded_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    save_image(tmp_path / "a" / "turned.png", np.rot90(PIXELS[0]), exif=exif)
    save_image(tmp_path / "b" / "plain.png", PIXELS[0])
    first, second = load(tmp_path).images
    assert torch.equal(first, second)


def test_folders_that_are_no_image_sets_are_refused(tmp_path):
    save_image(tmp_path / "a" / "0.png", PIXELS[0])
    with pytest.raises(DemurError, match="1 subfolders"):
        load(tmp_path)
    (tmp_path / "b").mkdir()
    with pytest.raises(DemurError, match="b has no images"):
        load(tmp_path)
    save_image(tmp_path / "b" / "1.png", PIXELS[0].T)
    with pytest.raises(DemurError, match=r"0\.png is 5x4, .*1\.png is 4x5"):
        load(tmp_path)
    (tmp_path / "b" / "1.png").write_bytes((tmp_path / "a" / "0.png").read_bytes()[:40])
    with pytest.raises(DemurError, match=r"cannot read .*1\.png as an image"):
        load(tmp_path)
    (tmp_path / "b" / "1.png").write_bytes(b"nonsense")
    with pytest.raises(DemurError, match=r"cannot read .*1\.png as an image"):
        load(tmp_path)
    (tmp_path / "b" / "1.png").unlink()
    save_image(tmp_path / "b" / "1.tif", PIXELS[0].astype(np.float32))
    with pytest.raises(DemurError, match="floating-point pixels"):
        load(tmp_path)
    with pytest.raises(DemurError, match=r"neither an .npz file nor a folder"):
        load(tmp_path / "a" / "0.png")
