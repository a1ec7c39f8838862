"""Photographs and the boxes of their objects: read from files, and resized together."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from demur import DemurError, data, masks
from demur.data import Photo


def photo(height, width, boxes=()):
    return Photo(
        torch.randint(0, 256, (3, height, width), dtype=torch.uint8), "some.png", tuple(boxes)
    )


def colours(height=30, width=40):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_photographs_of_any_mode_become_8_bit_rgb_with_a_description(tmp_path):
    pixels = colours()
    Image.fromarray(pixels).save(tmp_path / "plain.png")
    plain = data.read_photo(tmp_path / "plain.png")
    assert (
        plain.pixels.shape == (3, 30, 40)
        and plain.pixels.dtype == torch.uint8
        and plain.converted == ""
        and plain.size == (30, 40)
    )
    assert torch.equal(plain.pixels, torch.from_numpy(pixels).permute(2, 0, 1))
    grey = pixels[..., 0]
    for mode, image, said in (
        ("grey", Image.fromarray(grey), "grey"),
        ("deep", Image.fromarray(grey.astype(np.uint16) * 257), "16 bits"),
    ):
        image.save(tmp_path / f"{mode}.png")
        read = data.read_photo(tmp_path / f"{mode}.png")
        assert said in read.converted and all(
            torch.equal(channel, torch.from_numpy(grey)) for channel in read.pixels
        )
    clear = np.dstack([pixels, np.zeros_like(grey)])
    Image.fromarray(clear, "RGBA").save(tmp_path / "clear.png")
    assert bool((data.read_photo(tmp_path / "clear.png").pixels == 255).all())
    assert "white" in data.read_photo(tmp_path / "clear.png").converted
    Image.fromarray(pixels).convert("CMYK").save(tmp_path / "print.tiff")
    assert "CMYK" in data.read_photo(tmp_path / "print.tiff").converted
    turned = Image.fromarray(pixels)
    exif = turned.getexif()
    exif[0x0112] = 6  # rotated by the camera
    turned.save(tmp_path / "turned.png", exif=exif)
    assert data.read_photo(tmp_path / "turned.png").size == (40, 30)


def test_a_file_that_is_no_single_complete_image_is_refused_by_name(tmp_path):
    (tmp_path / "text.jpg").write_text("no picture")
    Image.fromarray(colours(200, 200)).save(tmp_path / "whole.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:4000])
    frames = [Image.fromarray(colours() // shade) for shade in (1, 2)]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    for name, said in (
        ("none.jpg", "no photograph"),
        ("text.jpg", "cannot read"),
        ("cut.jpg", "cannot read"),
        ("moving.gif", "animated"),
    ):
        with pytest.raises(DemurError, match=said) as caught:
            data.read_photo(tmp_path / name)
        assert name in str(caught.value)


def test_boxes_are_resized_and_cropped_with_the_photograph():
    """R26: a bright rectangle and its box are moved in the same way."""
    pixels = torch.zeros(3, 100, 200, dtype=torch.uint8)
    pixels[:, 20:80, 60:120] = 255
    moved = data.fitted(Photo(pixels, "bright.png", ((60, 20, 120, 80),)), resize=50, crop=40)
    ((left, top, right, bottom),) = moved.boxes
    assert moved.size == (40, 40) and (left, top, right, bottom) == (0, 5, 30, 35)
    inside = masks.inside_boxes(moved.size, [moved.boxes])[0, 0]
    bright = moved.pixels[0].double() / 255
    assert float((bright - inside).abs().mean()) < 0.03  # except for the blurred edges


@given(st.integers(32, 90), st.integers(32, 90), st.data())
def test_a_box_stays_in_the_photograph_and_one_outside_the_crop_is_dropped(height, width, drawn):
    left = drawn.draw(st.integers(0, width - 1))
    top = drawn.draw(st.integers(0, height - 1))
    box = (left, top, drawn.draw(st.integers(left, width)), drawn.draw(st.integers(top, height)))
    moved = data.fitted(photo(height, width, [box, (0, 0, width, height)]), resize=40, crop=32)
    assert moved.boxes[-1] == (0, 0, 32, 32) and moved.pixels.shape == (3, 32, 32)
    for first, upper, last, lower in moved.boxes:
        assert 0 <= first < last <= 32 and 0 <= upper < lower <= 32


def test_a_photograph_is_resized_as_in_torchvision():
    from torchvision.transforms.v2 import functional as torchvision

    given_photo = photo(333, 250)
    moved = data.fitted(given_photo, resize=256, crop=224)
    expected = torchvision.center_crop(
        torchvision.resize(given_photo.pixels, [256], antialias=True), [224, 224]
    )
    assert torch.equal(moved.pixels, expected)


def test_a_small_photograph_and_boxes_outside_it_are_refused():
    with pytest.raises(DemurError, match="40x30 pixels; the network needs 32x32"):
        data.fitted(photo(30, 40), resize=36, crop=32)
    for box in ((0, 0, 41, 10), (-1, 0, 4, 4), (3, 0, 2, 2)):
        with pytest.raises(DemurError, match="does not lie in an image of 40x64 pixels"):
            data.fitted(photo(64, 40, [box]), resize=36, crop=32)


def test_boxes_are_read_from_json_and_csv(tmp_path):
    expected = {"a.jpg": ((1, 2, 3, 4),), "b.jpg": ((0, 0, 5, 5), (2, 2, 9, 9))}
    (tmp_path / "boxes.json").write_text(
        json.dumps({"a.jpg": [1, 2, 3, 4], "b.jpg": [[0, 0, 5, 5], [2, 2, 9, 9]]})
    )
    (tmp_path / "about.json").write_text(
        json.dumps(
            {
                "a.jpg": {"box": [1, 2, 3, 4], "class_index": 7},
                "b.jpg": {"boxes": [[0, 0, 5, 5], [2, 2, 9, 9]]},
            }
        )
    )
    (tmp_path / "boxes.csv").write_text(
        "file,left,top,right,bottom\na.jpg,1,2,3,4\nb.jpg,0,0,5,5\nb.jpg,2,2,9,9\n"
    )
    for name in ("boxes.json", "about.json", "boxes.csv"):
        assert data.read_boxes(tmp_path / name) == expected


def test_bad_files_of_boxes_are_refused_by_name(tmp_path):
    for name, content, said in (
        ("a.json", "{", "not JSON"),
        ("b.json", "[[1, 2, 3, 4]]", "must be an object"),
        ("c.json", '{"a.jpg": [1, 2, 3]}', "left, top, right, bottom"),
        ("d.json", '{"a.jpg": [5, 5, 2, 9]}', "left, top, width, height"),
        ("e.json", '{"a.jpg": ["x", 1, 2, 3]}', "left, top, right, bottom"),
        ("f.csv", "name,left\na,1\n", "header lacks file"),
        ("g.csv", "file,left,top,right,bottom\na.jpg,1,2,3\n", "box of a.jpg"),
        ("h.json", '{"a.jpg": [NaN, 0, 1, 1]}', "NaN is no JSON"),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(DemurError, match=said) as caught:
            data.read_boxes(tmp_path / name)
        assert name in str(caught.value)
    with pytest.raises(DemurError, match="there is no file"):
        data.read_boxes(tmp_path / "none.json")


def test_a_folder_of_photographs_needs_an_annotation_file(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    Image.fromarray(colours()).save(folder / "one.png")
    with pytest.raises(DemurError, match="there is no mine"):
        data.read_photos(folder)
    (tmp_path / "mine.json").write_text(json.dumps({"one.png": {"box": [1, 1, 9, 9]}}))
    with pytest.raises(DemurError, match="class_index of one"):
        data.read_photos(folder)
    (tmp_path / "mine.json").write_text(
        json.dumps({"one.png": {"box": [1, 1, 9, 90], "class_index": 3}})
    )
    with pytest.raises(DemurError, match="does not lie"):
        data.read_photos(folder)
    (tmp_path / "mine.csv").write_text(
        "file,left,top,right,bottom,class_index,label\none.png,1,1,9,9,3,shark\n"
    )
    (only,) = data.read_photos(folder, tmp_path / "mine.csv")
    assert (only.label, only.name, only.boxes) == (3, "shark", ((1, 1, 9, 9),))


def test_the_packed_photographs_have_their_boxes_inside(data_root):
    photos = data.read_photos(data_root / "imagenet" / "photos", count=12)
    assert [one.name for one in photos[:3]] == ["triceratops", "tarantula", "snail"]
    assert all(one.boxes and one.label is not None for one in photos)
