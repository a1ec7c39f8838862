"""Known data sets: read from their files, listed, and verified."""

import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision import datasets

from data_files import UPRIGHT, md5, skip_checksums, write_emnist, write_mnist
from demur import data
from demur.data import catalogue, sources
from demur.errors import DemurError


@pytest.fixture
def stand_ins(monkeypatch):
    skip_checksums(monkeypatch)


def test_digits_are_embedded_and_look_like_mnist(tmp_path):
    train = data.load("digits", root=tmp_path)
    test = data.load("digits", "test", root=tmp_path)
    assert len(train) + len(test) == 1797
    assert train.images.shape[1:] == (1, 28, 28)
    assert train.class_names == tuple("0123456789")
    assert train.fingerprint == data.load("digits").fingerprint
    assert (test.counts() - train.counts() / 4).abs().max() <= 1
    assert train.images.min() == 0 and train.images.max() == 255
    edge = torch.cat(
        [
            train.images[..., 0, :],
            train.images[..., -1, :],
            train.images[..., :, 0],
            train.images[..., :, -1],
        ]
    )
    assert edge.float().mean() < 2 < 30 < train.images.float().mean() < 70


@pytest.mark.parametrize(
    "variant", ["balanced", "bymerge", "byclass", "letters", "digits", "mnist"]
)
def test_emnist_is_upright_and_its_labels_right(tmp_path, variant):
    first = 1 if variant == "letters" else 0
    write_emnist(tmp_path, variant, np.arange(30) % 10 + first)
    images = data.load(f"emnist-{variant}", "test", tmp_path)
    assert np.array_equal(images.images[:, 0].numpy(), UPRIGHT)
    assert images.labels.tolist() == [i % 10 for i in range(30)]
    names = {
        "balanced": "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabdefghnqrt",
        "bymerge": "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabdefghnqrt",
        "byclass": "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz",
        "letters": "abcdefghijklmnopqrstuvwxyz",
    }.get(variant, "0123456789")
    assert images.class_names == tuple(names)
    assert images.name == f"emnist-{variant}"


def test_a_known_file_with_a_wrong_checksum_is_refused(tmp_path):
    write_mnist(tmp_path)
    with pytest.raises(
        DemurError,
        match=r"train-images-idx3-ubyte has the wrong checksum .*demur data download mnist",
    ):
        data.load("mnist", root=tmp_path)


def test_mnist_is_read_from_its_files(tmp_path, stand_ins):
    write_mnist(tmp_path)
    images = data.load("mnist", "test", tmp_path)
    assert np.array_equal(images.images[:, 0].numpy(), UPRIGHT)
    assert images.class_names == tuple("0123456789")


@pytest.mark.parametrize(
    "damage",
    [
        lambda whole: whole[: len(whole) // 2],
        lambda whole: b"",
        lambda whole: b"nonsense" * 999,
        lambda whole: whole + b"more",
    ],
)
def test_damaged_mnist_is_a_one_line_error(tmp_path, damage, stand_ins):
    write_mnist(tmp_path)
    for name in ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"):
        file = tmp_path / "MNIST" / "raw" / name
        whole = file.read_bytes()
        file.write_bytes(damage(whole))
        with pytest.raises(
            DemurError, match=r"mnist in .* is damaged.*demur data download mnist --data-root"
        ) as caught:
            data.load("mnist", root=tmp_path)
        assert "\n" not in str(caught.value)
        file.write_bytes(whole)


def test_a_different_number_of_labels_and_images_is_refused(tmp_path):
    write_emnist(tmp_path, "digits", np.arange(29) % 10)
    with pytest.raises(
        DemurError, match=r"emnist-digits in .* is damaged \(labels must have shape \(30,\)"
    ):
        data.load("emnist-digits", root=tmp_path)
    write_emnist(tmp_path, "digits", np.arange(30))
    with pytest.raises(DemurError, match=r"damaged \(labels must lie in 0\.\.9"):
        data.load("emnist-digits", root=tmp_path)


class Bomb:
    def __reduce__(self):
        return Path.touch, (Path("it went off"),)


def write_cifar10(root, monkeypatch, batch):
    folder = root / "cifar-10-batches-py"
    folder.mkdir()
    content = pickle.dumps(batch)
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        (folder / name).write_bytes(content)
    meta = pickle.dumps({"label_names": list(catalogue.CIFAR10_CLASSES)})
    (folder / "batches.meta").write_bytes(meta)
    monkeypatch.setattr(
        datasets.CIFAR10, "train_list", [[f"data_batch_{i}", md5(content)] for i in range(1, 6)]
    )
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [["test_batch", md5(content)]])
    monkeypatch.setattr(datasets.CIFAR10, "meta", datasets.CIFAR10.meta | {"md5": md5(meta)})


def test_the_official_cifar10_batches_come_before_the_npz(tmp_path, monkeypatch, stand_ins):
    pixels = np.random.default_rng(0).integers(0, 256, (10, 3, 32, 32), dtype=np.uint8)
    part = {
        f"{split}_{kind}": array[:4]
        for split in ("train", "test")
        for kind, array in (("images", pixels), ("labels", np.arange(4)))
    }
    np.savez(tmp_path / "cifar10.npz", **part)
    images = data.load("cifar10", root=tmp_path)
    assert len(images) == 4 and images.num_classes == 10 and images.name == "cifar10"
    write_cifar10(
        tmp_path, monkeypatch, {"data": pixels.reshape(10, -1), "labels": list(range(10))}
    )
    images = data.load("cifar10", root=tmp_path)
    assert len(images) == 50 and images.class_names[3] == "cat"
    assert np.array_equal(data.load("cifar10", "test", tmp_path).images.numpy(), pixels)


def test_changed_cifar10_batches_are_not_unpickled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_cifar10(tmp_path, monkeypatch, {"data": np.zeros((2, 3072), np.uint8), "labels": [0, 1]})
    (tmp_path / "cifar-10-batches-py" / "data_batch_1").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(DemurError, match=r"cifar10 in .* is damaged"):
        data.load("cifar10", root=tmp_path)
    assert not (tmp_path / "it went off").exists()


@pytest.mark.parametrize(
    ("name", "file", "command"),
    [
        ("mnist", "MNIST/raw/train-images-idx3-ubyte", "demur data download mnist"),
        (
            "emnist-letters",
            "emnist-letters-train-images-idx3-ubyte",
            "demur data download emnist-letters",
        ),
        (
            "emnist-merge",
            "emnist_merge.npz",
            "cannot be downloaded, but emnist-bymerge can: demur data download emnist-bymerge",
        ),
        (
            "cifar10",
            "cifar-10-batches-py/data_batch_1 nor cifar10.npz",
            "demur data download cifar10",
        ),
    ],
)
def test_missing_data_names_the_file_and_the_command(tmp_path, name, file, command):
    with pytest.raises(DemurError) as caught:
        data.load(name, root=tmp_path)
    message = str(caught.value)
    assert (
        file in message and f"{command} --data-root {tmp_path}" in message and "\n" not in message
    )


def test_an_unknown_name_suggests_the_nearest(tmp_path):
    for call in (data.load, data.download, lambda name: data.verify(tmp_path, [name])):
        with pytest.raises(
            DemurError, match=r"unknown data set 'emnist-ballanced'. Did you mean 'emnist-balanced'"
        ):
            call("emnist-ballanced")


def test_a_missing_path_is_neither_a_name_nor_a_path(tmp_path):
    for call in (data.load, lambda name: data.verify(tmp_path, [name])):
        for path in (str(tmp_path / "none"), str(tmp_path / "none.npz")):
            with pytest.raises(
                DemurError, match="no data set of this name, and no such file or folder"
            ):
                call(path)
    for path in ("nowhere/", "./nowhere/"):
        with pytest.raises(DemurError, match=f"^there is no folder {path}[.]$"):
            data.load(path)
    with pytest.raises(DemurError, match=r"^photos.zip: there is no data set of this name"):
        data.load("photos.zip")
    with pytest.raises(
        DemurError, match=r"unknown data set 'none'.*There is no such file or folder, either"
    ):
        data.load("none")


def test_a_path_is_verified_by_its_content(tmp_path):
    labels = np.array([0, 1, 1, 2, 2, 2])
    images = np.full((6, 4, 5, 3), 7, np.uint8)
    images[0] = 250
    np.savez(
        tmp_path / "own.npz",
        train_images=images,
        train_labels=labels,
        test_images=images[:2],
        test_labels=labels[:2],
    )
    (tmp_path / "empty" / "cat").mkdir(parents=True)
    whole, empty = data.verify(tmp_path, [str(tmp_path / "own.npz"), str(tmp_path / "empty")])
    assert whole.state == "ok"
    counts = "6 + 2 images of 5x4 colour, pixels from 7 to 250"
    assert whole.reason == f"{counts}; 3 classes, 1 (0) to 3 (2) images of each"
    assert empty.state == "bad" and "has no images" in empty.reason


def test_a_subset_names_the_whole_set(tmp_path):
    assert {status.name: status.subset_of for status in data.list_datasets(tmp_path)}[
        "cifar10"
    ] is None
    np.savez(tmp_path / "cifar10.npz", images=UPRIGHT, labels=np.arange(30))
    (cifar10,) = (status for status in data.list_datasets(tmp_path) if status.name == "cifar10")
    assert cifar10.images == {"train": 25_000, "test": 5_000} and cifar10.subset_of == {
        "train": 50_000,
        "test": 10_000,
    }


def test_the_root_is_the_argument_the_environment_or_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DEMUR_DATA", str(tmp_path / "environment"))
    assert data.data_root(tmp_path) == tmp_path
    assert data.data_root() == tmp_path / "environment"
    monkeypatch.delenv("DEMUR_DATA")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert data.data_root() == tmp_path / "cache" / "demur"


def test_data_sets_are_listed_with_their_downloads(tmp_path):
    write_mnist(tmp_path)
    known = {status.name: status for status in data.list_datasets(tmp_path)}
    assert list(known) == list(sources.SOURCES)
    assert known["digits"].where == "embedded" and known["digits"].megabytes is None
    assert known["mnist"].where == str(tmp_path / "MNIST/raw/train-images-idx3-ubyte")
    assert known["emnist-byclass"].where is None and known["emnist-byclass"].megabytes == 562
    assert known["emnist-byclass"].classes == 62
    assert known["emnist-merge"].megabytes is None
    assert known["cifar10"].images == {"train": 50_000, "test": 10_000}


def test_verification_finds_missing_damaged_and_wrong_data(tmp_path):
    write_mnist(tmp_path)
    write_emnist(tmp_path, "digits", np.arange(30) % 10)
    write_emnist(tmp_path, "balanced", np.arange(30) % 10 + 47)
    np.savez(tmp_path / "cifar10.npz", images=UPRIGHT, labels=np.arange(30))
    found = {result.name: result for result in data.verify(tmp_path)}
    assert {name: result.state for name, result in found.items()} == {
        "digits": "ok",
        "mnist": "bad",
        "emnist-balanced": "bad",
        "emnist-bymerge": "missing",
        "emnist-byclass": "missing",
        "emnist-letters": "missing",
        "emnist-digits": "bad",
        "emnist-mnist": "missing",
        "emnist-merge": "missing",
        "cifar10": "bad",
    }
    assert "train-images-idx3-ubyte has the wrong checksum" in found["mnist"].reason
    assert "0..46" in found["emnist-balanced"].reason
    assert found["emnist-digits"].reason == "train has 30 images, not 240,000."
    assert found["digits"].reason == "1,438 + 359 images, 10 classes"


def test_verification_of_classes_and_pixel_range(tmp_path, monkeypatch):
    source = sources.SOURCES["emnist-digits"]
    small = replace(source, layouts=(replace(source.layouts[0], images={"train": 30, "test": 30}),))
    monkeypatch.setitem(sources.SOURCES, "emnist-digits", small)
    write_emnist(tmp_path, "digits", np.arange(30) % 10)
    (result,) = data.verify(tmp_path, ["emnist-digits"])
    assert (result.state, result.reason) == ("ok", "30 + 30 images, 10 classes")
    write_emnist(tmp_path, "digits", np.arange(30) % 9)
    assert (
        data.verify(tmp_path, ["emnist-digits"])[0].reason
        == "train has images of 9 classes, not 10."
    )
    write_emnist(tmp_path, "digits", np.arange(30) % 10, UPRIGHT // 255)
    assert (
        data.verify(tmp_path, ["emnist-digits"])[0].reason
        == "train has pixels from 0 to 1, not from 0 to 255."
    )


@pytest.mark.real_data
def test_the_real_data_is_complete(data_root):
    found = {
        result.name: result
        for result in data.verify(data_root, ["mnist", "emnist-merge", "cifar10"])
    }
    assert {result.state for result in found.values()} == {"ok"}, found


@pytest.mark.real_data
def test_the_real_emnist_is_upright_and_has_no_splits(data_root):
    images = data.load("emnist-merge", root=data_root)
    assert images.images.shape == (299_933, 1, 28, 28)
    assert "".join(images.class_names) == "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabdefghnqrt"
    mean = {
        name: images.images[images.labels == images.class_names.index(name), 0].float().mean(0)
        for name in "LT7"
    }
    assert mean["T"][4:10].mean() > 1.5 * mean["T"][18:24].mean()  # its bar is above
    assert (
        mean["L"][18:24].mean() > mean["L"][4:10].mean()
        and mean["L"][:, :14].sum() > mean["L"][:, 14:].sum()
    )
    with pytest.raises(DemurError, match="no test split"):
        data.load("emnist-merge", "test", data_root)


@pytest.mark.real_data
def test_the_real_mnist_is_that_of_torchvision(data_root):
    images = data.load("mnist", "test", data_root)
    mnist = datasets.MNIST(data_root, train=False)
    for index in (0, 5000, 9999):
        picture, label = mnist[index]
        assert np.array_equal(np.asarray(picture), images.images[index, 0].numpy())
        assert label == images.labels[index]
