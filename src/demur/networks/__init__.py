"""The papers' networks, and the one loop that trains any of them."""

from demur.networks.papers import background_class_network, rejection_network
from demur.networks.training import Epoch, adadelta, fit, rejection_sgd

__all__ = ["Epoch", "adadelta", "background_class_network", "fit", "rejection_network", "rejection_sgd"]
