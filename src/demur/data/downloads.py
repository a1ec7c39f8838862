"""Downloads of data sets: fetched, verified and unpacked in a temporary folder, then moved."""

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
    """A file to download.

    Parameters
    ----------
    path : str
        Path under the data root where torchvision looks for it.
    md5 : str
        Its MD5 digest.
    urls : tuple of str
        Addresses, tried in this order.
    """

    path: str
    md5: str
    urls: tuple[str, ...]


@dataclass(frozen=True)
class Download:
    """The archives of a data set.

    Parameters
    ----------
    archives : tuple of Archive
        Files to download.
    megabytes : int
        Size of all archives.
    unpack : callable
        Unpacks the archives under a root, with torchvision.
    """

    archives: tuple[Archive, ...]
    megabytes: int
    unpack: Callable[[Path], object]


# One of torchvision's mirrors is plain http.
_MIRRORS = tuple(url for url in datasets.MNIST.mirrors if url.startswith("https://"))

MNIST = Download(
    tuple(
        Archive(f"MNIST/raw/{file}", md5, tuple(mirror + file for mirror in _MIRRORS))
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
    """Download and unpack a data set under `root`, completely or not at all.

    Parameters
    ----------
    download : Download
        The archives.
    root : Path
        Data root. It is created where it does not exist.

    Raises
    ------
    DemurError
        Without a network, for a wrong checksum, or if `root` cannot be written to.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=root, prefix=".download.") as folder:
            aside = Path(folder)
            for archive in download.archives:
                _fetch(archive, aside)
            download.unpack(aside)  # finds the archives there, and therefore only unpacks them
            for archive in download.archives:
                (aside / archive.path).unlink()
            for file in sorted(path for path in aside.rglob("*") if path.is_file()):
                place = root / file.relative_to(aside)
                place.parent.mkdir(parents=True, exist_ok=True)
                file.replace(place)
    except OSError as error:
        raise DemurError(
            f"cannot write to {root}: {error.strerror or error}. Choose another --data-root."
        ) from error


def _fetch(archive: Archive, root: Path) -> None:
    path = root / archive.path
    path.parent.mkdir(parents=True, exist_ok=True)
    faults = []
    for url in archive.urls:
        try:
            stream(url, path)
        except (OSError, HTTPException) as error:
            faults.append(f"{url}: {' '.join(str(error).split()) or type(error).__name__}")
            continue
        if check_integrity(path, archive.md5):
            return
        faults.append(f"{url}: the download has the wrong checksum")
    free = f"{shutil.disk_usage(root).free // 1_000_000:,} MB"
    raise DemurError(
        f"cannot download {path.name} ({'; '.join(faults)}). "
        f"Check the network, and the disk ({free} free)."
    )


def stream(url: str, path: Path) -> None:
    """Download an address into a file, with a bound on the time without an answer.

    Raises
    ------
    OSError, HTTPException
        If the server does not answer, or the connection breaks.
    """
    request = Request(url, headers={"User-Agent": "demur"})
    with urlopen(request, timeout=TIMEOUT_SECONDS) as response, path.open("wb") as file:
        size = float(response.headers.get("Content-Length") or 0)
        with job(f"downloading {path.name}", size) as progress:
            while chunk := response.read(1 << 20):
                file.write(chunk)
                progress.advance(len(chunk))
