"""Boxes of the objects on photographs, as a detector suggests them."""

from pathlib import Path

import torch
from torch import Tensor
from torchvision.models.detection import ssdlite320_mobilenet_v3_large

from demur.data import Box, as_floats
from demur.errors import DemurError
from demur.networks import weights

NAME = "ssdlite320_mobilenet_v3_large"


class Detector:
    """torchvision's SSDlite with MobileNetV3, for objects of COCO: what the localized paper's MobileNet suggestions are today.

    Args:
        file: its weights; if None, those in the data root or in torch's cache (`demur data get ssdlite320_mobilenet_v3_large`).
        root: the data root, as in `data.data_root`.

    Raises: DemurError for weights that are not there, damaged or of another network.
    """

    def __init__(self, file: str | Path | None = None, root: str | Path | None = None) -> None:
        path = weights.wanted(NAME, root) if file is None else Path(file)
        state, _ = weights.read(path)
        self.network = ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None)
        try:
            self.network.load_state_dict(state)
        except RuntimeError as error:
            raise DemurError(f"{path} has not the weights of {NAME} ({' '.join(str(error).split())[:160]} ...).") from error
        self.network.eval()

    @torch.no_grad()
    def boxes(self, images: list[Tensor], threshold: float = 0.3) -> list[tuple[Box, ...]]:
        """Boxes of each image (3, H, W), uint8 or float in [0, 1]: all at least so sure, or else the surest; none where none is found."""
        found = []
        for answer in self.network([as_floats(image[None])[0] for image in images]):
            count = max(1, int((answer["scores"] >= threshold).sum()))  # they come with the surest first
            found.append(tuple(_box(corners) for corners in answer["boxes"][:count].tolist()))
        return found


def _box(corners: list[float]) -> Box:
    left, top, right, bottom = (round(corner) for corner in corners)
    return left, top, right, bottom
