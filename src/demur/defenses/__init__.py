"""Defences: classifiers that are trained or wrapped to withstand attack. Each is differentiable end to end, and attacked whole."""

from demur.defenses.background_class import BackgroundClass

__all__ = ["BackgroundClass"]
