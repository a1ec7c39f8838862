"""The self-tests of an audit that compute: each on a sample of the images."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import torch

from demur import seeds
from demur.attacks import APGD, PGD, RandomNoise
from demur.data.image_source import ImageSource
from demur.evaluation.audit_plan import Profile, Target
from demur.evaluation.on_images import Evaluate
from demur.evaluation.selftests import (
    Binarization,
    Constancy,
    Convergence,
    SelfTest,
    Stability,
)
from demur.evaluation.selftests.binarization import NORMS
from demur.threat import ThreatModel

ENOUGH: Final = 256
"""Images at most that are asked again after the attacks."""


@dataclass(frozen=True)
class TestStep:
    """A self-test of the plan.

    Parameters
    ----------
    name : str
        "doubling", "noise", "twin", "unstable predictions", "optimisation", "binarization" or
        "hidden state".
    threat : ThreatModel or None
        The threat of the audit that it belongs to; None for those of the model alone.
    node : Evaluate or SelfTest
    rows : tuple of int
        The places of its images in those of the audit.
    """

    __test__ = False  # no test of pytest

    name: str
    threat: ThreatModel | None
    node: Evaluate | SelfTest
    rows: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class First:
    """What the handshake saw first: images, and the decision on each."""

    images: ImageSource
    decisions: tuple[int, ...]


def self_tests_of(
    target: Target,
    threats: Sequence[ThreatModel],
    profile: Profile,
    first: First,
    *,
    randomised: bool,
    seed: int = 0,
    batch_size: int | None = None,
) -> list[TestStep]:
    """List the self-tests that compute.

    Parameters
    ----------
    target : Target
    threats : sequence of ThreatModel
    profile : Profile
    first : First
    randomised : bool
        Such a model is not compared with itself.
    seed : int, default 0
    batch_size : int, optional

    Returns
    -------
    list of TestStep
        Those that can be applied. The one that looks for hidden state is last: it asks again after
        all attacks.
    """
    maker = _Maker(target, profile, seed, batch_size)
    found = [maker.stability()]
    for threat in threats:
        if isinstance(threat.eps, float) and threat.eps < float("inf"):
            found += maker.at(threat, randomised)
    if not randomised:
        count = min(ENOUGH, len(first.images))
        images = first.images.subset(range(count))
        node = SelfTest(Constancy(first.decisions[:count]), target.model, images, seed, batch_size)
        found.append(TestStep("hidden state", None, node, ()))
    return found


@dataclass(frozen=True)
class _Maker:
    target: Target
    profile: Profile
    seed: int
    batch_size: int | None

    def rows(self, count: int) -> tuple[int, ...]:
        """Draw some of the images. A smaller sample is the beginning of a larger one."""
        order = torch.randperm(
            len(self.target.images), generator=seeds.generator(self.seed, "self-tests")
        )
        return tuple(order[:count].tolist())

    def stability(self) -> TestStep:
        """Make the test of unstable predictions."""
        draws, count = self.profile.tests.stability
        return self._test("unstable predictions", None, Stability(draws), count)

    def at(self, threat: ThreatModel, randomised: bool) -> Iterator[TestStep]:
        """Make the tests at a threat with an eps."""
        tests = self.profile.tests
        draws, count = tests.noise
        yield self._attack("noise", threat, RandomNoise(draws=draws), count)
        if not self.target.gradients:
            return
        steps = self.profile.ensemble.steps
        walk: APGD | PGD = APGD(steps=steps)
        if threat.norm not in APGD.norms:
            walk = PGD(steps=steps, random_start=True)
        double = replace(walk, steps=2 * steps, restarts=2)
        yield self._attack("doubling", threat, double, tests.doubling)
        twin = self.target.base or self.target.undefended
        if twin is not None:
            same = PGD(steps=self.profile.steps, restarts=self.profile.restarts)
            yield self._attack("twin", threat, same, tests.doubling, twin)
        if randomised:
            return
        yield self._test("optimisation", threat, Convergence(walk, threat), tests.doubling)
        if threat.norm in NORMS:
            count, points = tests.binarization
            # Square gets as many queries as there are points: the gradients are tested.
            attack = replace(self.profile.ensemble, n_queries=points)
            probe = Binarization(attack, threat, points)
            yield self._test("binarization", threat, probe, count)

    def _test(self, name: str, threat: ThreatModel | None, probe: Any, count: int) -> TestStep:
        rows = self.rows(count)
        images = self.target.images.subset(rows)
        node = SelfTest(probe, self.target.model, images, self.seed, self.batch_size)
        return TestStep(name, threat, node, rows)

    def _attack(
        self, name: str, threat: ThreatModel, attack: Any, count: int, on: Any = None
    ) -> TestStep:
        rows = self.rows(count)
        target = self.target
        attacked = on or target.attacked
        through = target.model if on is None and attacked is not target.model else None
        node = Evaluate(
            attacked,
            target.images.subset(rows),
            threat,
            attack,
            through=through,
            attacker="defence-aware",
            seed=self.seed,
            batch_size=self.batch_size,
            base=target.base or target.undefended,
            self_test=name,
        )
        return TestStep(name, threat, node, rows)
