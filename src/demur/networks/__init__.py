"""Networks: those of the papers, ImageNet networks with their preprocessing, and a detector."""

from demur.networks.adapted import AdaptedNetwork
from demur.networks.certified import certified_cnn, certified_cnn7, certified_weights
from demur.networks.detection import Detector
from demur.networks.features import FeatureExtractor
from demur.networks.imagenet import (
    ARCHITECTURES,
    CLASSES,
    ImageNetNetwork,
    class_number,
    imagenet_network,
    untrained_imagenet_network,
)
from demur.networks.libraries import timm_network, torchvision_network
from demur.networks.papers import background_class_network, dnr_cnn, localized_network
from demur.networks.registry import build
from demur.networks.residual import wide_resnet
from demur.networks.resnet9 import resnet9
from demur.networks.strided import strided_cnn
from demur.networks.upsampled import enlarged_imagenet_network

__all__ = [
    "ARCHITECTURES",
    "CLASSES",
    "AdaptedNetwork",
    "Detector",
    "FeatureExtractor",
    "ImageNetNetwork",
    "background_class_network",
    "build",
    "certified_cnn",
    "certified_cnn7",
    "certified_weights",
    "class_number",
    "dnr_cnn",
    "enlarged_imagenet_network",
    "imagenet_network",
    "localized_network",
    "resnet9",
    "strided_cnn",
    "timm_network",
    "torchvision_network",
    "untrained_imagenet_network",
    "wide_resnet",
]
