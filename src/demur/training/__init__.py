"""Training: the loop that trains every network, and the optimizers of the papers."""

from demur.training.augmentation import CropAndFlip
from demur.training.certified import certified_fit
from demur.training.certified_loss import CertifiedLoss, CertifiedRejectLoss
from demur.training.loop import Scheduler, fit
from demur.training.optimizers import adadelta, one_cycle_sgd, rejection_sgd, stepwise_sgd
from demur.training.smoothing import GaussianNoise, SmoothingLoss
from demur.training.steps import BatchTransform, Epoch, Loss
from demur.training.stopping import Accuracy, EarlyStopping

__all__ = [
    "Accuracy",
    "BatchTransform",
    "CertifiedLoss",
    "CertifiedRejectLoss",
    "CropAndFlip",
    "EarlyStopping",
    "Epoch",
    "GaussianNoise",
    "Loss",
    "Scheduler",
    "SmoothingLoss",
    "adadelta",
    "certified_fit",
    "fit",
    "one_cycle_sgd",
    "rejection_sgd",
    "stepwise_sgd",
]
