"""Image sets: their parts, draws, splits and classes."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from demur.data import ImageSet, to_float
from demur.errors import DemurError

NAMES = ("a", "b", "c", "d")


def image_set(counts, seed=0, size=3):
    """Random images with these counts of the classes, in random order."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    labels = labels[torch.randperm(len(labels), generator=draw)]
    images = torch.randint(256, (len(labels), 1, size, size), dtype=torch.uint8, generator=draw)
    return ImageSet(images, labels, tuple(f"class {i}" for i in range(len(counts))), "some images")


def numbered(n, classes=4):
    """Distinct images: image i has the digits of i in base 256 as pixels, and the label i % K."""
    pixels = torch.tensor([[i // 256, i % 256] for i in range(n)], dtype=torch.uint8).view(
        n, 1, 1, 2
    )
    return ImageSet(pixels, torch.arange(n) % classes, NAMES[:classes])


def numbers(images):
    pixels = images.images.flatten(1).long()
    return (pixels[:, 0] * 256 + pixels[:, 1]).tolist()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"images": torch.zeros(4, 1, 2, 2)}, "uint8"),
        ({"images": torch.zeros(4, 2, 2, dtype=torch.uint8)}, "N, C, H, W"),
        (
            {
                "images": torch.zeros(0, 1, 2, 2, dtype=torch.uint8),
                "labels": torch.zeros(0, dtype=torch.int64),
            },
            "no images",
        ),
        ({"images": torch.zeros(4, 0, 2, 2, dtype=torch.uint8)}, "no images"),
        ({"labels": torch.tensor([0, 1, 0])}, "one for each image"),
        ({"labels": torch.tensor([0, 1, 0, 2])}, "0..1"),
        ({"labels": torch.tensor([0, 1, 0, -1])}, "0..1"),
        ({"labels": torch.tensor([0.0, 1.0, 0.0, 1.0])}, "int64"),
        ({"labels": torch.tensor([0, 1, 0, 1], dtype=torch.uint8)}, "int64"),
        ({"class_names": ("a",)}, "at least 2 classes"),
        ({"class_names": ("a", "a")}, "'a' stands for two"),
    ],
)
def test_parts_that_do_not_fit_are_refused(change, words):
    parts = {
        "images": torch.zeros(4, 1, 2, 2, dtype=torch.uint8),
        "labels": torch.tensor([0, 1, 0, 1]),
        "class_names": ("a", "b"),
    }
    ImageSet(**parts)
    with pytest.raises(DemurError, match=words) as caught:
        ImageSet(**parts | change)
    assert "\n" not in str(caught.value)


def test_to_float_divides_by_255_and_passes_float_images():
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    floats = to_float(images)
    assert floats.dtype == torch.float32
    assert floats.max() == 1 and floats.min() == 0
    assert torch.equal((floats * 255).round().byte(), images)
    assert to_float(floats) is floats
    for bad in (floats * 2, images.long(), floats / 0):
        with pytest.raises(DemurError):
            to_float(bad)


def test_the_repr_is_one_line():
    images = ImageSet(
        torch.zeros(1200, 1, 2, 3, dtype=torch.uint8),
        torch.zeros(1200, dtype=torch.int64),
        ("a", "b"),
        "own",
    )
    assert repr(images) == "ImageSet('own': 1,200 images of 1x2x3, 2 classes)"


def test_to_float_of_some_images():
    images = numbered(10)
    assert images.to_float().shape == (10, 1, 1, 2)
    assert torch.equal(images.to_float(torch.tensor([3, 1])), images.to_float()[[3, 1]])


def test_fingerprint_depends_on_content_only():
    images = image_set([3, 4])
    same = ImageSet(
        images.images.clone(), images.labels.clone(), images.class_names, "another name"
    )
    assert same.fingerprint == images.fingerprint == images.fingerprint
    pixel = images.images.clone()
    pixel[0, 0, 0, 0] += 1
    others = [
        ImageSet(pixel, images.labels, images.class_names),
        ImageSet(images.images, images.labels.flip(0), images.class_names),
        ImageSet(images.images, images.labels, ("x", "y")),
        ImageSet(images.images.view(7, 1, 1, 9), images.labels, images.class_names),
    ]
    assert len({images.fingerprint, *(other.fingerprint for other in others)}) == 5


def test_subset_keeps_order_and_classes():
    part = numbered(20).subset([7, 3, 3])
    assert numbers(part) == [7, 3, 3]
    assert part.class_names == NAMES
    assert part.counts().tolist() == [0, 0, 0, 3]
    for bad in ([], [20], [-1], [0.5], [True, False]):
        with pytest.raises(DemurError):
            numbered(20).subset(bad)


@given(
    counts=st.lists(st.integers(1, 40), min_size=2, max_size=6),
    fraction=st.floats(0.05, 0.95),
    seed=st.integers(0, 2**40),
)
def test_split_is_a_stratified_partition(counts, fraction, seed):
    images = image_set(counts)
    held_out = round(fraction * len(images))
    if not 0 < held_out < len(images):
        return
    rest, test = images.split(fraction, seed)
    assert len(test) == held_out
    assert torch.equal(rest.counts() + test.counts(), images.counts())
    exact = images.counts() * held_out / len(images)
    assert ((test.counts() - exact).abs() < 1).all()
    rows = [tuple(row) for part in (rest, test) for row in part.images.flatten(1).tolist()]
    assert sorted(rows) == sorted(map(tuple, images.images.flatten(1).tolist()))


def test_split_by_seed_in_the_order_of_the_set():
    images = numbered(400)
    rest, test = images.split(0.1, seed=3)
    assert numbers(test) == sorted(numbers(test)) and numbers(rest) == sorted(numbers(rest))
    assert set(numbers(test)).isdisjoint(numbers(rest))
    assert numbers(images.split(0.1, seed=3)[1]) == numbers(test)
    assert numbers(images.split(0.1, seed=4)[1]) != numbers(test)
    labels = [number % 4 for number in numbers(test)]
    assert labels == test.labels.tolist()


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 1.5, 0.001, 0.999, float("nan")])
def test_split_needs_two_sides(fraction):
    with pytest.raises(DemurError, match="both sides"):
        numbered(20).split(fraction, seed=0)


def test_sample_keeps_proportions():
    images = image_set([600, 300, 90, 10])
    part = images.sample(100, seed=1)
    assert part.counts().tolist() == [60, 30, 9, 1]
    assert images.sample(100, seed=1).fingerprint == part.fingerprint
    assert images.sample(100, seed=2).fingerprint != part.fingerprint
    assert images.sample(1000, seed=0) is images
    assert len(images.sample(3, seed=0)) == 3
    with pytest.raises(DemurError):
        images.sample(0, seed=0)


def test_balanced_draws_the_same_number_or_names_the_rarest_class():
    images = image_set([30, 8, 12])
    part = images.balanced(8, seed=5)
    assert part.counts().tolist() == [8, 8, 8]
    assert images.balanced(8, seed=5).fingerprint == part.fingerprint
    with pytest.raises(DemurError, match="'class 1', has 8"):
        images.balanced(9, seed=5)


def test_folds_cover_each_image_once_and_evenly():
    images = image_set([20, 41, 10])
    folds = images.folds(10, seed=0)
    assert len(folds) == 10
    for train, test in folds:
        assert sorted([*train.tolist(), *test.tolist()]) == list(range(len(images)))
        assert (images.subset(test).counts() - images.counts() / 10).abs().max() < 1
    assert sorted(index for _, test in folds for index in test.tolist()) == list(range(len(images)))
    again = images.folds(10, seed=0)
    other = images.folds(10, seed=1)
    assert all(torch.equal(a[1], b[1]) for a, b in zip(folds, again))
    assert not all(torch.equal(a[1], b[1]) for a, b in zip(folds, other))


def test_folds_need_as_many_images_of_each_class():
    with pytest.raises(DemurError, match="'class 2', which has 9"):
        image_set([20, 41, 9]).folds(10, seed=0)
    with pytest.raises(DemurError):
        image_set([20, 41]).folds(1, seed=0)


def test_select_classes_relabels_in_the_given_order():
    images = numbered(40)
    part = images.select_classes(["c", 0])
    assert part.class_names == ("c", "a")
    assert {number % 4 for number in numbers(part)} == {0, 2}
    assert part.labels.tolist() == [0 if number % 4 == 2 else 1 for number in numbers(part)]


@pytest.mark.parametrize(
    ("classes", "words"),
    [(["a", "bb"], "'bb'.*'b'"), (["a", 4], "no class 4"), (["a", 0], "twice")],
)
def test_select_classes_refuses_unknown_and_repeated_classes(classes, words):
    with pytest.raises(DemurError, match=words):
        numbered(40).select_classes(classes)


def test_merge_classes_makes_one_class_of_several():
    images = numbered(40)
    part = images.merge_classes({"vowel": ["a"], "consonant": ["d", "b"]})
    assert part.class_names == ("vowel", "consonant")
    assert part.counts().tolist() == [10, 20]
    assert part.labels.tolist() == [int(number % 4 > 0) for number in numbers(part)]
    with pytest.raises(DemurError, match="'b' is named twice"):
        images.merge_classes({"x": ["a", "b"], "y": ["b"]})


def test_indices_may_come_from_numpy():
    assert numbers(numbered(10).subset(np.array([2, 5]))) == [2, 5]
