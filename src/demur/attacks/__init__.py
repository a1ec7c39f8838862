"""Attacks: frozen dataclasses that are called with a classifier, images, labels and a threat."""

from demur import masks
from demur.attacks.apgd import APGD
from demur.attacks.base import Attack, MinimumNormAttack, SearchAttack
from demur.attacks.book import Rows
from demur.attacks.bpda import WithBPDA
from demur.attacks.carlini_wagner import CarliniWagnerL2
from demur.attacks.carlini_wagner_stages import CarliniWagnerL0, CarliniWagnerLinf
from demur.attacks.engine import run_attack
from demur.attacks.fast_gradient import FGM, FGSM
from demur.attacks.fast_minimum_norm import DDN, FMN
from demur.attacks.features import feature_density, feature_matching
from demur.attacks.frozen import KernelMachine, wider_kernels
from demur.attacks.normalized_gradient import NormalizedGradient
from demur.attacks.pgd import PGD
from demur.attacks.quantize import quantize_towards
from demur.attacks.random_noise import RandomNoise
from demur.attacks.result import AttackResult
from demur.attacks.sampling import SquareSample
from demur.attacks.sigma_zero import SigmaZero
from demur.attacks.square import Square
from demur.attacks.state import AttackState
from demur.attacks.strongest import EnsembleResult, Strongest
from demur.attacks.transfer import Transfer
from demur.attacks.wrappers import (
    BPDA,
    WithWiderKernels,
    expectation_over_transformation,
)
from demur.goals import AnyError, Evade, ForceReject, Goal, Target
from demur.norms import sizes

__all__ = [
    "APGD",
    "BPDA",
    "DDN",
    "FGM",
    "FGSM",
    "FMN",
    "PGD",
    "AnyError",
    "Attack",
    "AttackResult",
    "AttackState",
    "CarliniWagnerL0",
    "CarliniWagnerL2",
    "CarliniWagnerLinf",
    "EnsembleResult",
    "Evade",
    "ForceReject",
    "Goal",
    "KernelMachine",
    "MinimumNormAttack",
    "NormalizedGradient",
    "RandomNoise",
    "Rows",
    "SearchAttack",
    "SigmaZero",
    "Square",
    "SquareSample",
    "Strongest",
    "Target",
    "Transfer",
    "WithBPDA",
    "WithWiderKernels",
    "expectation_over_transformation",
    "feature_density",
    "feature_matching",
    "masks",
    "quantize_towards",
    "run_attack",
    "sizes",
    "wider_kernels",
]
