"""Background classes: their selection, and synthetic background images."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.ndimage import label as connected_parts

from demur.data import (
    ImageSet,
    confusing_classes,
    load,
    morph,
    patch_shuffle,
    photo_crops,
    photo_patches,
    synthetic_backgrounds,
    with_background,
)
from demur.data.morphing import _pairs
from demur.errors import DemurError


@pytest.fixture(scope="module")
def digits():
    return load("digits").sample(400, seed=0)


def labelled(counts, names):
    """Images of 1x2 pixels whose first pixel is their label."""
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    images = torch.stack([labels, torch.arange(len(labels)) % 256], dim=1).byte().view(-1, 1, 1, 2)
    return ImageSet(images, labels, tuple(names))


def test_with_background_puts_the_keys_first_and_the_background_last():
    images = with_background(labelled([5, 6, 7, 8, 9], "01xyz"), ["1", "0"], ["z", "x"])
    assert images.class_names == ("1", "0", "background")
    assert images.counts().tolist() == [6, 5, 16]
    kinds = images.images[:, 0, 0, 0]
    assert set(kinds[images.labels == 2].tolist()) == {2, 4}
    assert set(kinds[images.labels == 0].tolist()) == {1}


@pytest.mark.parametrize(
    ("keys", "background", "name", "words"),
    [
        (["0", "q"], ["x"], "background", "unknown class 'q'"),
        (["0", "1"], ["1"], "background", "twice"),
        (["0", "1"], [], "background", "at least one class"),
        (["0", "x"], ["z"], "x", "cannot be called 'x'"),
    ],
)
def test_with_background_refuses_inconsistent_classes(keys, background, name, words):
    with pytest.raises(DemurError, match=words):
        with_background(labelled([5, 6, 7, 8, 9], "01xyz"), keys, background, name)


class Oracle:
    """Predicts every label, but 1 for a quarter of x, 0 for a tenth of y, and y for some x."""

    def __init__(self):
        self.calls = []

    def __call__(self, train, test, *, repeat, fold, seed):
        self.calls.append((repeat, fold, seed))
        assert train.class_names == test.class_names == tuple("01xyzw")
        rows = [set(map(tuple, part.images.flatten(1).tolist())) for part in (train, test)]
        assert rows[0].isdisjoint(rows[1])
        predicted = test.labels.clone()
        x = (test.labels == 2).nonzero().flatten()
        predicted[x[: len(x) // 4]] = 1
        predicted[x[len(x) // 4 : len(x) // 2]] = 3
        y = (test.labels == 3).nonzero().flatten()
        predicted[y[: len(y) // 10]] = 0
        return predicted


def selection(oracle, **changes):
    images = labelled([40, 40, 40, 40, 40, 40], "01xyzw")
    return confusing_classes(
        images,
        ["0", "1"],
        ["x", "y", "z"],
        oracle,
        **{"folds": 2, "repeats": 3, "seed": 7} | changes,
    )


def test_confusing_classes_are_those_predicted_as_a_key_class():
    oracle = Oracle()
    chosen = selection(oracle)
    assert chosen.kept == ("z",)
    assert chosen.dropped == ("y", "x")
    assert chosen.at(0.9) == ("z", "y")
    assert chosen.images == 200  # w is neither key nor candidate
    assert [(row.name, row.images, row.rate) for row in chosen.table] == [
        ("z", 40, 1.0),
        ("y", 40, 0.9),
        ("x", 40, 0.75),
    ]
    assert [(row.confused_with, row.confused_rate) for row in chosen.table] == [
        (None, 0.0),
        ("0", 0.1),
        ("1", 0.25),
    ]
    assert [call[:2] for call in oracle.calls] == [(r, k) for r in range(3) for k in range(2)]
    assert len({seed for _, _, seed in oracle.calls}) == 6


def test_selection_repeats_by_seed():
    first = Oracle()
    again = Oracle()
    other = Oracle()
    assert selection(first) == selection(again)
    selection(other, seed=8)
    assert first.calls == again.calls != other.calls


def test_selection_refuses_rare_classes_and_bad_predictions():
    with pytest.raises(DemurError, match=r"'0'.*has 40 images: too few for 41 folds"):
        selection(Oracle(), folds=41)
    with pytest.raises(DemurError, match=r"labels must lie in 0..5"):
        selection(lambda train, test, **_: torch.full((len(test),), 6))
    with pytest.raises(DemurError, match="one for each image"):
        selection(lambda train, test, **_: torch.zeros(3, dtype=torch.int64))
    with pytest.raises(DemurError, match="twice"):
        confusing_classes(labelled([9, 9], "01"), ["0"], ["0"], Oracle())


@given(parts=st.sampled_from([2, 4]), count=st.integers(1, 4), seed=st.integers(0, 2**40))
def test_shuffled_patches_come_from_the_images_and_change_their_places(parts, count, seed):
    # Every pixel has its own value, so the patches can be recognised.
    side = 8 // parts
    pixels = torch.arange(count * 64, dtype=torch.uint8).view(count, 1, 8, 8)
    pieces = {
        tuple(
            pixels[i, 0, r * side : (r + 1) * side, c * side : (c + 1) * side].flatten().tolist()
        ): (i, r, c)
        for i in range(count)
        for r in range(parts)
        for c in range(parts)
    }
    result = patch_shuffle(pixels, 20, parts, seed)
    assert result.shape == (20, 1, 8, 8) and result.dtype == torch.uint8
    for image in result:
        places = {}
        for r in range(parts):
            for c in range(parts):
                piece = (
                    image[0, r * side : (r + 1) * side, c * side : (c + 1) * side]
                    .flatten()
                    .tolist()
                )
                _, *origin = pieces[tuple(piece)]
                places[r, c] = tuple(origin)
        assert set(places) == set(places.values())  # the patch of each place is used once
        assert all(place != origin for place, origin in places.items())
    assert torch.equal(result, patch_shuffle(pixels, 20, parts, seed))


def test_patch_shuffle_takes_from_one_image_and_from_several(digits):
    flat = torch.arange(9, dtype=torch.uint8).view(9, 1, 1, 1).expand(9, 3, 4, 4)
    sources = [len(image.unique()) for image in patch_shuffle(flat, 400, seed=1)]
    assert 150 < sources.count(1) < 280
    assert max(sources) == 4
    assert not torch.equal(
        patch_shuffle(digits.images, 9, seed=1), patch_shuffle(digits.images, 9, seed=2)
    )


@pytest.mark.parametrize("parts", [1, 3, 0])
def test_patch_shuffle_needs_patches_that_fit(digits, parts):
    with pytest.raises(DemurError, match="28x28 cannot be cut"):
        patch_shuffle(digits.images, 5, parts)
    with pytest.raises(DemurError, match="uint8"):
        patch_shuffle(digits.to_float(), 5)
    with pytest.raises(DemurError, match="at least 1"):
        patch_shuffle(digits.images, 0)


def test_morphs_start_and_end_at_the_two_images(digits):
    pairs = torch.tensor([[i, i + 200] for i in range(50)])
    for fraction, column in ((0.0, 0), (1.0, 1)):
        ends = morph(digits, 50, fraction, pairs=pairs).int()
        assert (
            ends - digits.images[pairs[:, column]].int()
        ).abs().max() <= 9  # half of 255 / 16, rounded


@pytest.mark.slow
def test_morphs_move_from_one_to_the_other(digits):
    pairs = torch.tensor([[i, i + 200] for i in range(100)])
    first = digits.images[pairs[:, 0]].float()
    second = digits.images[pairs[:, 1]].float()
    way = [
        morph(digits, 100, fraction, pairs=pairs).float()
        for fraction in (0, 0.15, 0.3, 0.5, 0.7, 0.85, 1)
    ]
    from_first = [float((image - first).square().mean()) for image in way]
    from_second = [float((image - second).square().mean()) for image in way]
    assert from_first == sorted(from_first)
    assert from_second == sorted(from_second, reverse=True)
    fade = (first + second) / 2
    assert (
        float((way[3] - fade).abs().mean()) > 5
    )  # a moved shape, not one image shining through the other
    assert ((way[3] > 127).flatten(1).sum(1) > 40).all()  # and nothing has vanished


def test_a_stroke_moves_across_the_gap():
    images = torch.zeros(2, 1, 16, 16, dtype=torch.uint8)
    images[0, 0, 2:14, 2:5] = 255
    images[1, 0, 2:14, 11:14] = 255
    between = morph(
        ImageSet(images, torch.tensor([0, 1]), ("left", "right")),
        1,
        1 / 3,
        pairs=torch.tensor([[0, 1]]),
    )[0, 0]
    assert connected_parts(between.numpy() > 127)[1] == 1
    assert (between > 127).nonzero()[:, 1].float().mean() == pytest.approx(3 + 9 / 3, abs=0.6)


def test_morphs_pair_different_classes_by_seed(digits):
    images = labelled([3, 1, 200], "abc")
    pairs = _pairs(images.labels, 2000, 0)
    assert (images.labels[pairs[:, 0]] != images.labels[pairs[:, 1]]).all()
    assert set(pairs.flatten().tolist()) == set(range(204))
    assert torch.equal(morph(digits, 70, 0.5, seed=3), morph(digits, 70, 0.5, seed=3))
    assert not torch.equal(morph(digits, 70, 0.5, seed=3), morph(digits, 70, 0.5, seed=4))


def test_morphs_of_colour_and_of_plain_images():
    draw = torch.Generator().manual_seed(0)
    images = torch.randint(256, (4, 3, 8, 8), dtype=torch.uint8, generator=draw)
    images[1] = 77
    images[3] = 200
    colour = ImageSet(images, torch.tensor([0, 1, 0, 1]), ("a", "b"))
    pairs = torch.tensor([[0, 1], [2, 3], [1, 3]])
    assert (morph(colour, 3, 0.0, pairs=pairs).int() - images[[0, 2, 1]].int()).abs().max() <= 9
    assert (morph(colour, 3, 1.0, pairs=pairs).int() - images[[1, 3, 3]].int()).abs().max() <= 9
    assert morph(colour, 3, 0.5, pairs=pairs).shape == (3, 3, 8, 8)


def test_morphs_refuse_bad_fractions_pairs_and_classes(digits):
    with pytest.raises(DemurError, match="fraction"):
        morph(digits, 3, 1.1)
    with pytest.raises(DemurError, match=r"\(3, 2\)"):
        morph(digits, 3, 0.5, pairs=torch.tensor([[0, 1]]))
    with pytest.raises(DemurError, match="different classes"):
        morph(digits.subset((digits.labels == 3).nonzero().flatten()), 3, 0.5)


@pytest.mark.parametrize("channels", [1, 3])
def test_photo_patches_are_varied_and_repeat_by_seed(channels):
    patches = photo_patches(40, 28, channels, seed=1)
    assert patches.shape == (40, channels, 28, 28) and patches.dtype == torch.uint8
    assert len({tuple(patch.flatten().tolist()) for patch in patches}) == 40
    assert patches.float().flatten(1).std(dim=1).median() > 10
    assert torch.equal(patches, photo_patches(40, 28, channels, seed=1))
    assert not torch.equal(patches, photo_patches(40, 28, channels, seed=2))


def test_photo_crops_have_the_shape():
    grey = torch.randint(
        256, (5, 1, 10, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    assert photo_crops(grey, 7, (3, 20, 30), seed=0).shape == (
        7,
        3,
        20,
        30,
    )  # enlarged, and grey made colour
    grey_of_grey = photo_crops(
        [torch.full((3, 50, 60), 90, dtype=torch.uint8)], 2, (1, 28, 28), seed=0
    )
    assert (grey_of_grey.int() - 90).abs().max() <= 1
    for photos, shape in [([], (1, 8, 8)), ([torch.zeros(3, 9, 9)], (1, 8, 8)), (grey, (2, 8, 8))]:
        with pytest.raises(DemurError):
            photo_crops(photos, 2, shape)


def test_synthetic_backgrounds_add_five_classes(digits):
    images = synthetic_backgrounds(digits, 30, seed=2)
    made = ("patch shuffle", "morph 30 %", "morph 50 %", "morph 70 %", "photo crops")
    assert images.class_names == (*digits.class_names, *made)
    assert images.counts().tolist() == [*digits.counts().tolist(), *[30] * 5]
    assert torch.equal(images.images[: len(digits)], digits.images)
    assert images.fingerprint == synthetic_backgrounds(digits, 30, seed=2).fingerprint
    assert images.fingerprint != synthetic_backgrounds(digits, 30, seed=3).fingerprint
    assert with_background(images, digits.class_names, made).num_classes == 11
