"""The reading boundary: files of strangers are regular, bounded, and fail with one line."""

import io
import json
import os
import struct
import threading
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from command import demur
from data_files import write_emnist
from demur import DemurError, data
from demur.classifier import Preprocess
from demur.data import downloads
from demur.data.decoding import read_image, readable_formats
from demur.data.image_files import ImageFiles
from demur.data.photos import read_photos
from demur.evaluation import results
from demur.evaluation.profiles import load_profile
from demur.networks import weights
from demur.studies import smoothing

ROOT = Path(__file__).parents[1]
IMAGES = np.zeros((4, 6, 6), np.uint8)
LABELS = np.array([0, 1, 0, 1])


def refused(said, call):
    """The call ends with one printable line that says these words."""
    with pytest.raises(DemurError, match=said) as caught:
        call()
    assert str(caught.value).isprintable()


def picture(path, mode="RGB", size=(8, 8), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size).save(path, **options)
    return path


def huge_png(path, width, height):
    """A whole PNG of one colour: small on disk, large in memory."""

    def chunk(kind, content):
        checksum = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)

    rows = zlib.compress(bytes((width + 7) // 8 + 1) * height, 9)
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    content = chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + content)


def npz(path, method=zipfile.ZIP_DEFLATED, **members):
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    return path


def npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def test_d12_integer_images_of_32_bits_are_refused(tmp_path):
    for number, largest in enumerate((255, 2**31 - 1)):
        path = tmp_path / f"{number}.tif"
        Image.fromarray(np.full((4, 4), largest, np.int32)).save(path)
        refused("32-bit pixels of unknown range", lambda path=path: read_image(path))
    deep = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    assert read_image(tmp_path / "deep.png").flatten().tolist() == list(range(256))


def test_d16_a_class_folder_whose_name_is_not_utf8_is_refused_by_verify_and_by_reading(tmp_path):
    for name in (b"good", b"bad\xff"):
        picture(Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)) / "1.png")
    refused("is not UTF-8. Rename it", lambda: data.load(tmp_path))
    refused("is not UTF-8. Rename it", lambda: data.read_images(tmp_path))
    found = demur("data", "verify", tmp_path)
    assert found.returncode == 1 and "not UTF-8" in found.stdout


def no_home(monkeypatch):
    def without(*_):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", without)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("DEMUR_DATA", raising=False)


def test_d17_without_a_home_folder_data_are_found_by_their_root(tmp_path, monkeypatch):
    no_home(monkeypatch)
    monkeypatch.setenv("DEMUR_DATA", str(tmp_path))
    assert data.data_root() == tmp_path == data.data_root(tmp_path)
    assert demur("data", "list", "--data-root", tmp_path).returncode == 0
    monkeypatch.delenv("DEMUR_DATA")
    assert data.data_root() == Path(".cache", "demur")
    assert len(data.load("digits")) == 1438


def test_d19_empty_files_are_no_data_set(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("demur.data.downloads.fetch", lambda *given: asked.append(given))
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part in ("images-idx3", "labels-idx1"):
        for split in ("train", "t10k"):
            (raw / f"{split}-{part}-ubyte").touch()
    data.download("mnist", tmp_path)
    assert len(asked) == 1
    write_emnist(tmp_path, "digits", np.arange(30) % 10)
    data.download("emnist-digits", tmp_path)
    assert len(asked) == 1  # whole files are left unchanged


def test_d20_postscript_is_given_to_no_program(tmp_path, monkeypatch):
    monkeypatch.setattr("subprocess.Popen", lambda *_, **__: pytest.fail("a program was started"))
    path = tmp_path / "a.png"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n")
    refused("no format that is known", lambda: read_image(path))
    assert not {"EPS", "WMF", "ICO"} & set(readable_formats())
    calls = [
        line
        for file in (ROOT / "src").rglob("*.py")
        for line in file.read_text().splitlines()
        if "Image.open(" in line
    ]
    assert calls and all("formats=" in line for line in calls)


def test_d21_text_of_a_file_reaches_the_terminal_letter_by_letter(tmp_path):
    evil = "\x1b[2J\x1b]0;title\x07[bold red]x[/] [/] :smile:"
    row = results.Measurement(evil, evil, evil, "%", measured=3.0, note=evil)
    table = results.Table("Outcomes of each model under each attacker", [row], evil)
    found = results.Results(
        *(1, "smoothing", evil, evil, 0, results.Data(evil)), [table], evil, [evil], warnings=[evil]
    )
    (tmp_path / "run").mkdir()
    results.write(found, tmp_path / "run")
    shown = demur("compare", tmp_path / "run", "--out", tmp_path / "page")
    assert shown.returncode == 0
    assert "[bold red]x[/] [/] :smile:" in shown.stdout
    assert "\x1b" not in shown.stdout and "\x07" not in shown.stdout
    refused(r"\?\[2J", lambda: data.load("evil\x1b[2J.npz"))


def test_d22_damaged_archives_are_one_line(tmp_path):
    whole = {"images": npy(IMAGES), "labels": npy(LABELS)}
    header = whole["images"].replace(b"(4, 6, 6)", b"(4, 6, 6")
    for number, (method, images) in enumerate(
        [
            (zipfile.ZIP_LZMA, whole["images"]),
            (zipfile.ZIP_BZIP2, whole["images"]),
            (zipfile.ZIP_STORED, header),
            (zipfile.ZIP_STORED, whole["images"][:-1]),
            (zipfile.ZIP_STORED, whole["images"] + b"x"),
            (zipfile.ZIP_STORED, whole["images"].replace(b"(4, 6, 6)", b"(4, 6,-6)")),
        ]
    ):
        path = npz(tmp_path / f"{number}.npz", method, images=images, labels=whole["labels"])
        refused(f"{number}.npz", lambda path=path: data.load(path))


def test_d23_any_error_of_a_decoder_is_one_line(tmp_path, monkeypatch):
    path = picture(tmp_path / "a.png")
    for error in (IndexError("x"), struct.error("y"), MemoryError(), AssertionError()):

        def fail(*_, error=error, **__):
            raise error

        with monkeypatch.context() as patch:
            patch.setattr("demur.data.decoding.np.asarray", fail)
            refused("cannot read .*a.png as an image", lambda: read_image(path))


def test_d24_sizes_are_checked_before_memory_is_allocated(tmp_path, monkeypatch):
    bomb = tmp_path / "a.png"
    huge_png(bomb, 12_000, 12_000)
    refused("144,000,000 pixels, more than the limit of 67,108,864", lambda: read_image(bomb))
    header = npy(IMAGES).replace(b"(4, 6, 6), ", b"(99999,99999,6)")[: len(npy(IMAGES))]
    path = npz(tmp_path / "a.npz", images=header, labels=npy(LABELS))
    refused("bytes of arrays, more than the limit.*--limits", lambda: data.load(path))
    (tmp_path / "a.json").write_text(" " * ((1 << 24) + 1))
    refused("more than the limit of 16,777,216", lambda: data.read_boxes(tmp_path / "a.json"))
    monkeypatch.setenv("DEMUR_LIMITS", "2")
    refused("not JSON", lambda: data.read_boxes(tmp_path / "a.json"))
    monkeypatch.setenv("DEMUR_LIMITS", "much")
    refused("must be a positive number", lambda: data.read_boxes(tmp_path / "a.json"))


class Swollen:
    def __reduce__(self):
        return bytearray, (1 << 20,)


def test_d24_weights_cannot_take_more_memory_than_their_file(tmp_path):
    stored = tmp_path / "stored.pth"
    torch.save({"a": torch.zeros(1000)}, stored)
    packed = tmp_path / "packed.pth"
    with zipfile.ZipFile(stored) as old, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    assert set(weights.read(stored)[0]) == {"a"}
    refused("is compressed", lambda: weights.read(packed))
    for new_format in (True, False):
        torch.save({"a": Swollen()}, tmp_path / "a.pth", _use_new_zipfile_serialization=new_format)
        refused("holds a bytearray", lambda: weights.read(tmp_path / "a.pth"))


def test_d24_a_fifo_does_not_hang(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    reads = {
        "a.png": lambda path: read_image(path),
        "a.npz": lambda path: data.load(path),
        "a.pth": lambda path: weights.read(path),
        "a.safetensors": lambda path: weights.read(path),
        "a.json": lambda path: data.read_boxes(path),
        "a.toml": lambda path: load_profile(smoothing, str(path)),
        "results.json": lambda path: results.read(path.parent),
    }
    for name, read in reads.items():
        os.mkfifo(folder / name)
        ended = []

        def run(read=read, path=folder / name, ended=ended):
            refused("no regular file|no file", lambda: read(path))
            ended.append(path)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        thread.join(10)
        assert ended, f"{name} hangs"


@pytest.mark.parametrize("name", ["../cat.png", "/etc/cat.png", "in/../../cat.png"])
def test_d25_annotations_stay_inside_their_folder(tmp_path, name):
    picture(tmp_path / "cat.png")
    (tmp_path / "photos" / "in").mkdir(parents=True)
    (tmp_path / "photos.json").write_text(json.dumps({name: {"class_index": 3}}))
    refused("may lead out of", lambda: read_photos(tmp_path / "photos"))


def test_d25_hostile_annotations_are_one_line(tmp_path):
    picture(tmp_path / "photos" / "a.png")
    for text in (
        '{"a.png": {"class_index": Infinity}}',
        '{"a.png": {"class_index": 1e999}}',
        "[" * 100_000,
        '{"a.png": ' + "9" * 5000 + "}",
        '{"' + "x" * 5000 + '": {"class_index": 3}}',
    ):
        (tmp_path / "photos.json").write_text(text)
        refused("photo", lambda: read_photos(tmp_path / "photos"))
    (tmp_path / "photos.json").unlink()
    header = "file,left,top,right,bottom,class_index\n"
    (tmp_path / "photos.csv").write_text(header + "x" * 200_000 + ",1,2,3,4,5\n")
    refused("not a CSV file", lambda: read_photos(tmp_path / "photos"))


def test_d25_damaged_profiles_are_one_line(tmp_path):
    for text in ("a = " + "9" * 5000, "a = " + "[" * 5000, "\x00"):
        (tmp_path / "a.toml").write_text(text)
        refused("is not TOML", lambda: load_profile(smoothing, str(tmp_path / "a.toml")))


def test_d41_animated_images_of_a_class_folder_are_refused(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    for kind in ("gif", "png", "webp", "tif"):
        path = tmp_path / kind / "x" / f"a.{kind}"
        path.parent.mkdir(parents=True)
        frames[0].save(path, save_all=True, append_images=frames[1:])
        picture(tmp_path / kind / "y" / "b.png")
        refused("animated, or holds several", lambda kind=kind: data.load(tmp_path / kind))
        source = ImageFiles(
            (str(path),), torch.tensor([0]), ("a", "b"), preprocess=Preprocess(size=(8, 8))
        )
        refused("animated, or holds several", lambda source=source: source.hashes)


def test_d41_weights_are_downloaded_with_a_timeout_and_their_whole_digest(tmp_path, monkeypatch):
    asked = []

    class Answer(io.BytesIO):
        headers = {}  # noqa: RUF012

    def urlopen(request, timeout):
        asked.append((request.full_url, timeout))
        return Answer(b"not the weights")

    monkeypatch.setattr(downloads, "urlopen", urlopen)
    refused("its SHA-256 digest is wrong", lambda: weights.download("resnet18", tmp_path))
    assert asked == [(weights.URLS["resnet18"], downloads.TIMEOUT_SECONDS)]
    assert not list((tmp_path / weights.FOLDER).iterdir())
    assert set(weights.SHA256) == set(weights.URLS)
    for name, digest in weights.SHA256.items():
        assert Path(weights.URLS[name]).stem.endswith(digest[:8])
        assert len(digest) == 64 or name == "squeezenet1_0"


def test_d41_every_download_is_encrypted():
    sources = (downloads.MNIST, downloads.EMNIST, downloads.CIFAR10)
    urls = [url for source in sources for archive in source.archives for url in archive.urls]
    assert urls and all(url.startswith("https://") for url in [*urls, *weights.URLS.values()])
