"""The data sets that demur knows by name: their files under the data root, and their readers."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from shlex import quote

import torch
from torch.nn import functional
from torchvision import datasets

from demur.data import downloads
from demur.data.downloads import Download
from demur.data.formats import read_npz
from demur.data.images import ImageSet
from demur.errors import DemurError

DIGITS = tuple("0123456789")
CIFAR10_CLASSES = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)

_MNIST_SHA256 = {  # of the official files, unpacked
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}
_EMNIST_MERGE_SHA256 = "2871ad3c78ff40c0e0ff3e4c10ddc6e1492d1a17a1120fcb4c281e12181b3893"
_CIFAR10_SHA256 = "acdf8adfd4cdbbb89fe23fe4c950fcf0e6eb8d9d2cb786658a5aa6d99021a9b3"
_CIFAR10_BATCHES = [file for file, _ in (*datasets.CIFAR10.train_list, *datasets.CIFAR10.test_list)]


@dataclass(frozen=True)
class Layout:
    """One way in which the files of a data set lie under the data root.

    Parameters
    ----------
    files : mapping of str to str
        Required paths under the root, with their SHA-256 digests ("" if unknown).
    images : mapping of str to int
        Number of images of each split. A set in one piece has "train" only.
    read : callable
        Reads a split from the root.
    """

    files: Mapping[str, str]
    images: Mapping[str, int]
    read: Callable[[Path, str], ImageSet]


@dataclass(frozen=True)
class Source:
    """A data set that is known by name.

    Parameters
    ----------
    about : str
        Description in one line.
    classes : int
        Number of classes.
    layouts : tuple of Layout
        Known layouts. The first complete one is read.
    download : Download, optional
        Its archives, if it can be downloaded.
    instead : str
        Data set to download in its place, if it cannot.
    """

    about: str
    classes: int
    layouts: tuple[Layout, ...]
    download: Download | None = None
    instead: str = ""

    def layout(self, root: Path) -> Layout | None:
        """Return the first complete layout under `root`, or None."""
        for layout in self.layouts:
            if all((root / file).is_file() for file in layout.files):
                return layout
        return None


def missing(name: str, root: Path) -> str:
    """Name the first missing file of each layout of a data set."""
    files = [
        next(file for file in layout.files if not (root / file).is_file())
        for layout in SOURCES[name].layouts
    ]
    return f"{name}: there is no {' nor '.join(files)} in {root}."


def remedy(name: str, root: Path) -> str:
    """Give the command that downloads a data set, or the one that takes its place."""
    instead = SOURCES[name].instead
    command = f"demur data download {instead or name} --data-root {quote(str(root))}"
    if instead:
        return f"{name} cannot be downloaded, but {instead} can: {command}"
    return f"Download it with: {command}"


@contextmanager
def _damaged(name: str, root: Path) -> Iterator[None]:
    """Turn an error of the reader into an error with the remedy."""
    try:
        yield
    except Exception as error:  # torchvision's readers check little
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DemurError(
            f"{name} in {root} is damaged ({reason}). Remove its files there. {remedy(name, root)}"
        ) from error


def _digits(_: Path, split: str) -> ImageSet:
    """Read scikit-learn's 1,797 handwritten digits (Alpaydin & Kaynak 1998) as 28x28 images.

    The 8x8 block counts of 0..16 are enlarged with more contrast, so that strokes are as full as
    those of MNIST. A fixed, stratified 80:20 split makes "train" and "test".
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = functional.pad(torch.from_numpy(digits.images).float()[:, None] / 16, (1, 1, 1, 1))
    pixels = functional.interpolate(pixels, size=(28, 28), mode="bicubic", align_corners=False)
    pixels = (1.5 * (pixels - 0.5) + 0.5).clamp(0, 1)
    images = ImageSet((255 * pixels).round().byte(), torch.from_numpy(digits.target).long(), DIGITS)
    train, test = images.split(0.2, seed=0)
    return train if split == "train" else test


def _mnist(root: Path, split: str) -> ImageSet:
    with _damaged("mnist", root):
        mnist = datasets.MNIST(root, train=split == "train")
        return ImageSet(mnist.data[:, None], mnist.targets, DIGITS)


def _emnist(variant: str) -> Callable[[Path, str], ImageSet]:
    def read(root: Path, split: str) -> ImageSet:
        with _damaged(f"emnist-{variant}", root):
            emnist = datasets.EMNIST(root, variant, train=split == "train")
            # The labels of "letters" count from 1.
            first = 1 if variant == "letters" else 0
            # The files hold each image transposed.
            upright = emnist.data.transpose(1, 2).contiguous()
            return ImageSet(upright[:, None], emnist.targets - first, tuple(emnist.classes[first:]))

    return read


def _cifar10(root: Path, split: str) -> ImageSet:
    with _damaged("cifar10", root):
        # The official batches are pickles: torchvision verifies all MD5 digests before unpickling.
        cifar10 = datasets.CIFAR10(root, train=split == "train")
        images = torch.from_numpy(cifar10.data).permute(0, 3, 1, 2).contiguous()
        return ImageSet(images, torch.tensor(cifar10.targets), CIFAR10_CLASSES)


def _emnist_source(variant: str, train: int, test: int, about: str) -> Source:
    parts = ("train-images-idx3", "train-labels-idx1", "test-images-idx3", "test-labels-idx1")
    files = {f"EMNIST/raw/emnist-{variant}-{part}-ubyte": "" for part in parts}
    classes = len(datasets.EMNIST.classes_split_dict[variant]) - (variant == "letters")
    layout = Layout(files, {"train": train, "test": test}, _emnist(variant))
    about = f"EMNIST {about} (Cohen et al. 2017), 28x28 grey"
    return Source(about, classes, (layout,), downloads.EMNIST)


SOURCES: Mapping[str, Source] = {
    "digits": Source(
        "scikit-learn's handwritten digits, 8x8 enlarged to 28x28 grey",
        10,
        (Layout({}, {"train": 1438, "test": 359}, _digits),),
    ),
    "mnist": Source(
        "MNIST handwritten digits (LeCun et al. 1998), 28x28 grey",
        10,
        (
            Layout(
                {f"MNIST/raw/{file}": checksum for file, checksum in _MNIST_SHA256.items()},
                {"train": 60_000, "test": 10_000},
                _mnist,
            ),
        ),
        downloads.MNIST,
    ),
    "emnist-balanced": _emnist_source(
        "balanced", 112_800, 18_800, "digits and letters, the same number of each of 47 classes"
    ),
    "emnist-bymerge": _emnist_source(
        "bymerge", 697_932, 116_323, "digits and letters, letters of similar case merged"
    ),
    "emnist-byclass": _emnist_source(
        "byclass", 697_932, 116_323, "digits and letters, upper and lower case apart"
    ),
    "emnist-letters": _emnist_source(
        "letters", 124_800, 20_800, "letters, upper and lower case merged"
    ),
    "emnist-digits": _emnist_source("digits", 240_000, 40_000, "digits"),
    "emnist-mnist": _emnist_source("mnist", 60_000, 10_000, "digits, as many as MNIST"),
    "emnist-merge": Source(
        "EMNIST By Merge, a part in one file without an official split, 28x28 grey",
        47,
        (
            Layout(
                {"emnist_merge.npz": _EMNIST_MERGE_SHA256},
                {"train": 299_933},
                lambda root, split: read_npz(root / "emnist_merge.npz", split),
            ),
        ),
        instead="emnist-bymerge",
    ),
    "cifar10": Source(
        "CIFAR-10 photographs of 10 classes (Krizhevsky 2009), 32x32 colour",
        10,
        (
            Layout(  # without SHA-256: torchvision verifies the MD5 of each file on reading
                {f"cifar-10-batches-py/{file}": "" for file in (*_CIFAR10_BATCHES, "batches.meta")},
                {"train": 50_000, "test": 10_000},
                _cifar10,
            ),
            Layout(  # a part: 25,000 and 5,000 of the images
                {"cifar10.npz": _CIFAR10_SHA256},
                {"train": 25_000, "test": 5_000},
                lambda root, split: read_npz(root / "cifar10.npz", split, CIFAR10_CLASSES),
            ),
        ),
        downloads.CIFAR10,
    ),
}
"""All known data sets, by name."""
