"""The time of an audit: estimates of its steps, and what is left out to stay within a limit."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from demur.attacks import (
    APGD,
    DDN,
    FGM,
    FGSM,
    FMN,
    PGD,
    AnyError,
    Attack,
    RandomNoise,
    Square,
    Strongest,
    WithBPDA,
    WithWiderKernels,
)
from demur.evaluation.audit_plan import Step
from demur.evaluation.audit_tests import TestStep
from demur.evaluation.selftests import SelfTest

TRIMMED: Final = (
    "sweep",
    "force reject",
    "BPDA",
    "transfer",
    "certificates",
    "self-tests",
    "ensemble",
)
"""What `--max-minutes` leaves out, in this order, until the rest fits."""


@dataclass(frozen=True)
class Rates:
    """How fast a model is, and how many images break.

    Parameters
    ----------
    forwards, gradients : float
        Images in a second: forward passes, and forward and backward passes together. 0 gradients: a
        model that gives only scores.
    broken : mapping of str to float
        For each threat, as text, the share of images that a short attack breaks.
    soon : mapping of str to float
        For each threat, how many gradients these images took on average.
    """

    forwards: float
    gradients: float
    broken: Mapping[str, float]
    soon: Mapping[str, float] = field(default_factory=dict)


SCORED: Final = 4
"""Forward passes on each image beside the attack: its candidates, and the stored ones."""
GIVEN_UP: Final = 0.5
"""The share of the steps toward targets that is left where hopeless ones are given up."""
SOON: Final = 5
"""Gradients after which an image that breaks is broken, on average, where nothing is measured."""


def seconds_of(step: Step | TestStep, rates: Rates) -> float:
    """Estimate the seconds that a step takes for one image."""
    node = step.node
    if isinstance(node, SelfTest):
        forwards, gradients = node.probe.passes()
        each = gradients / rates.gradients if rates.gradients else 0.0
        return forwards / rates.forwards + each
    if node.attack is None:
        return 1 / rates.forwards
    assert node.threat is not None
    threat = node.threat
    forwards, gradients = passes(node.attack)
    broken = 0.0
    if threat.goal != AnyError():
        eps = math.inf if threat.eps is None or not isinstance(threat.eps, float) else threat.eps
        broken = 1.0 if math.isinf(eps) else rates.broken.get(str(threat), 0.0)
    if isinstance(node.attack, RandomNoise):
        broken = 0.0
    left = 1 - broken
    if isinstance(node.attack, Strongest) and node.attack.square_sample is not None:
        # Square meets a sample of what is left in each shard.
        met = node.attack.square_sample / max(1.0, left * node.images_of(0))
        forwards *= min(1.0, met)
    gradient = 1 / rates.gradients if rates.gradients else 0.0
    long = forwards / rates.forwards + gradients * gradient
    soon = rates.soon.get(str(threat), SOON)
    short = min(soon, gradients) * gradient + min(soon, forwards) / rates.forwards
    return left * long + broken * min(long, short) + SCORED / rates.forwards


def passes(attack: Attack) -> tuple[float, float]:
    """Count the forward passes without a gradient, and the gradients, for an unbroken image."""
    if isinstance(attack, WithBPDA | WithWiderKernels):
        return passes(attack.attack)
    if isinstance(attack, RandomNoise):
        return attack.draws, 0
    if isinstance(attack, FGSM | FGM):
        return 1, 1
    if isinstance(attack, Square):
        return attack.n_queries, 0
    if isinstance(attack, PGD):
        return 1, attack.steps * attack.restarts
    if isinstance(attack, APGD):
        return 1, attack.steps * max(1, attack.n_targets) * attack.restarts
    if isinstance(attack, DDN | FMN):
        return attack.steps / 8, attack.steps
    assert isinstance(attack, Strongest)
    targets = attack.n_targets * (GIVEN_UP if attack.give_up else 1.0)
    return attack.n_queries, 11 + attack.steps * (4 + targets)


def trimmed(
    steps: Sequence[Step], cost: Mapping[int, float], limit: float, others: Mapping[str, float]
) -> tuple[list[Step], list[str]]:
    """Leave parts out in the order of `TRIMMED` until the rest takes at most `limit` seconds.

    Parameters
    ----------
    steps : sequence of Step
    cost : mapping of int to float
        Seconds of each step, by its place. What costs nothing is computed already, and stays.
    limit : float
    others : mapping of str to float
        Seconds of the parts that are no attacks: "certificates", "self-tests".

    Returns
    -------
    list of Step, list of str
        What stays of the steps, and of the others. The clean images, noise, the single step and PGD
        always stay.
    """
    left = dict(enumerate(steps))
    kept = dict(others)
    for part in TRIMMED:
        if sum(cost[place] for place in left) + sum(kept.values()) <= limit:
            break
        if kept.get(part):
            del kept[part]
        left = {place: step for place, step in left.items() if step.part != part or not cost[place]}
    return list(left.values()), list(kept)
