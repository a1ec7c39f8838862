"""Defences: classifiers that are trained or wrapped to withstand attack. Each is differentiable end to end, and attacked whole."""

from demur.defenses.adversarial_training import AdversarialTraining, LocalizedAdversarialTraining
from demur.defenses.background_class import BackgroundClass
from demur.defenses.neural_rejection import DeepNeuralRejection, NeuralRejection

__all__ = ["AdversarialTraining", "BackgroundClass", "DeepNeuralRejection", "LocalizedAdversarialTraining", "NeuralRejection"]
