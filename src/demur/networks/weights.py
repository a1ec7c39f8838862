"""Files of trained weights: where they lie, how they are read without running anything in them, and how they are downloaded."""

from pathlib import Path
from shlex import quote

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torchvision import models
from torchvision.models.detection import SSDLite320_MobileNet_V3_Large_Weights

from demur.data import data_root
from demur.errors import DemurError, unknown

FOLDER = Path("imagenet", "weights")
"""Where weights lie under a data root."""

URLS = {
    "inception_v3": models.Inception_V3_Weights.IMAGENET1K_V1.url,
    "vgg16": models.VGG16_Weights.IMAGENET1K_V1.url,
    "resnet18": models.ResNet18_Weights.IMAGENET1K_V1.url,
    "resnet50": models.ResNet50_Weights.IMAGENET1K_V2.url,
    "mobilenet_v2": models.MobileNet_V2_Weights.IMAGENET1K_V2.url,
    "squeezenet1_0": models.SqueezeNet1_0_Weights.IMAGENET1K_V1.url,
    "ssdlite320_mobilenet_v3_large": SSDLite320_MobileNet_V3_Large_Weights.COCO_V1.url,
}
"""Where torchvision has the weights of networks, by name."""


def find(name: str, root: str | Path | None = None) -> Path | None:
    """The file with the weights of that network: in the data root, as safetensors or as torchvision names it, else in torch's cache."""
    folder, downloaded = data_root(root) / FOLDER, _file_name(name)
    places = (folder / f"{name}.safetensors", folder / downloaded, Path(torch.hub.get_dir(), "checkpoints", downloaded))
    return next((place for place in places if place.is_file()), None)


def wanted(name: str, root: str | Path | None = None) -> Path:
    """As `find`. Raises: DemurError, saying how to get it, where there is none."""
    if path := find(name, root):
        return path
    folder = data_root(root)
    raise DemurError(
        f"there are no weights of {name}: no {name}.safetensors nor {_file_name(name)} in {folder / FOLDER}. "
        f"Get them with: demur data get {name} --data-root {quote(str(folder))}"
    )


def download(name: str, root: str | Path | None = None) -> Path:
    """Download the weights of that network into the data root, verified by the digest in their name (as torchvision's have it).

    Raises: DemurError for a name that is not in URLS, or if the download failed; nothing is then left of it.
    """
    if name not in URLS:
        raise unknown("network", name, URLS)
    url, folder = URLS[name], data_root(root) / FOLDER
    path = folder / _file_name(name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not path.is_file():
            digest = path.stem.rpartition("-")[2]
            torch.hub.download_url_to_file(url, str(path), hash_prefix=digest, progress=False)  # through a temporary name
    except (OSError, RuntimeError, ValueError) as error:
        raise DemurError(f"cannot download {url}: {error}.") from error
    return path


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file of weights, by name, and what its metadata say (a .pth file has none).

    Raises: DemurError if it is missing, damaged, or could run code when read.
    """
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118 - it is no dict
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise DemurError(f"there is no file {path}.") from error
    except (OSError, SafetensorError, EOFError) as error:
        raise DemurError(f"{path} is not a whole file of weights ({' '.join(str(error).split())[:160]}).") from error
    except Exception as error:  # the restricted unpickler raises whatever rubbish leads to
        raise DemurError(f"{path} cannot be read without running code in it, or is damaged: weights are wanted, as safetensors.") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise DemurError(f"{path} is no state dict: it must map names to tensors.")
    return state, {}


def _file_name(name: str) -> str:
    if name not in URLS:
        raise unknown("network", name, URLS)
    return Path(URLS[name]).name
