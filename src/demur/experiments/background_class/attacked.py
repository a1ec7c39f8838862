"""Attacks on the models of the background-class experiment: the attackers, their results, and the two curves."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from torch import Tensor

from demur import attacks
from demur.attacks import FGM, FGSM, PGD, AnyError, AttackResult, Evade, ForceReject, RandomNoise
from demur.classifier import Classifier, outcomes
from demur.data import ImageSet, to_float
from demur.evaluation import NodeResult, offset_for, security_curve, shifted
from demur.evaluation.results import Curve
from demur.evaluation.shares import series
from demur.evaluation.store import Computed
from demur.experiments.background_class.profile import Profile
from demur.experiments.cells import Run, passes
from demur.files import digest
from demur.goals import Goal, Loss
from demur.metrics import Rates, rates
from demur.threat import ThreatModel

PLAIN, DEFENDED = "Digits", "Digits + background"
PGD_STEPS = 40
ATTACK_WORK = 6.0  # a float32 attack on an image, against training on it once in bfloat16

NAIVE, FORCING, NOISE = "naive", "forcing rejection", "noise"
AWARE, AWARE_BY_ENTROPY = "reject-aware, margin", "reject-aware, cross-entropy"
GOALS: dict[str, tuple[Goal, Loss]] = {
    # The paper's attacker uses the cross-entropy of the true class and ignores the reject column.
    NAIVE: (AnyError(), "cross_entropy"),
    AWARE: (Evade(), "margin"),
    AWARE_BY_ENTROPY: (Evade(), "cross_entropy"),
    FORCING: (ForceReject(), "margin"),
    NOISE: (Evade(), "margin"),
}
"""The goal and the loss of each attacker."""


@dataclass(frozen=True)
class Attack:
    """One attack of Tables IV and V, by one attacker."""

    name: str
    norm: Literal["linf", "l2"]
    eps: float
    attacker: str
    draws: int = 0
    steps: int = 1

    @property
    def label(self) -> str:
        """As the tables name it."""
        return f"{self.name} eps {self.eps:g}, " + (
            f"best of {self.draws} draws" if self.draws else self.attacker
        )

    @property
    def work(self) -> float:
        """How much it costs, against one step: images leave as soon as they are solved."""
        return max(1.0, self.steps / 8)

    def __call__(
        self, classifier: Classifier, images: Tensor, labels: Tensor, seed: int
    ) -> AttackResult:
        """Attack images (N, C, H, W) in [0, 1]."""
        goal, _ = GOALS[self.attacker]
        threat = ThreatModel(self.norm, self.eps, goal)
        return self.attack(classifier, images, labels, threat, seed=seed)

    @property
    def attack(self) -> attacks.Attack:
        """The attack of the library."""
        _, loss = GOALS[self.attacker]
        if self.draws:
            return RandomNoise(draws=self.draws)
        if self.steps > 1:
            return PGD(steps=self.steps, loss=loss)
        return FGSM(loss=loss) if self.norm == "linf" else FGM(loss=loss)


@dataclass(frozen=True)
class Trained:
    """A trained model, the key of its cell, and its outcomes on the clean test images."""

    classifier: Classifier
    key: str
    clean: Tensor


def attack_list(profile: Profile, model: str) -> list[Attack]:
    """The attacks of Tables IV and V on a model, by all attackers; one in many steps (R11), and noise, of the same sizes (R13)."""
    attackers = [NAIVE, AWARE, AWARE_BY_ENTROPY, *([FORCING] if model == DEFENDED else [])]
    return [
        *(Attack("FGS", "linf", profile.fgs_eps, attacker) for attacker in attackers),
        *(Attack("FG", "l2", profile.fg_eps, attacker) for attacker in attackers),
        Attack("PGD", "linf", profile.fgs_eps, AWARE, steps=PGD_STEPS),
        Attack("PGD", "l2", profile.fg_eps, AWARE, steps=PGD_STEPS),
        Attack("noise", "linf", profile.fgs_eps, NOISE, profile.noise_draws),
        Attack("noise", "l2", profile.fg_eps, NOISE, profile.noise_draws),
    ]


def attack_cell(
    model: Trained, attack: Attack, images: ImageSet, seed: int, name: str, run: Run
) -> NodeResult:
    """Attack a model: the images that the attacker would send, as 8 bits store them, and what became of them."""

    def compute(_: Path) -> Computed:
        clean = images.to_float()
        result = attack(model.classifier, clean, images.labels, seed)
        stored = attacks.quantize_towards(result.candidates, clean)
        sizes = attacks.sizes(clean, result.candidates)
        values = {
            **passes(result),
            "sizes": {norm: float(size.mean()) for norm, size in sizes.items()},
        }
        return values, {
            "images": stored,
            "success": result.success,
            "outcomes": outcomes(model.classifier, result.candidates, images.labels),
            "stored_outcomes": outcomes(model.classifier, to_float(stored), images.labels),
        }

    config = {
        "cell": "attack",
        "model": model.key,
        "attack": (
            attack.name,
            attack.norm,
            attack.eps,
            attack.attacker,
            attack.draws,
            attack.steps,
        ),
        "images": images.fingerprint,
        "seed": seed if attack.draws else None,
    }
    return run.cell(
        f"{attack.label}, on {name}", config, compute, ATTACK_WORK * attack.work * len(images)
    )


def curve_against_eps(
    profile: Profile, models: dict[str, Trained], images: ImageSet, seed: int, run: Run
) -> Curve:
    """The three outcomes under FGS against eps, for each model and attacker."""
    lines = []
    for name, model in models.items():
        for attacker in (NAIVE, AWARE):

            def outcomes_at(
                eps: float, name: str = name, model: Trained = model, attacker: str = attacker
            ) -> Tensor:
                attack = Attack("FGS", "linf", eps, attacker)
                return attack_cell(model, attack, images, seed, f"{name}, curve", run).tensors[
                    "outcomes"
                ]

            lines.append(
                series(f"{name}, {attacker}", security_curve(outcomes_at, profile.curve.eps).rates)
            )
    note = f"Outcomes of {len(images):,} attacked test images of the first split."
    return Curve(
        "Outcomes under FGS against eps",
        "eps (Linf)",
        list(profile.curve.eps),
        lines,
        note,
    )


def curve_against_rejection(
    profile: Profile, model: Trained, images: ImageSet, validation: ImageSet, seed: int, run: Run
) -> Curve:
    """The three outcomes as the reject score is raised, so that more clean images are falsely rejected (R21).

    The offset is set on clean validation images that are neither trained on nor attacked (R17), and the attackers know it.
    """
    lines: dict[str, list[Rates]] = {"clean images": [], NAIVE: [], AWARE: []}
    for rate in profile.curve.rejected:
        offset = offset_for(model.classifier, validation.to_float(), rate)
        moved = replace(
            model, classifier=shifted(model.classifier, offset), key=digest(model.key, repr(offset))
        )
        lines["clean images"].append(
            rates(outcomes(moved.classifier, images.to_float(), images.labels))
        )
        for attacker in (NAIVE, AWARE):
            attack = Attack("FGS", "linf", profile.fgs_eps, attacker)
            cell = attack_cell(
                moved, attack, images, seed, f"{DEFENDED} at {100 * rate:g} % rejection", run
            )
            lines[attacker].append(rates(cell.tensors["outcomes"]))
    drawn = [
        series(name if name == "clean images" else f"FGS, {name}", line)
        for name, line in lines.items()
    ]
    percent = [round(100 * rate, 10) for rate in profile.curve.rejected]
    note = (
        f"{DEFENDED}, with a constant added to the reject score. The constant is set on "
        f"{len(validation):,} other clean test images, so that the given percentage of those is "
        f"rejected. Outcomes are of {len(images):,} test images of the first split; the first panel "
        "shows them without an attack."
    )
    return Curve(
        "Outcomes against false rejection", "other clean images rejected (%)", percent, drawn, note
    )
