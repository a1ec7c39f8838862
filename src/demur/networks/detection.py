"""Detection of objects on photographs."""

from pathlib import Path

import torch
from torch import Tensor
from torchvision.models.detection import ssdlite320_mobilenet_v3_large

from demur.data import Box, to_float
from demur.networks import weights

NAME = "ssdlite320_mobilenet_v3_large"
"""The detector's name at torchvision."""


class Detector:
    """Detector of COCO's objects: torchvision's SSDlite with MobileNetV3.

    It stands for the MobileNet detector that suggests boxes in the localized-adversarial-training
    paper.

    Parameters
    ----------
    file : path, optional
        File of its weights. By default the file in the data root or in torch's cache
        (`demur data download ssdlite320_mobilenet_v3_large`).
    root : path, optional
        The data root, as in `data.data_root`.

    Raises
    ------
    DemurError
        For weights that do not exist, are damaged, or belong to another network.

    Examples
    --------
    >>> Detector("weights.pth").boxes([image])  # doctest: +SKIP
    [((12, 30, 201, 187),)]
    """

    def __init__(self, file: str | Path | None = None, root: str | Path | None = None) -> None:
        path = weights.wanted(NAME, root) if file is None else Path(file)
        state, _ = weights.read(path)
        self.network = ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None)
        weights.load_into(self.network, state, path, NAME)
        self.network.eval()

    @torch.no_grad()
    def boxes(self, images: list[Tensor], threshold: float = 0.3) -> list[tuple[Box, ...]]:
        """Detect objects.

        Parameters
        ----------
        images : list of Tensor of shape (3, H, W)
            Images of any size, uint8 or float in [0, 1].
        threshold : float, default=0.3
            Least score of a box, in [0, 1].

        Returns
        -------
        list of tuple of Box
            For each image the boxes (left, top, right, bottom) in pixels, with the best score
            first. Where no box reaches the threshold, the best one is given; where there is no box
            at all, the tuple is empty.
        """
        found = []
        for answer in self.network([to_float(image[None])[0] for image in images]):
            enough = int((answer["scores"] >= threshold).sum())  # the best scores come first
            best = answer["boxes"][: max(1, enough)].tolist()
            found.append(tuple(_box(corners) for corners in best))
        return found


def _box(corners: list[float]) -> Box:
    left, top, right, bottom = (round(corner) for corner in corners)
    return left, top, right, bottom
