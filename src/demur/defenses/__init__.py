"""Defences: classifiers that are trained or wrapped to withstand attack. Each is differentiable end to end, and attacked whole."""

from demur.defenses.adversarial_training import AdversarialTraining, LocalizedAdversarialTraining
from demur.defenses.background_class import BackgroundClass
from demur.defenses.neural_rejection import DeepNeuralRejection, NeuralRejection
from demur.defenses.smoothing import GaussianSmoothing, MedianSmoothing, gaussian_smoothing, median_smoothing

__all__ = [
    "AdversarialTraining",
    "BackgroundClass",
    "DeepNeuralRejection",
    "GaussianSmoothing",
    "LocalizedAdversarialTraining",
    "MedianSmoothing",
    "NeuralRejection",
    "gaussian_smoothing",
    "median_smoothing",
]
