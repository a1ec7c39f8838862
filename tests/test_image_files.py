"""Images in files that are decoded on demand: geometry, reading, splits, and the engine on them."""

import dataclasses
import hashlib
import json
import os
import re
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps
from polars.testing import assert_frame_equal
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

import plans
from demur import Classifier, ThreatModel, data
from demur.attacks import PGD
from demur.classifier import Preprocess
from demur.data import ImageFiles, ImageSet, ResizedImages, in_memory, read_images
from demur.errors import DemurError
from demur.evaluation import keys, on_images
from demur.evaluation.keys import Environment, Keys
from demur.evaluation.nodes import Load
from demur.evaluation.on_images import Evaluate
from demur.evaluation.pictures import gallery

SMALL = Preprocess(size=(8, 8), resize=10)
MODES = {mode.value: mode for mode in InterpolationMode}


def noise(height, width, channels=3, seed=0):
    shape = (height, width) if channels == 1 else (height, width, channels)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def save(path, pixels=None, mode=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = noise(12, 10, seed=len(str(path))) if pixels is None else pixels
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(path, **options)
    return path


def some_files(folder, count=12, classes=3, size=(12, 10), channels=3):
    """Write different images in the order of their labels i % classes."""
    paths = [
        str(save(folder / f"{i:04d}.png", noise(*size, channels, seed=i))) for i in range(count)
    ]
    names = tuple(f"class {label}" for label in range(classes))
    labels = torch.arange(count) % classes
    return ImageFiles(tuple(paths), labels, names, "some", SMALL)


@pytest.fixture
def photos(tmp_path):
    """A folder with three classes of two images each."""
    for name in ("cat", "dog", "owl"):
        for number in range(2):
            save(tmp_path / "photos" / name / f"{number}.png", noise(12, 10, seed=hash_of(name)))
    return tmp_path / "photos"


def hash_of(name):
    return zlib.crc32(name.encode())


def refused(words, *arguments, **options):
    """Read images, expect an error of one printable line, and give it."""
    with pytest.raises(DemurError, match=words) as caught:
        read_images(*arguments, **options)
    text = str(caught.value)
    assert text.isprintable() and len(text) < 1500
    return text


# Geometry


def torchvision_pixels(image, preprocess):
    """The same geometry by torchvision."""
    mode = MODES[preprocess.interpolation]
    size = list(preprocess.size)
    steps = [Resize(size, mode)]
    if preprocess.resize is not None:
        steps = [Resize(preprocess.resize, mode), CenterCrop(size)]
    pixels = np.asarray(Compose(steps)(image))
    return torch.from_numpy(
        np.array(pixels[None] if pixels.ndim == 2 else np.moveaxis(pixels, 2, 0))
    )


@given(
    height=st.integers(1, 70),
    width=st.integers(1, 70),
    size=st.tuples(st.integers(1, 30), st.integers(1, 30)),
    more=st.none() | st.integers(0, 9),
    interpolation=st.sampled_from(["nearest", "bilinear", "bicubic", "lanczos"]),
    channels=st.sampled_from([1, 3]),
    grey=st.booleans(),
)
def test_pixels_have_the_same_bits_as_those_of_torchvision(
    tmp_path_factory, height, width, size, more, interpolation, channels, grey
):
    resize = None if more is None else max(size) + more
    preprocess = Preprocess(size, resize, interpolation, channels=channels)
    path = tmp_path_factory.mktemp("one") / "a.png"
    save(path, noise(height, width, 1 if grey else 3, seed=height * width))
    files = ImageFiles((str(path),), torch.tensor([0]), ("a", "b"), preprocess=preprocess)
    with Image.open(path) as image:
        expected = torchvision_pixels(image.convert("L" if channels == 1 else "RGB"), preprocess)
    found = files.read(slice(None))
    assert found.dtype == torch.uint8 and found.shape == (1, *files.image_shape)
    assert torch.equal(found[0], expected)


@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "tif", "bmp", "gif"])
def test_formats_and_modes_are_read_as_pillow_does(tmp_path, ending):
    modes = {"jpg": ["L", "RGB", "CMYK"], "tif": ["L", "RGB", "CMYK"], "gif": ["P"]}
    preprocess = Preprocess(size=(16, 16), resize=18, interpolation="bicubic")
    for mode in modes.get(ending, ["RGB"]):
        path = save(tmp_path / f"{mode}.{ending}", noise(30, 41), mode)
        files = ImageFiles((str(path),), torch.tensor([0]), ("a", "b"), preprocess=preprocess)
        with Image.open(path) as image:
            expected = torchvision_pixels(image.convert("RGB"), preprocess)
        assert torch.equal(files.read(slice(None))[0], expected)


def test_the_recorded_orientation_is_applied_before_the_crop(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = save(tmp_path / "a.jpg", noise(20, 50), exif=exif, quality=95)
    labels = torch.tensor([0])
    files = ImageFiles((str(path),), labels, ("a", "b"), preprocess=SMALL)
    with Image.open(path) as image:
        upright = ImageOps.exif_transpose(image)
        assert not torch.equal(torchvision_pixels(image, SMALL), files.read(labels)[0])
    assert torch.equal(files.read(labels)[0], torchvision_pixels(upright, SMALL))
    own = ImageFiles((str(path),), labels, ("a", "b"))
    assert own.image_shape == (3, 50, 20) == tuple(own.read(labels).shape[1:])


def test_deep_and_transparent_images_are_read_as_photographs_are(tmp_path):
    deep = save(tmp_path / "deep.png", (noise(8, 8, 1).astype(np.uint16) * 257))
    clear = noise(8, 8, 4)
    clear[..., 3] = 0
    see_through = save(tmp_path / "clear.png", clear)
    paths = (str(deep), str(see_through))
    files = ImageFiles(paths, torch.tensor([0, 1]), ("a", "b"), preprocess=Preprocess((8, 8)))
    found = files.read(slice(None))
    assert torch.equal(found[0], torch.from_numpy(noise(8, 8, 1)).expand(3, 8, 8))
    assert (found[1] == 255).all()
    for path, pixels in zip(paths, found, strict=True):
        assert torch.equal(data.read_photo(Path(path)).pixels, pixels)


def test_without_a_size_all_images_need_the_same_one(tmp_path):
    files = dataclasses.replace(some_files(tmp_path), preprocess=Preprocess())
    assert files.image_shape == (3, 12, 10)
    assert torch.equal(
        files.read(slice(3, 4))[0], torch.from_numpy(noise(12, 10, seed=3)).permute(2, 0, 1)
    )
    save(tmp_path / "0005.png", noise(10, 12))
    again = dataclasses.replace(files)
    message = r"0000.png is 10x12, .*0005.png is 12x10.*--img-size"
    with pytest.raises(DemurError, match=message):
        _ = again.image_shape
    with pytest.raises(DemurError, match=message):
        again.read(slice(5, 6))
    assert again.subset([0, 1]).image_shape == (3, 12, 10)


def test_an_image_that_would_explode_when_resized_is_refused(tmp_path):
    path = save(tmp_path / "a.png", np.zeros((1, 60_000), np.uint8))
    preprocess = Preprocess(size=(224, 224), resize=256)
    files = ImageFiles((str(path),), torch.tensor([0]), ("a", "b"), preprocess=preprocess)
    with pytest.raises(DemurError, match=r"a.png has 60000x1 pixels: resized to 256"):
        files.read(slice(None))


# The set


@given(
    counts=st.lists(st.integers(0, 9), min_size=2, max_size=5).filter(any),
    n=st.integers(1, 30),
    seed=st.integers(0, 99),
)
def test_files_are_drawn_as_images_in_memory_are(counts, n, seed):
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))]
    names = tuple(map(str, range(len(counts))))
    paths = tuple(map(str, range(len(labels))))  # nothing is opened
    files = ImageFiles(paths, labels, names)
    pixels = torch.arange(len(labels), dtype=torch.uint8).view(-1, 1, 1, 1)
    images = ImageSet(pixels, labels, names)
    for drawn in (images.sample(n, seed), ResizedImages(images, SMALL).sample(n, seed).base):
        assert [
            int(path) for path in files.sample(n, seed).paths
        ] == drawn.images.flatten().tolist()
    assert torch.equal(files.counts(), images.counts())
    with pytest.raises(DemurError, match="at least 1 image"):
        files.sample(0, seed)


def test_rows_are_read_by_ranges_and_indices(tmp_path):
    files = some_files(tmp_path)
    every = files.read(slice(None))
    assert torch.equal(files.read(slice(2, 5)), every[2:5])
    assert torch.equal(files.read(torch.tensor([7, 0, 7])), every[[7, 0, 7]])
    assert torch.equal(files.subset([7, 1]).read(slice(None)), every[[7, 1]])
    assert files.read(slice(4, 4)).shape == (0, 3, 8, 8)
    for bad in ([12], [-1], [0.5], [], [[0]]):
        with pytest.raises(DemurError):
            files.subset(torch.tensor(bad))
    images = in_memory(files)
    assert torch.equal(images.images, every) and torch.equal(images.labels, files.labels)
    assert torch.equal(images.read(torch.tensor([3, 1])), every[[3, 1]])
    assert images.image_shape == files.image_shape == (3, 8, 8)
    assert repr(files) == "ImageFiles('some': 12 files, 3 classes)"


def test_hashes_are_those_of_the_bytes_and_of_the_pixels(tmp_path):
    files = some_files(tmp_path)
    oracle = [
        hashlib.blake2b(Path(p).read_bytes(), digest_size=16).hexdigest() for p in files.paths
    ]
    assert files.hashes == tuple(one[:16] for one in oracle)
    # Records of earlier versions hold these hashes.
    pixels = torch.arange(12, dtype=torch.uint8).view(1, 3, 2, 2)
    framed = (12).to_bytes(8, "little") + bytes(range(12))
    known = hashlib.blake2b(framed, digest_size=16).hexdigest()[:16]
    images = ImageSet(pixels, torch.tensor([0]), ("a", "b"))
    assert images.hashes == ResizedImages(images, SMALL).hashes == (known,)


def test_the_fingerprint_follows_content_geometry_labels_and_names_alone(tmp_path):
    files = some_files(tmp_path / "a")
    vary = dataclasses.replace
    moved = some_files(tmp_path / "b")
    normalised = vary(SMALL, mean=(0.5,) * 3, std=(0.5,) * 3)
    same = [moved, vary(files, name="other", notes=("x",)), vary(files, preprocess=normalised)]
    assert {one.fingerprint for one in same} == {files.fingerprint}
    save(Path(moved.paths[3]), noise(12, 10, seed=99))
    others = [
        vary(moved),
        vary(files, labels=files.labels.flip(0)),
        vary(files, class_names=("a", "b", "c")),
        files.subset(range(11)),
        *(
            vary(files, preprocess=vary(SMALL, **change))
            for change in (
                {"size": (9, 8)},
                {"resize": None},
                {"interpolation": "bicubic"},
                {"channels": 1},
            )
        ),
    ]
    assert len({files.fingerprint, *(one.fingerprint for one in others)}) == 1 + len(others)


def test_a_file_is_read_once_for_its_hash_and_a_change_is_noticed(tmp_path):
    files = some_files(tmp_path)
    hashes = files.hashes
    pixels = files.read(slice(0, 1))
    Path(files.paths[5]).unlink()
    assert files.subset([5, 4]).hashes == (hashes[5], hashes[4])  # known already
    save(Path(files.paths[0]), noise(12, 10, seed=77))
    with pytest.raises(DemurError, match=r"0000.png changed while it was used"):
        files.subset([0]).read(slice(None))
    assert not torch.equal(dataclasses.replace(files).read(slice(0, 1)), pixels)
    with pytest.raises(DemurError, match=r"cannot read .*0005.png as an image"):
        _ = dataclasses.replace(files).hashes


def test_parts_that_do_not_fit_are_refused():
    with pytest.raises(DemurError, match="no image files"):
        ImageFiles((), torch.zeros(0, dtype=torch.int64), ("a", "b"))
    with pytest.raises(DemurError, match="one for each image"):
        ImageFiles(("a",), torch.tensor([0, 1]), ("a", "b"))
    with pytest.raises(DemurError, match=r"lie in 0\.\.1"):
        ImageFiles(("a",), torch.tensor([2]), ("a", "b"))


# Files that cannot be read


def png_header(width, height):
    """A PNG file that says it is large, and ends there."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n" + chunk


BAD = {
    "text": b"nonsense",
    "empty": b"",
    "bomb": png_header(60_000, 60_000),
    "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n",
}


@pytest.mark.parametrize("kind", [*BAD, "cut", "folder"])
def test_an_unreadable_image_is_an_error_of_one_line_that_names_the_file(tmp_path, kind):
    files = some_files(tmp_path, count=3)
    path = Path(files.paths[1])
    whole = path.read_bytes()
    path.unlink()
    if kind == "folder":
        path.mkdir()
    else:
        path.write_bytes(BAD.get(kind, whole[: len(whole) // 2]))
    with pytest.raises(DemurError, match=r"cannot read .*0001.png as an image: [\w/]") as caught:
        files.read(slice(None))
    assert str(caught.value).isprintable()
    if kind != "cut":  # the header of a cut file is good
        with pytest.raises(DemurError, match=r"cannot read .*0001.png as an image"):
            _ = files.hashes


@given(
    where=st.floats(0, 1, exclude_max=True),
    value=st.integers(0, 255),
    kind=st.sampled_from(["png", "jpg", "gif", "tif", "webp", "bmp"]),
)
def test_damage_anywhere_is_a_demur_error_or_harmless(tmp_path_factory, where, value, kind):
    path = save(tmp_path_factory.mktemp("damaged") / f"a.{kind}", noise(9, 9))
    content = bytearray(path.read_bytes())
    content[int(where * len(content))] = value
    path.write_bytes(content)
    files = ImageFiles((str(path),), torch.tensor([0]), ("a", "b"), preprocess=SMALL)
    try:
        assert files.read(slice(None)).shape == (1, 3, 8, 8)
    except DemurError as error:
        assert str(error).isprintable()


def test_names_of_files_reach_no_message_unescaped(tmp_path):
    name = "evil\x1b[31m\n" + "x" * 200
    (tmp_path / "p" / name).mkdir(parents=True)
    (tmp_path / "p" / "good").mkdir()
    (tmp_path / "p" / name / "a\x1b[2J.png").write_bytes(b"nonsense")
    save(tmp_path / "p" / "good" / "a.png")
    files = read_images(tmp_path / "p", preprocess=SMALL)
    with pytest.raises(DemurError, match="as an image") as caught:
        files.read(slice(None))
    assert str(caught.value).isprintable()
    refused("no classes of the model", tmp_path / "p", preprocess=SMALL, classes=["a", "b"])
    assert all(note.isprintable() and len(note) < 400 for note in files.notes)


# Folders


def test_a_folder_with_a_folder_for_each_class(photos):
    (photos / "cat" / "notes.txt").write_text("no image")
    (photos / "cat" / ".hidden.png").write_text("hidden")
    (photos / "readme.md").write_text("no class")
    (photos / ".cache").mkdir()
    (photos / "owl" / "link.png").symlink_to(photos / "cat" / "0.png")
    files = read_images(photos, preprocess=SMALL)
    assert isinstance(files, ImageFiles)
    assert files.class_names == ("cat", "dog", "owl")
    assert files.labels.tolist() == [0, 0, 1, 1, 2, 2, 2]
    assert [Path(path).name for path in files.paths[4:]] == ["0.png", "1.png", "link.png"]
    assert files.name == "photos" and files.image_shape == (3, 8, 8)
    assert any("3 files were ignored" in note for note in files.notes)
    assert any("no folders for splits: all of its images" in note for note in files.notes)
    assert files.hashes[6] == files.hashes[0]


def test_a_folder_without_a_model_is_read_as_the_reader_in_memory_does(photos):
    for files, images in (
        (read_images(photos), data.load(photos)),
        (read_images(photos, name="x"), data.load(photos)),
    ):
        assert torch.equal(files.read(slice(None)), images.images)
        assert torch.equal(files.labels, images.labels)
        assert files.class_names == images.class_names
    for path in photos.rglob("*.png"):
        save(path, noise(6, 6, 1))
    assert read_images(photos).image_shape == (1, 6, 6) == data.load(photos).image_shape
    save(photos / "owl" / "2.png", noise(6, 6))
    assert read_images(photos).image_shape == (3, 6, 6)


@pytest.mark.parametrize(
    ("folders", "split", "expected"),
    [
        (["train", "test"], "test", "test"),
        (["train", "test"], "training", "train"),
        (["train", "val"], "test", "val"),
        (["Train", "Validation"], "val", "Validation"),
        (["train", "valid", "test"], "validation", "valid"),
        (["train", "val", "test"], "test", "test"),
        (["training", "testing"], "eval", "testing"),
        (["train", "test", "labels"], "train", "train"),
    ],
)
def test_splits_have_the_synonyms_of_timm(tmp_path, folders, split, expected):
    for number, folder in enumerate(folders):
        for label in ("a", "b"):
            save(tmp_path / folder / label / "0.png", noise(8, 8, seed=number))
    files = read_images(tmp_path, split, preprocess=SMALL)
    assert {Path(path).parent.parent.name for path in files.paths} == {expected}
    assert files.name == tmp_path.name
    assert any(f"the folder '{expected}' is used" in note for note in files.notes)


def test_a_split_that_is_missing_or_has_no_classes_is_refused(tmp_path):
    for label in ("a", "b"):
        save(tmp_path / "one" / "train" / label / "0.png")
        save(tmp_path / "two" / label / "train.png")
        save(tmp_path / "three" / ("train", "test")[label == "b"] / "0.png")
        save(tmp_path / "four" / ("train", "tram")[label == "b"] / "0.png")
    refused("has no test split, only train", tmp_path / "one", preprocess=SMALL)
    refused(r"unknown split 'tset'. Did you mean 'test'", tmp_path / "two", "tset")
    refused("is the folder of a split, but has no sub-folders", tmp_path / "three")
    # A class may be called train.
    assert read_images(tmp_path / "four").class_names == ("train", "tram")


def test_folders_that_hold_no_classes_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    refused(r"empty is empty, but no sub-folders|is empty", tmp_path / "empty")
    save(tmp_path / "flat" / "0.png")
    refused(r"flat holds 1 images, but no sub-folders. .*CSV manifest", tmp_path / "flat")
    save(tmp_path / "half" / "a" / "0.png")
    (tmp_path / "half" / "b" / "deeper").mkdir(parents=True)
    refused(r"half/b has no images", tmp_path / "half")
    save(tmp_path / "one" / "a" / "0.png")
    refused("one class only", tmp_path / "one")
    assert read_images(tmp_path / "one", classes=["x", "a"]).labels.tolist() == [1]
    refused("no such file or folder", tmp_path / "absent")
    refused("neither a folder", save(tmp_path / "a.png"))
    refused("Did you mean 'digits'", "digit")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs here")
def test_fifos_and_links_that_lead_nowhere_are_refused_and_not_opened(photos):
    os.mkfifo(photos / "cat" / "2.png")
    refused("2.png is no regular file", photos)
    (photos / "cat" / "2.png").unlink()
    (photos / "cat" / "3.png").symlink_to(photos / "gone.png")
    refused("3.png is no regular file, or a link that leads nowhere", photos)
    (photos / "cat" / "3.png").unlink()
    os.mkfifo(photos / "m.png")
    (photos.parent / "m.csv").write_text("path,label\nphotos/m.png,cat\n")
    refused("m.png is no regular file", photos.parent / "m.csv")


# Manifests


def test_a_manifest_names_files_and_classes(photos):
    path = photos.parent / "list.csv"
    elsewhere = photos / "owl" / "1.png"
    lines = [
        "\ufeffPath, Label,remark",
        "photos/dog/0.png,dog,x",
        "",
        '"photos/cat/1.png", cat ,"a, b"',
        f"{elsewhere},owl,",
    ]
    path.write_text("\n".join(lines), encoding="utf-8")
    files = read_images(path, preprocess=SMALL)
    assert [Path(one).relative_to(photos).as_posix() for one in files.paths] == [
        "dog/0.png",
        "cat/1.png",
        "owl/1.png",
    ]
    assert files.class_names == ("cat", "dog", "owl") and files.labels.tolist() == [1, 0, 2]
    assert files.name == "list"
    path.write_text("photos/dog/0.png,10\nphotos/cat/1.png,9\n")
    numbered = read_images(path, preprocess=SMALL)
    assert numbered.labels.tolist() == [10, 9] and numbered.num_classes == 11
    path.write_text("photos/dog/0.png,b\nphotos/cat/1.png,A\n")
    assert read_images(path, classes=["a", "b", "c"]).labels.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "names no images"),
        ("path,label\n", "names no images"),
        ("photos/cat/0.png\n", r"line 1: it has 1 columns separated by commas, not 2"),
        ("photos/cat/0.png;cat\n", r"line 1: it has 1 columns"),
        ("path,label\nphotos/cat/0.png,cat,dog\n", r"line 2: it has 3 columns .* not 2"),
        ("photos/cat/0.png,cat,dog\n", "3 columns needs a header"),
        (
            "file,class\nphotos/cat/0.png,cat\n",
            "line 1: there is no file .*header .* is path,label",
        ),
        ("path,label\nphotos/cat/0.png,\n", "line 2: there is no label"),
        ("path,label\nphotos/cat/9.png,cat\n", "line 2: there is no file .*9.png"),
        ("path,label\nphotos/cat,cat\n", "line 2: .*photos/cat is no regular file"),
        ("path,label\n,cat\n", "line 2: .* is no regular file"),
        ("path,label\n../secret.png,cat\n", "line 2: '../secret.png' may lead out of the folder"),
        ("path,label\nphotos/../../x.png,cat\n", "may lead out of the folder"),
        ("path,label\nphotos/cat/0.png,cat\n./photos/cat/0.png,dog\n", "line 3 repeats .* line 2"),
        ("path,label\nphotos/cat/\x1b[31m.png,cat\n", "there is no file"),
        ("path,label\n" + "x" * 5000 + ",cat\n", "there is no file"),
        ("path,label\n" + "x" * 200_000 + ",cat\n", "not a CSV file"),
    ],
)
def test_a_manifest_that_is_wrong_is_refused_with_the_line(photos, text, words):
    path = photos.parent / "list.csv"
    path.write_text(text)
    refused(words, path, preprocess=SMALL)


def test_a_manifest_that_is_no_text_is_refused(photos):
    path = photos.parent / "list.csv"
    path.write_bytes(b"path,label\n\xff\xfe.png,cat\n")
    refused("not a text file in UTF-8", path)
    path.write_bytes(b"path,label\na\x00b.png,cat\n")
    refused("there is no file|not a CSV file", path)
    refused("no such file or folder", photos.parent / "absent.csv")


# Classes


def folder_of(folder, names):
    for name in names:
        save(folder / name / "0.png", noise(8, 8, seed=hash_of(name)))
    return folder


def label_of(files):
    """The label of each class of the data."""
    return {Path(p).parent.name: int(n) for p, n in zip(files.paths, files.labels, strict=True)}


def test_classes_are_matched_by_name_letter_for_letter_first(tmp_path):
    folder = folder_of(tmp_path / "p", ["Owl", "a", "great_white_shark"])
    model = ["A", "owl", "a", "Great white shark", "newt"]
    files = read_images(folder, classes=model)
    assert label_of(files) == {"Owl": 1, "a": 2, "great_white_shark": 3}
    assert files.class_names == tuple(model)
    assert any("matched to those of the model by name" in note for note in files.notes)
    same = read_images(folder, classes=["Owl", "a", "great_white_shark"])
    assert not any("matched" in note for note in same.notes)
    refused("the class 'Owl' of p may be class 0 or 1 of the model", folder, classes=["owl", "OWL"])


def test_other_names_of_a_class_such_as_wordnet_ids_are_matched(tmp_path):
    folder = folder_of(tmp_path / "p", ["n01443537", "n02012849"])
    model = [("crane", "n03126707"), ("goldfish", "n01443537"), ("crane", "n02012849")]
    files = read_images(folder, classes=model)
    assert label_of(files) == {"n01443537": 1, "n02012849": 2}
    assert files.class_names == ("crane (0)", "goldfish", "crane (2)")
    assert any("'n01443537' to class 1, 'goldfish'" in note for note in files.notes)
    bird = folder_of(tmp_path / "q", ["crane", "goldfish"])
    refused("'crane' of q may be class 0 or 2", bird, classes=model)


def test_numbers_are_sorted_by_value_and_are_the_models_class_numbers(tmp_path):
    folder = folder_of(tmp_path / "p", map(str, range(11)))
    alone = read_images(folder)
    assert alone.class_names == tuple(map(str, range(11)))
    assert label_of(alone) == {str(number): number for number in range(11)}
    words = [f"word {number}" for number in range(12)]
    files = read_images(folder, classes=words)
    assert label_of(files) == label_of(alone) and files.class_names == tuple(words)
    assert any("by number" in note for note in files.notes)
    refused(r"class number 10, but the classes of the model are 0\.\.9", folder, classes=words[:10])
    # Where the model's classes are called by numbers, the names count.
    shifted = folder_of(tmp_path / "q", ["1", "2"])
    assert label_of(read_images(shifted, classes=["1", "2", "3"])) == {"1": 0, "2": 1}


def test_classes_that_match_nothing_are_listed(tmp_path):
    folder = folder_of(tmp_path / "p", ["a", "u", "v", "w", "x"])
    text = refused("4 of the 5 classes of p are no classes", folder, classes=["a", "b"])
    assert "'u', 'v', 'w', ..." in text and "'x'" not in text and "--label-map" in text
    refused("2 of the 2", folder_of(tmp_path / "q", ["1", "x"]), classes=["a", "b"])


def test_a_label_map_says_the_models_class_by_name_or_number(tmp_path):
    folder = folder_of(tmp_path / "p", ["chat", "chien", "Owl"])
    model = ["dog", "cat", "owl"]
    for name, text in {
        "a.csv": "chat,cat\n\nchien,0\nunused,1\n",
        "a.json": json.dumps({"chat": 1, "chien": "DOG", "unused": 2}),
    }.items():
        path = tmp_path / name
        path.write_text(text)
        files = read_images(folder, classes=model, label_map=path)
        assert label_of(files) == {"chat": 1, "chien": 0, "Owl": 2}
        assert any("by the label map" in note for note in files.notes)
    path.write_text('{"chat": 1, "chien": 0, "Owl": 0}')
    assert label_of(read_images(folder, label_map=path)) == {"chat": 1, "chien": 0, "Owl": 0}


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.csv", "", "maps no classes"),
        ("a.csv", "chat\n", "line 1: it needs two columns"),
        ("a.csv", "chat,\n", "line 1: it needs two columns"),
        ("a.csv", "chat,cat\nchat,dog\n", "maps the class 'chat' twice"),
        ("a.csv", "chat,kat\nchien,dog\n", "says 'kat', which is no class of the model"),
        ("a.csv", "chat,7\nchien,dog\n", "class number 7"),
        ("a.json", '{"chat": 1, "chat": 0}', "twice"),
        ("a.json", '{"chat": -1, "chien": 0}', "class number -1"),
        ("a.json", '{"chat": true}', "names or numbers"),
        ("a.json", '{"chat": {"a": 1}}', "names or numbers"),
        ("a.json", '["chat"]', "names or numbers"),
        ("a.json", "3", "names or numbers"),
        ("a.json", "{", "not JSON"),
        ("a.json", "[" * 100_000, "not JSON"),
        ("a.csv", "\x1b[31m,\x1b[2J\nchat,cat\nchien,\x1b[2J", "no class of the model"),
    ],
)
def test_a_label_map_that_is_wrong_is_refused(tmp_path, name, text, words):
    folder = folder_of(tmp_path / "p", ["chat", "chien"])
    (tmp_path / name).write_text(text)
    refused(words, folder, classes=["dog", "cat"], label_map=tmp_path / name)
    refused("there is no label map", folder, label_map=tmp_path / "absent.csv")


# Data in memory


def test_digits_are_resized_and_repeated_on_demand_and_a_note_says_so():
    digits = data.load("digits", "test")
    images = read_images("digits", preprocess=Preprocess((20, 20), 24, "bicubic"))
    assert isinstance(images, ResizedImages) and images.image_shape == (3, 20, 20)
    assert len(images) == 359 and images.class_names == digits.class_names
    said = "are 28x28 grey; they are resized (bicubic) with 24 pixels of the shorter side, then "
    assert said + "cropped to 20x20 and repeated to three channels" in images.notes[0]
    expected = torchvision_pixels(
        Image.fromarray(digits.images[5, 0].numpy()).convert("RGB"), images.preprocess
    )
    assert torch.equal(images.read(torch.tensor([5]))[0], expected)
    part = images.subset([4, 5])
    assert torch.equal(part.read(slice(1, 2))[0], expected)
    assert part.fingerprint != images.fingerprint
    assert part.fingerprint != dataclasses.replace(part, preprocess=SMALL).fingerprint
    assert in_memory(part).hashes != part.hashes == digits.hashes[4:6]
    same = read_images("digits", preprocess=Preprocess((28, 28), 32, channels=1))
    assert same.fingerprint == digits.fingerprint and same.notes == ()
    assert len(read_images("digits", "train")) == 1438


def test_an_npz_archive_is_read_whole_where_it_has_no_split_and_fits_the_model(tmp_path):
    path = tmp_path / "own.npz"
    names = np.array(["owl", "cat", "unused"])
    np.savez(
        path,
        images=noise(4, 8, 3)[:, :, None].repeat(8, 2),
        labels=np.array([0, 1, 1, 0]),
        class_names=names,
    )
    images = read_images(path, "val", classes=["cat", "OWL"], name="mine")
    assert images.labels.tolist() == [1, 0, 0, 1] and images.class_names == ("cat", "OWL")
    assert images.name == "mine"
    assert "has no val split: all of its images are used" in images.notes[0]
    assert "by name" in images.notes[1]
    refused("are coloured, but the model takes grey", path, preprocess=Preprocess(channels=1))
    refused("are no classes of the model", path, classes=["a", "b"])


def test_a_model_of_grey_images_gets_luminance_and_a_note(photos):
    files = read_images(photos, preprocess=Preprocess((8, 8), channels=1))
    assert files.image_shape == (1, 8, 8)
    assert any("converted by their luminance" in note for note in files.notes)
    with Image.open(files.paths[0]) as image:
        expected = torchvision_pixels(image.convert("L"), files.preprocess)
    assert torch.equal(files.read(slice(0, 1))[0], expected)


# Splits by content


def image_set(values):
    pixels = torch.tensor(values, dtype=torch.uint8).view(-1, 1, 1, 1)
    return ImageSet(pixels, torch.arange(len(values)) % 2, ("a", "b"))


@given(
    values=st.lists(st.integers(0, 255), min_size=60, max_size=90),
    more=st.lists(st.integers(0, 255), max_size=30),
    seed=st.integers(0, 9),
)
def test_a_split_by_content_is_stable_and_keeps_copies_together(values, more, seed):
    fractions = (0.5, 0.25, 0.25)
    try:
        before = data.split_by_hash(image_set(values), fractions, seed)
        after = data.split_by_hash(image_set(more + values[::-1]), fractions, seed)
    except DemurError as error:
        assert "has no image" in str(error)
        return
    contents = [set(part.hashes) for part in before]
    assert sum(map(len, before)) == len(values)
    assert not (contents[0] & contents[1] or contents[0] & contents[2] or contents[1] & contents[2])
    for part, grown in zip(before, after, strict=True):
        assert set(part.hashes) <= set(grown.hashes)


def test_a_split_has_the_fractions_and_another_seed_gives_another_one():
    images = data.load("digits")
    parts = data.split_by_hash(images, (0.7, 0.2, 0.1), seed=1)
    for part, fraction in zip(parts, (0.7, 0.2, 0.1), strict=True):
        assert abs(len(part) / len(images) - fraction) < 0.05
    assert data.split_by_hash(images, (0.7, 0.2, 0.1), seed=2)[0].hashes != parts[0].hashes
    for bad in ((), (0.5, 0.6), (1.5, -0.5), (0.0, 1.0), (float("nan"), 0.5)):
        with pytest.raises(DemurError, match="sum to 1"):
            data.split_by_hash(images, bad)
    with pytest.raises(DemurError, match=r"part 2 of the split of digits, 1e-06 of 1438"):
        data.split_by_hash(images, (1 - 1e-6, 1e-6))


def test_images_that_made_the_model_are_left_out_whatever_they_are_called(tmp_path):
    """R17."""
    files = some_files(tmp_path)
    copied = tmp_path / "copy.png"
    copied.write_bytes(Path(files.paths[2]).read_bytes())
    paths = (*files.paths, str(copied))
    grown = dataclasses.replace(
        files, paths=paths, labels=torch.cat([files.labels, torch.tensor([2])])
    )
    rest, left_out = data.without(grown, files.hashes[:5])
    assert left_out == 6 and rest.paths == files.paths[5:]
    assert data.without(rest, files.hashes[:5]) == (rest, 0)
    with pytest.raises(DemurError, match=r"all 13 images of some were used .* no image remains"):
        data.without(grown, set(files.hashes))


# The engine


def linear(shape):
    torch.manual_seed(0)
    layer = torch.nn.Linear(shape[0] * shape[1] * shape[2], 3)
    return Classifier(torch.nn.Sequential(torch.nn.Flatten(), layer), 3)


def small_model():
    return linear((3, 8, 8))


MODEL = Load(small_model, "small")
HERE = Environment("cpu", "float32", 1, "AVX2")


def test_a_shard_holds_64_mib_and_at_most_1000_images():
    def size_of(shape):
        images = ImageSet(torch.zeros(1, *shape, dtype=torch.uint8), torch.tensor([0]), ("a", "b"))
        return Evaluate(MODEL, images, None).shard_size

    assert size_of((1, 28, 28)) == size_of((3, 32, 32)) == size_of((3, 64, 64)) == 1000
    assert size_of((3, 224, 224)) == 111
    assert size_of((3, 4000, 4000)) == 1


class Reading(ImageFiles):
    """Notes which rows are read."""

    def read(self, rows):
        vars(self).setdefault("seen", []).append(rows)
        return super().read(rows)


def test_records_of_files_are_those_of_the_same_images_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(on_images, "SHARD", 5)
    files = some_files(tmp_path / "files")
    watched = Reading(files.paths, files.labels, files.class_names, files.name, files.preprocess)
    mask = (torch.rand(12, 1, 8, 8, generator=torch.Generator().manual_seed(0)) > 0.3).float()
    eps = torch.linspace(0.0, 0.2, 12)
    threats = [ThreatModel("linf", 0.1), ThreatModel("linf", eps, mask=mask)]
    found = []
    for number, images in enumerate((watched, in_memory(files))):
        nodes = [Evaluate(MODEL, images, threat, PGD(steps=2), keep="stored") for threat in threats]
        outputs = plans.run(tmp_path / str(number), [*nodes, Evaluate(MODEL, images, None)])
        found.append(outputs.records())
    own = ["seconds", "image", "node", "code"]
    assert_frame_equal(found[0].drop(own), found[1].drop(own))
    assert tuple(found[0]["image"][:12]) == files.hashes
    assert found[0].height == 36
    assert {str(rows) for rows in watched.seen} == {
        str(slice(first, min(first + 5, 12))) for first in (0, 5, 10)
    }


def test_the_gallery_reads_only_what_it_shows(tmp_path, monkeypatch):
    files = some_files(tmp_path / "files")
    node = Evaluate(MODEL, files, ThreatModel("linf", 0.3), PGD(steps=2), keep="stored")
    outputs = plans.run(tmp_path / "store", [node])
    read = []
    one = ImageFiles._pixels
    monkeypatch.setattr(ImageFiles, "_pixels", lambda self, row: read.append(row) or one(self, row))
    pictures, before, _ = gallery(outputs, [node], 4)
    assert len(pictures) == len(before) == len(read) == 4
    assert {picture.label for picture in pictures} <= set(files.class_names)


def test_keys_of_streamed_images_follow_pixels_geometry_and_pillow(tmp_path, monkeypatch):
    files = some_files(tmp_path)
    resized = ResizedImages(in_memory(files), Preprocess((8, 8)))
    larger = dataclasses.replace(files, preprocess=dataclasses.replace(SMALL, resize=12))
    nodes = [Evaluate(MODEL, one, None) for one in (files, larger, in_memory(files), resized)]
    before = [Keys(HERE).of(node) for node in nodes]
    assert len(set(before)) == 4
    installed = keys.version
    monkeypatch.setattr(keys, "version", lambda name: "0" if name == "pillow" else installed(name))
    after = [Keys(HERE).of(node) for node in nodes]
    # Pixels in memory do not depend on Pillow.
    assert [old == new for old, new in zip(before, after, strict=True)] == [
        False,
        False,
        True,
        False,
    ]


MEMORY = """
import re, sys
from pathlib import Path
import torch
import plans
from demur import Classifier
from demur.classifier import Preprocess
from demur.data import in_memory, read_images
from demur.evaluation import on_images
from demur.evaluation.nodes import Load
from demur.evaluation.on_images import Evaluate

torch.set_num_threads(1)
on_images.SHARD = 100

def linear():
    layer = torch.nn.Linear(3 * 224 * 224, 2)
    return Classifier(torch.nn.Sequential(torch.nn.Flatten(), layer), 2)

folder, count, place, store = sys.argv[1:]
images = read_images(folder, preprocess=Preprocess((224, 224))).sample(int(count), seed=0)
if place == "memory":
    images = in_memory(images)
records = plans.run(Path(store), [Evaluate(Load(linear, "a"), images, None)]).records()
assert records["image"].n_unique() == int(count)
# Not ru_maxrss: a child inherits the peak of the process that started it.
print(int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak memory from /proc")
def test_memory_does_not_grow_with_the_number_of_files(tmp_path):
    """Both runs fill whole shards. Negative control: the same images in memory take 430 MB."""
    for number in range(3000):
        path = tmp_path / "photos" / "ab"[number % 2] / f"{number}.png"
        save(path, noise(24, 24, seed=number))

    def peak(count, place):
        store = tmp_path / f"{place}-{count}"
        done = subprocess.run(
            [sys.executable, "-c", MEMORY, tmp_path / "photos", str(count), place, store],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)},
        )
        assert done.returncode == 0, done.stderr
        return float(done.stdout)

    few, many, all_of = peak(300, "files"), peak(3000, "files"), peak(3000, "memory")
    assert many - few < 60, (few, many)
    assert all_of - many > 200, (many, all_of)


# The document


def test_the_examples_of_the_document_run_as_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).parents[1] / "docs" / "data.md").read_text(encoding="utf-8")
    names = {}
    for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(code, names)
    assert names["images"].labels.tolist() == [1, 0]
    assert names["part"].image_shape == (3, 64, 64) and len(names["part"]) == 100


# Real photographs


@pytest.mark.real_data
def test_photographs_of_a_manifest_with_wordnet_ids_are_those_of_torchvision(data_root, tmp_path):
    from demur.networks import imagenet

    folder = data_root / "imagenet" / "photos"
    about = json.loads(folder.with_suffix(".json").read_text())
    lines = [f"{folder / name},{entry['wnid']}" for name, entry in about.items()]
    path = tmp_path / "photos.csv"
    path.write_text("path,label\n" + "\n".join(lines))
    wnids = Path(imagenet.__file__).with_name("imagenet_wnids.txt").read_text().split()
    classes = list(zip(imagenet.CLASSES, wnids, strict=True))
    preprocess = Preprocess((224, 224), 256)
    files = read_images(path, preprocess=preprocess, classes=classes)
    assert files.labels.tolist() == [entry["class_index"] for entry in about.values()]
    assert files.num_classes == 1000 and files.image_shape == (3, 224, 224)
    found = files.read(slice(None))
    for row, file in enumerate(files.paths):
        with Image.open(file) as image:
            upright = ImageOps.exif_transpose(image).convert("RGB")
        assert torch.equal(found[row], torchvision_pixels(upright, preprocess)), file
