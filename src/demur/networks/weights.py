"""Files of trained weights: where they lie, how to read them safely, and how to download them."""

from http.client import HTTPException
from mmap import ACCESS_READ, mmap
from pathlib import Path
from shlex import quote
from zipfile import ZIP_STORED, ZipFile, is_zipfile

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torchvision import models
from torchvision.models.detection import SSDLite320_MobileNet_V3_Large_Weights

from demur.data import data_root, downloads
from demur.errors import DemurError, unknown
from demur.files import file_digest
from demur.untrusted import WEIGHTS, decoding, opened
from demur.writing import replacing

FOLDER = Path("imagenet", "weights")
"""The folder of weights inside a data root."""

URLS = {
    "inception_v3": models.Inception_V3_Weights.IMAGENET1K_V1.url,
    "vgg16": models.VGG16_Weights.IMAGENET1K_V1.url,
    "resnet18": models.ResNet18_Weights.IMAGENET1K_V1.url,
    "resnet50": models.ResNet50_Weights.IMAGENET1K_V2.url,
    "mobilenet_v2": models.MobileNet_V2_Weights.IMAGENET1K_V2.url,
    "squeezenet1_0": models.SqueezeNet1_0_Weights.IMAGENET1K_V1.url,
    "ssdlite320_mobilenet_v3_large": SSDLite320_MobileNet_V3_Large_Weights.COCO_V1.url,
}
"""Addresses of torchvision's weights, by the name of the network."""

SHA256 = {
    "inception_v3": "0cc3c7bd75056d25e46cba549dc184522069b81e9787eff6df84f397bd52a5ef",
    "vgg16": "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0",
    "resnet18": "f37072fd47e89c5e827621c5baffa7500819f7896bbacec160b1a16c560e07ec",
    "resnet50": "11ad3fa62ca79e40addfd354a8ec4b7c75143b3038b8d2a807fbc68deab379ca",
    "mobilenet_v2": "7ebf99e03e254b273379b23edca7ec0da9f48273b23a332b93c1c99d49e86e8f",
    "squeezenet1_0": "b66bff10",
    "ssdlite320_mobilenet_v3_large": (
        "a79551df90c79834bcd3bb3845ef9d966b5449a3a9b2833ae8404778ca5d65d2"
    ),
}
"""What the SHA-256 digest of each download begins with: all of it, but for squeezenet1_0, of which
only the eight digits in the name of torchvision's file are known."""


def find(name: str, root: str | Path | None = None) -> Path | None:
    """Find the file with the weights of a network.

    Parameters
    ----------
    name : str
        A key of `URLS`.
    root : path, optional
        The data root, as in `data.data_root`.

    Returns
    -------
    Path or None
        A safetensors file or torchvision's file in the data root, else torchvision's file in
        torch's cache. None where there is no file.

    Raises
    ------
    DemurError
        For an unknown name.

    Examples
    --------
    >>> find("resnet18", "no/such/folder")  # doctest: +SKIP
    """
    downloaded = _file_name(name)
    folder = data_root(root) / FOLDER
    places = (
        folder / f"{name}.safetensors",
        folder / downloaded,
        Path(torch.hub.get_dir(), "checkpoints", downloaded),
    )
    return next((place for place in places if place.is_file()), None)


def wanted(name: str, root: str | Path | None = None) -> Path:
    """Find the file with the weights of a network, and raise an error where there is none.

    Parameters
    ----------
    name : str
        A key of `URLS`.
    root : path, optional
        The data root, as in `data.data_root`.

    Returns
    -------
    Path
        The file, as from `find`.

    Raises
    ------
    DemurError
        For an unknown name, or where there is no file. The message names the command that
        downloads it.

    Examples
    --------
    >>> wanted("resnet18")  # doctest: +SKIP
    PosixPath('.../imagenet/weights/resnet18.safetensors')
    """
    if path := find(name, root):
        return path
    folder = data_root(root)
    raise DemurError(
        f"there are no weights of {name}: neither {name}.safetensors nor {_file_name(name)} is in "
        f"{folder / FOLDER}. "
        f"Get them with: demur data download {name} --data-root {quote(str(folder))}"
    )


def download(name: str, root: str | Path | None = None) -> Path:
    """Download the weights of a network into the data root.

    The file is verified by its SHA-256 digest. An existing file is kept.

    Parameters
    ----------
    name : str
        A key of `URLS`.
    root : path, optional
        The data root, as in `data.data_root`.

    Returns
    -------
    Path
        The file.

    Raises
    ------
    DemurError
        For an unknown name, or if the download failed. Nothing of a failed download remains.

    Examples
    --------
    >>> download("resnet18")  # doctest: +SKIP
    PosixPath('.../imagenet/weights/resnet18-f37072fd.pth')
    """
    path = data_root(root) / FOLDER / _file_name(name)
    url = URLS[name]
    if path.is_file():
        return path
    with replacing(path) as partial:
        try:
            downloads.stream(url, partial)
        except (OSError, HTTPException) as error:
            raise DemurError(
                f"cannot download {url}: {error}. Check the network and the disk."
            ) from error
        if not file_digest(partial).startswith(SHA256[name]):
            raise DemurError(f"cannot download {url}: its SHA-256 digest is wrong. Try again.")
    return path


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a file of weights without running code from it.

    Parameters
    ----------
    path : Path
        A safetensors file, or a state dict written by `torch.save`.

    Returns
    -------
    state : dict of str to Tensor
        The tensors by name.
    metadata : dict of str to str
        The metadata of a safetensors file; empty for other files.

    Raises
    ------
    DemurError
        If the file does not exist, is damaged, contains something else, or could run code.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     torch.save({"bias": torch.zeros(3)}, Path(folder, "a.pth"))
    ...     read(Path(folder, "a.pth"))
    ({'bias': tensor([0., 0., 0.])}, {})
    """
    check_file(path)
    if path.suffix == ".safetensors":
        with decoding(path, "a file of weights"), safe_open(path, "pt") as file:
            names = file.keys()
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError) as error:
        raise DemurError(f"{path} is not a whole file of weights ({error}).") from error
    except Exception as error:  # the restricted unpickler raises whatever rubbish leads to
        raise DemurError(
            f"{path} cannot be read without running code in it, or it is damaged: weights are "
            "wanted, as safetensors."
        ) from error
    named = isinstance(state, dict) and all(isinstance(name, str) for name in state)
    if not named or not all(isinstance(value, Tensor) for value in state.values()):
        raise DemurError(f"{path} is not a state dict: it must map names to tensors.")
    return state, {}


def check_file(path: Path) -> None:
    """Check that a file of weights cannot take more memory than its own size.

    Raises
    ------
    DemurError
        If it is missing, no regular file or very large, it is compressed, which `torch.save` does
        not do, or it holds a bytearray: torch makes one of any length, even where it runs no code.
    """
    with opened(path, WEIGHTS) as file, decoding(path, "a file of weights"):
        records = ZipFile(file).infolist() if is_zipfile(file) else []
        if any(one.compress_type != ZIP_STORED for one in records):
            raise DemurError(f"{path} is compressed: save it with torch.save.")
        if not path.stat().st_size:
            raise DemurError(f"{path} is not a whole file of weights (it is empty).")
        with mmap(file.fileno(), 0, access=ACCESS_READ) as content:
            if content.find(b"\nbytearray\n") >= 0:
                raise DemurError(
                    f"{path} holds a bytearray, which may take any amount of memory: weights are "
                    "wanted."
                )


def load_into(network: nn.Module, state: dict[str, Tensor], path: Path, name: str) -> None:
    """Load weights that `read` returned into a network.

    Parameters
    ----------
    network : nn.Module
        The network. Its weights change in place.
    state : dict of str to Tensor
        The weights.
    path : Path
        Their file, for the error message.
    name : str
        The network's name, for the error message.

    Raises
    ------
    DemurError
        If names or shapes are not those of the network.

    Examples
    --------
    >>> load_into(nn.Linear(1, 2), {"bias": torch.zeros(3)}, Path("a.pth"), "linear")
    Traceback (most recent call last):
    demur.errors.DemurError: a.pth does not have the weights of linear (Error(s) in loading ...).
    """
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:160]
        raise DemurError(f"{path} does not have the weights of {name} ({reason} ...).") from error


def _file_name(name: str) -> str:
    if name not in URLS:
        raise unknown("network", name, URLS)
    return Path(URLS[name]).name
