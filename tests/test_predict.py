"""`demur predict`: classes or rejections of image files, as they stream in."""

import csv
import io
import json

import pytest
import torch
from PIL import Image
from torch import nn

from command import demur as command
from demur import Classifier, DemurError
from demur.classifier import Preprocess
from demur.commands.predict import predict
from demur.defenses import ConfidenceThreshold


class Brightness(nn.Module):
    """Dark images are class 0, bright ones class 1; grey ones are unsure."""

    def forward(self, images):
        mean = images.mean((1, 2, 3))
        return torch.stack([1 - mean, mean], 1) * 10


def model(size=None):
    inner = Classifier(Brightness(), 2)
    made = ConfidenceThreshold(inner, 2, threshold=0.9)
    made.class_names = ("dark", "bright")
    made.preprocess = Preprocess(size=size, channels=3)
    return made


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    (folder / "more").mkdir(parents=True)
    for name, value, size in (("a", 0, 8), ("b", 255, 8), ("more/c", 128, 20)):
        Image.new("L", (size, size), value).save(folder / f"{name}.png")
    (folder / "notes.txt").write_text("no image")
    return folder


@pytest.mark.parametrize("size", [None, (4, 4)])
def test_folders_are_read_in_order_and_unsure_images_are_rejected(pictures, size):
    found = list(predict(model(size), [pictures]))
    assert [one.prediction for one in found] == ["dark", "bright", "REJECT"]
    assert [one.path for one in found] == [
        str(pictures / name) for name in ("a.png", "b.png", "more/c.png")
    ]
    assert found[0].score > 0.99 and 0.5 <= found[2].score < 0.51


def test_a_file_that_cannot_be_read_does_not_end_the_others(pictures):
    (pictures / "ab.png").write_bytes(b"no image")
    found = list(predict(model(), [pictures]))
    assert [bool(one.error) for one in found] == [False, True, False, False]
    assert "cannot read" in found[1].error


def test_a_class_of_the_name_reject_is_no_rejection(pictures):
    made = model()
    made.class_names = ("REJECT", "bright")
    found = list(predict(made, [pictures]))
    assert [one.prediction for one in found] == ["REJECT", "bright", "REJECT"]
    assert [one.rejected for one in found] == [False, False, True]


def test_what_is_missing_is_said_in_terms_of_the_command_line(pictures, tmp_path):
    (tmp_path / "net.py").write_text(
        "from torch import nn\n"
        "def make():\n    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 4, 2))\n"
    )
    source = f"py:{tmp_path / 'net.py'}:make"
    done = command("predict", source, pictures)
    assert done.returncode == 2
    assert "--img-size N" in done.stderr and "--num-classes K" in done.stderr
    done = command("predict", source, pictures, "--num-classes", 2)
    assert done.returncode == 2 and "give --img-size N." in done.stderr
    assert command("predict", source, pictures, "--img-size", 4).returncode == 0


def test_images_are_read_as_they_are_asked_for(pictures, monkeypatch):
    read = []
    monkeypatch.setattr("demur.commands.predict.AT_ONCE", 1)
    original = predict.__globals__["read_image"]
    monkeypatch.setattr(
        "demur.commands.predict.read_image", lambda path: (read.append(path), original(path))[1]
    )
    answers = predict(model(), [pictures])
    next(answers)
    assert len(read) == 1


def test_what_is_missing_is_refused(tmp_path):
    with pytest.raises(DemurError, match="no file or folder"):
        predict(model(), [tmp_path / "x"])
    with pytest.raises(DemurError, match="no image in"):
        predict(model(), [tmp_path])


CODE = """
import torch
from torch import nn
from demur.classifier import Preprocess

class Brightness(nn.Module):
    preprocess = Preprocess((4, 4))
    class_names = ["dark", "bright", "unsure"]

    def forward(self, images):
        mean = images.mean((1, 2, 3))
        return torch.stack([1 - mean, mean, torch.full_like(mean, 0.7)], 1)
"""


def test_the_command_prints_tables_json_lines_and_csv(pictures, tmp_path):
    (tmp_path / "net.py").write_text(CODE)
    source = f"py:{tmp_path / 'net.py'}:Brightness"
    words = ["predict", source, pictures, "--reject-column", "last"]
    done = command(*words)
    assert done.returncode == 0 and "3 images: 1 rejected (33.3 %)." in done.stderr
    assert f"{pictures / 'a.png'}  dark" in done.stdout and "REJECT" in done.stdout
    lines = [json.loads(line) for line in command(*words, "--format", "jsonl").stdout.splitlines()]
    assert [line["prediction"] for line in lines] == ["dark", "bright", "REJECT"]
    assert [line["rejected"] for line in lines] == [False, False, True]
    (pictures / "bad.png").write_bytes(b"x")
    done = command(*words, "--format", "csv")
    assert done.returncode == 1 and "1 could not be read" in done.stderr
    rows = list(csv.DictReader(io.StringIO(done.stdout)))
    assert len(rows) == 4 and rows[2]["error"].startswith("cannot read")
    assert [row["rejected"] for row in rows] == ["false", "false", "", "true"]
    assert command(*words, "--format", "xml").returncode == 2
