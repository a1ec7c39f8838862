"""Defences: classifiers that are trained or wrapped to withstand attacks.

Every defence is differentiable end to end and is attacked as a whole.
"""

from demur.defenses.adversarial_training import AdversarialTraining, LocalizedAdversarialTraining
from demur.defenses.background_class import BackgroundClass
from demur.defenses.base import Defense
from demur.defenses.blur import GaussianBlur, MedianBlur
from demur.defenses.certified_consistency import CertifiedConsistency
from demur.defenses.combined import EitherRejects
from demur.defenses.confidence_threshold import ConfidenceThreshold
from demur.defenses.deep_neural_rejection import DeepNeuralRejection
from demur.defenses.filters import gaussian_blur, median_blur
from demur.defenses.neural_rejection import NeuralRejection

__all__ = [
    "AdversarialTraining",
    "BackgroundClass",
    "CertifiedConsistency",
    "ConfidenceThreshold",
    "DeepNeuralRejection",
    "Defense",
    "EitherRejects",
    "GaussianBlur",
    "LocalizedAdversarialTraining",
    "MedianBlur",
    "NeuralRejection",
    "gaussian_blur",
    "median_blur",
]
