"""Data sets that can be had from the network: fetched, verified and unpacked aside, then moved into place."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.request import Request, urlopen

from torchvision import datasets
from torchvision.datasets.utils import check_integrity

from demur.errors import DemurError
from demur.progress import job

TIMEOUT_SECONDS = 60


@dataclass(frozen=True)
class Archive:
    """A file to fetch: where torchvision looks for it under the root, its md5, and the addresses that have it."""

    path: str
    md5: str
    urls: tuple[str, ...]


@dataclass(frozen=True)
class Download:
    """What has to be fetched for a data set, how many megabytes that is, and torchvision's own way to unpack it."""

    archives: tuple[Archive, ...]
    megabytes: int
    unpack: Callable[[Path], object]


MNIST = Download(
    tuple(
        Archive(f"MNIST/raw/{file}", md5, tuple(mirror + file for mirror in datasets.MNIST.mirrors))
        for file, md5 in datasets.MNIST.resources
    ),
    12,
    lambda root: datasets.MNIST(root, download=True),
)
EMNIST = Download(  # one archive with all six variants
    (Archive("EMNIST/raw/gzip.zip", datasets.EMNIST.md5, (datasets.EMNIST.url,)),),
    562,
    lambda root: datasets.EMNIST(root, "balanced", download=True),
)
CIFAR10 = Download(
    (Archive(datasets.CIFAR10.filename, datasets.CIFAR10.tgz_md5, (datasets.CIFAR10.url,)),),
    170,
    lambda root: datasets.CIFAR10(root, download=True),
)


def fetch(download: Download, root: Path) -> None:
    """Fetch and unpack a download under `root`; until all of it is there and verified, nothing of it is.

    Raises: DemurError without a network, for a wrong checksum, or if `root` cannot be written to.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=root, prefix=".download.") as folder:
            aside = Path(folder)
            for archive in download.archives:
                _fetch(archive, aside)
            download.unpack(aside)  # finds the archives there, and so only unpacks them
            for archive in download.archives:
                (aside / archive.path).unlink()
            for file in sorted(path for path in aside.rglob("*") if path.is_file()):
                place = root / file.relative_to(aside)
                place.parent.mkdir(parents=True, exist_ok=True)
                file.replace(place)
    except OSError as error:
        raise DemurError(f"cannot write to {root}: {error.strerror or error}. Choose another --data-root.") from error


def _fetch(archive: Archive, root: Path) -> None:
    path = root / archive.path
    path.parent.mkdir(parents=True, exist_ok=True)
    faults = []
    for url in archive.urls:
        try:
            request = Request(url, headers={"User-Agent": "demur"})
            with (
                urlopen(request, timeout=TIMEOUT_SECONDS) as response,
                path.open("wb") as file,
                job(f"downloading {path.name}", float(response.headers.get("Content-Length") or 0)) as progress,
            ):
                while chunk := response.read(1 << 20):
                    file.write(chunk)
                    progress.advance(len(chunk))
        except (OSError, HTTPException) as error:
            faults.append(f"{url}: {' '.join(str(error).split()) or type(error).__name__}")
            continue
        if check_integrity(path, archive.md5):
            return
        faults.append(f"{url}: what came has the wrong checksum")
    free = f"{shutil.disk_usage(root).free // 1_000_000:,} MB"
    raise DemurError(f"cannot download {path.name} ({'; '.join(faults)}). Check the network, and the disk ({free} free).")
