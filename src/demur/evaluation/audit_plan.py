"""The plan of an audit: its attacks in their order, what they cost, and what is left out first."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from demur.attacks import (
    FGM,
    FGSM,
    PGD,
    AnyError,
    Attack,
    ForceReject,
    RandomNoise,
    Square,
    Strongest,
    WithBPDA,
    WithWiderKernels,
)
from demur.attacks.strongest import PROFILES as ENSEMBLES
from demur.attacks.strongest import WIDER
from demur.errors import DemurError, unknown
from demur.evaluation.nodes import ModelNode
from demur.evaluation.on_images import Evaluate
from demur.evaluation.selftests.budget import Budget
from demur.threat import ThreatModel

SWEEP: Final = (0.5, 2.0, 4.0, math.inf)
"""The sweep attacks at these multiples of eps, beside eps itself."""


@dataclass(frozen=True)
class Profile:
    """How much an audit spends.

    Parameters
    ----------
    noise : int
        Draws of random noise for each image.
    steps, restarts : int
        Of PGD.
    ensemble : Strongest
    sweep : int
        Steps of PGD at the other sizes.
    bpda : bool
        Whether operations without useful gradients are attacked straight through (BPDA).
    tests : Budget
        Of the self-tests.
    methods : tuple of str
        Of certificates, where they are asked for.
    """

    noise: int
    steps: int
    restarts: int
    ensemble: Strongest
    sweep: int
    tests: Budget
    bpda: bool = False
    methods: tuple[str, ...] = ("ibp", "crown-ibp")


PROFILES: Final[Mapping[str, Profile]] = {
    "quick": Profile(10, 10, 1, ENSEMBLES["quick"], 10, Budget((8, 199), (100, 20), (10, 50), 50)),
    "standard": Profile(
        100, 40, 2, ENSEMBLES["standard"], 20, Budget((64, 499), (1000, 50), (50, 200), 200)
    ),
    "thorough": Profile(
        *(1000, 100, 5, ENSEMBLES["thorough"], 40),
        Budget((512, 999), (10_000, 100), (100, 1000), 1000),
        bpda=True,
        methods=("ibp", "crown-ibp", "crown"),
    ),
}


@dataclass(frozen=True)
class Target:
    """What is audited.

    Parameters
    ----------
    model : ModelNode
        The model whose decisions are recorded.
    attacked : ModelNode
        The model that attacks with gradients see: `model`, or its mean over several draws where it
        is randomised.
    images : ImageSource
    rejects : bool
        Whether the model has a reject column.
    undefended : ModelNode, optional
        The model without its rejection: the defence-unaware attacker attacks it.
    base : ModelNode, optional
        Another model, from which attacks are transferred.
    suspicious : bool, default False
        Whether the model contains operations without useful gradients.
    gradients : bool, default True
        Whether the model has gradients. One without meets only attacks that need scores.
    kernels : bool, default False
        Whether the model has kernel machines, whose gradients are zero far from the data.
    """

    model: ModelNode
    attacked: ModelNode
    images: Any
    rejects: bool
    undefended: ModelNode | None = None
    base: ModelNode | None = None
    suspicious: bool = False
    gradients: bool = True
    kernels: bool = False


@dataclass(frozen=True)
class Step:
    """One attack of the plan.

    Parameters
    ----------
    part : str
        What it is for: "clean", "noise", "single step", "PGD", "ensemble", "sweep", "force reject",
        "defence-unaware", "transfer" or "BPDA".
    threat : ThreatModel or None
        The threat of the audit that it belongs to; None for the clean images.
    node : Evaluate
    """

    part: str
    threat: ThreatModel | None
    node: Evaluate


def profile_named(name: str) -> Profile:
    """Give a profile, or raise DemurError for an unknown name."""
    if name not in PROFILES:
        raise unknown("profile", name, PROFILES)
    return PROFILES[name]


def plan(
    target: Target,
    threats: Sequence[ThreatModel],
    profile: Profile,
    *,
    seed: int = 0,
    batch_size: int | None = None,
) -> list[Step]:
    """List the attacks of an audit.

    Parameters
    ----------
    target : Target
    threats : sequence of ThreatModel
        Different threats, with the goal `Evade`.
    profile : Profile
    seed : int, default 0
    batch_size : int, optional

    Returns
    -------
    list of Step
        The clean images first.

    Raises
    ------
    DemurError
        If two threats are the same.
    """
    if len({str(one) for one in threats}) < len(threats):
        said = ", ".join(map(str, threats))
        raise DemurError(f"each threat is given once, not {said}.")
    common: dict[str, Any] = {"seed": seed, "base": target.base or target.undefended}
    common["batch_size"] = batch_size
    maker = _Maker(target, profile, common)
    found = [Step("clean", None, Evaluate(target.model, target.images, None, **common))]
    given = {str(one) for one in threats}
    for threat in threats:
        steps = list(maker.steps(threat, given))
        found += steps
        given |= {str(step.node.threat) for step in steps if step.part == "sweep"}
    return found


@dataclass(frozen=True)
class _Maker:
    target: Target
    profile: Profile
    common: Mapping[str, Any]

    def steps(self, threat: ThreatModel, given: set[str]) -> Iterator[Step]:
        """Give the attacks at a threat."""
        profile = self.profile
        if threat.eps is None:
            yield self._step("ensemble", threat, profile.ensemble, "strongest")
            return
        descent = PGD(steps=profile.steps, restarts=profile.restarts)
        yield self._step("noise", threat, RandomNoise(draws=profile.noise))
        if self.target.gradients:
            yield self._step("single step", threat, _single_step(threat.norm))
            yield self._step("PGD", threat, descent)
        if self.target.gradients or threat.norm in Square.norms:
            yield self._step("ensemble", threat, profile.ensemble, "strongest")
        if profile.bpda and self.target.suspicious:
            yield self._step("BPDA", threat, WithBPDA(profile.ensemble))
        yield from self._sent(threat)
        if not self.target.gradients:
            return
        if self.target.rejects:
            wanted = replace(threat, goal=ForceReject())
            yield self._step("force reject", threat, descent, within=wanted)
        for other in _sizes(threat):
            if str(other) not in given:
                attack = PGD(steps=profile.sweep)
                yield self._step("sweep", threat, attack, within=other, keep="nothing")
                if self.target.kernels and other.eps == math.inf:
                    # Far from all support vectors, a kernel machine is flat (R20).
                    wide = WithWiderKernels(attack, WIDER[-1])
                    yield self._step("sweep", threat, wide, within=other, keep="nothing")

    def _sent(self, threat: ThreatModel) -> Iterator[Step]:
        """Give the attacks on other models, whose images are sent to this one."""
        surest = PGD(steps=self.profile.steps, loss="cross_entropy", keep_maximizing=True)
        any_error = replace(threat, goal=AnyError())
        others = (("defence-unaware", self.target.undefended), ("transfer", self.target.base))
        for part, other in others:
            if other is None:
                continue
            node = Evaluate(
                other,
                self.target.images,
                any_error,
                surest,
                through=self.target.model,
                attacker="defence-unaware",
                keep="broken",
                **self.common,
            )
            yield Step(part, threat, node)

    def _step(
        self,
        part: str,
        threat: ThreatModel,
        attack: Attack,
        attacker: str = "defence-aware",
        within: ThreatModel | None = None,
        keep: Any = "broken",
    ) -> Step:
        target = self.target
        through = None if target.attacked is target.model else target.model
        node = Evaluate(
            target.attacked,
            target.images,
            within or threat,
            attack,
            through=through,
            attacker=attacker,
            keep=keep,
            **self.common,
        )
        return Step(part, threat, node)


def _single_step(norm: str) -> Attack:
    return {"linf": FGSM(), "l2": FGM()}.get(norm, PGD(steps=1))


def _sizes(threat: ThreatModel) -> list[ThreatModel]:
    """Give the other sizes of the sweep."""
    assert isinstance(threat.eps, float)
    if not 0 < threat.eps < math.inf:
        return []
    largest = 1.0 if threat.norm == "linf" else math.inf
    sizes = [times * threat.eps for times in SWEEP]
    return [replace(threat, eps=eps) for eps in sizes if math.isinf(eps) or eps <= largest]
