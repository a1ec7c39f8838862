"""The papers as experiments: `run` carries one out at a profile's scale and writes its results."""

from demur.experiments.runner import EXPERIMENTS, run

__all__ = ["EXPERIMENTS", "run"]
