"""Downloads of data sets, from a network that is made up."""

import gzip
import io
import zipfile
from dataclasses import replace
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
from torchvision import datasets

from data_files import UPRIGHT, md5, mnist_files, skip_checksums, write_emnist
from demur import data
from demur.data import downloads, sources
from demur.errors import DemurError
from demur.progress import Silent, reporting


@pytest.fixture
def stand_ins(monkeypatch):
    skip_checksums(monkeypatch)


class Network:
    """A network that answers from a dictionary of addresses and records the requests."""

    def __init__(self, monkeypatch, files):
        self.files = files
        self.asked = []
        monkeypatch.setattr(downloads, "urlopen", self.open)

    def open(self, request, timeout):
        self.asked.append(request.full_url)
        if request.full_url not in self.files:
            raise URLError("Name or service not known")
        response = io.BytesIO(self.files[request.full_url])
        response.headers = {"Content-Length": str(len(response.getvalue()))}
        return response


class Amounts(Silent):
    def __init__(self):
        self.total = 0.0
        self.done = 0.0

    def start(self, job, total):
        self.total += total
        return 0

    def advance(self, job, amount, note):
        self.done += amount


def offer_mnist(monkeypatch):
    """Offer small MNIST archives on the second mirror, with their own checksums."""
    content = {f"{name}.gz": gzip.compress(file) for name, file in mnist_files().items()}
    monkeypatch.setattr(
        datasets.MNIST, "resources", [(name, md5(archive)) for name, archive in content.items()]
    )
    archives = tuple(
        downloads.Archive(
            f"MNIST/raw/{name}", md5(archive), (f"https://down/{name}", f"https://up/{name}")
        )
        for name, archive in content.items()
    )
    small = replace(downloads.MNIST, archives=archives)
    monkeypatch.setitem(sources.SOURCES, "mnist", replace(sources.SOURCES["mnist"], download=small))
    return {f"https://up/{name}": archive for name, archive in content.items()}


def files_under(root):
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


def test_mnist_is_downloaded_from_the_mirror_that_answers(tmp_path, monkeypatch, stand_ins):
    network = Network(monkeypatch, offer_mnist(monkeypatch))
    progress = Amounts()
    with reporting(progress):
        data.download("mnist", tmp_path / "new folder")
    assert files_under(tmp_path / "new folder") == sorted(
        f"MNIST/raw/{name}" for name in mnist_files()
    )
    assert np.array_equal(
        data.load("mnist", root=tmp_path / "new folder").images[:, 0].numpy(), UPRIGHT
    )
    assert progress.done == progress.total == sum(map(len, network.files.values()))
    asked = len(network.asked)
    data.download("mnist", tmp_path / "new folder")
    assert len(network.asked) == asked == 8


def test_a_download_without_a_network_is_an_error_and_leaves_nothing(tmp_path, monkeypatch):
    files = offer_mnist(monkeypatch)
    files.popitem()
    Network(monkeypatch, files)
    with pytest.raises(
        DemurError,
        match=r"cannot download t10k-labels.*Name or service not known.*Check the network",
    ) as caught:
        data.download("mnist", tmp_path)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_download_with_a_wrong_checksum_is_refused(tmp_path, monkeypatch):
    Network(monkeypatch, dict.fromkeys(offer_mnist(monkeypatch), b"a page that says sorry"))
    with pytest.raises(DemurError, match="wrong checksum"):
        data.download("mnist", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_emnist_download_unpacks_all_variants(tmp_path, monkeypatch):
    write_emnist(tmp_path / "made", "balanced", np.arange(30))
    write_emnist(tmp_path / "made", "letters", np.arange(30) % 26 + 1)
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for file in (tmp_path / "made").rglob("*-ubyte"):
            archive.writestr(f"gzip/{file.name}.gz", gzip.compress(file.read_bytes()))
    monkeypatch.setattr(datasets.EMNIST, "md5", md5(packed.getvalue()))
    archives = (replace(downloads.EMNIST.archives[0], md5=md5(packed.getvalue())),)
    source = sources.SOURCES["emnist-letters"]
    monkeypatch.setitem(
        sources.SOURCES,
        "emnist-letters",
        replace(source, download=replace(source.download, archives=archives)),
    )
    Network(monkeypatch, {datasets.EMNIST.url: packed.getvalue()})
    data.download("emnist-letters", tmp_path)
    assert np.array_equal(data.load("emnist-letters", root=tmp_path).images[:, 0].numpy(), UPRIGHT)
    assert len(data.load("emnist-balanced", root=tmp_path)) == 30
    assert not list((tmp_path / "EMNIST").rglob("*.*z*"))


def test_a_set_without_a_download_and_a_root_that_is_a_file_are_refused(tmp_path, monkeypatch):
    with pytest.raises(
        DemurError, match="emnist-merge cannot be downloaded, but emnist-bymerge can"
    ):
        data.download("emnist-merge", tmp_path)
    data.download("digits", tmp_path)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DemurError, match=r"cannot write to .*file"):
        data.download("mnist", tmp_path / "file")


def test_the_official_addresses_and_checksums_are_torchvisions():
    assert {Path(archive.path).name: archive.md5 for archive in downloads.MNIST.archives} == dict(
        datasets.MNIST.resources
    )
    assert downloads.EMNIST.archives[0].path == f"EMNIST/raw/{Path(datasets.EMNIST.url).name}"
    assert downloads.CIFAR10.archives[0].urls == (datasets.CIFAR10.url,)
