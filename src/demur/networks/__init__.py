"""The papers' networks, networks for ImageNet, and the one loop that trains any network."""

from demur.networks.detection import Detector
from demur.networks.imagenet import ARCHITECTURES, CLASSES, ImageNetNetwork, class_number, imagenet_network
from demur.networks.papers import background_class_network, localized_network, rejection_network, wide_network
from demur.networks.training import Epoch, adadelta, fit, rejection_sgd, stepwise_sgd

__all__ = [
    "ARCHITECTURES",
    "CLASSES",
    "Detector",
    "Epoch",
    "ImageNetNetwork",
    "adadelta",
    "background_class_network",
    "class_number",
    "fit",
    "imagenet_network",
    "localized_network",
    "rejection_network",
    "rejection_sgd",
    "stepwise_sgd",
    "wide_network",
]
