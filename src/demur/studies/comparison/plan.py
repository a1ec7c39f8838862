"""The defence of each paper, and several of them combined, on the same network and images."""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from pydantic import Field

from demur import seeds
from demur.attacks import PGD, AnyError, Strongest
from demur.data import ImageSet
from demur.errors import DemurError
from demur.evaluation.nodes import Train
from demur.evaluation.on_images import Evaluate
from demur.evaluation.plan import Outputs
from demur.evaluation.shares import ATTACKED_BY, FRONT
from demur.evaluation.tables import by_attacker, lookup, outcome_table
from demur.studies.comparison.recipes import AttackedTraining, Machines
from demur.studies.fields import Count, Names, Strict
from demur.studies.material import Part, describe_parts, gather_part
from demur.studies.recipes import SmallNetwork
from demur.studies.reported import read_texts
from demur.studies.study import Shown, Study
from demur.threat import ThreatModel

TITLE = "All defences on the same images"
SOURCE = "the four papers, each defence on the same network"
COMBINED = "Gaussian blur, deep neural rejection and background class"
LAYERS = ("7", "11")
"""Of the network: the rectifier after the pooling, and the one after the dense layer."""


class AttackProfile(Strict):
    """How all models are attacked: in Linf, within `eps`."""

    images: Count
    eps: float = Field(gt=0, le=1, allow_inf_nan=False)
    steps: Count
    ensemble_steps: Count
    n_targets: Count
    n_queries: Count


class Profile(Strict):
    """The scale of the comparison."""

    data: Names = Field(min_length=1)
    train_images: int | None = Field(None, ge=1)
    epochs: Count
    batch_size: int = Field(64, ge=2)
    attacked_epochs: Count
    attack_steps: Count
    box: int = Field(ge=1)
    made_per_kind: Count
    per_class: int = Field(ge=5)
    C: float = Field(10.0, gt=0, allow_inf_nan=False)
    false_rejection: float = Field(0.02, ge=0, lt=1)
    sigma: float = Field(1.5, gt=0, allow_inf_nan=False)
    attack: AttackProfile
    gallery: int = Field(48, ge=0)


@dataclass(frozen=True)
class Material:
    """The images: to train on, to set thresholds on, and to attack."""

    part: Part[Profile]
    train: ImageSet
    validation: ImageSet
    images: ImageSet


def gathered(profile: Profile, data_root: Path | None, seed: int) -> Material:
    """Load the images. Raise DemurError if the data is missing, or the profile does not fit it."""
    part = gather_part(profile, profile.attack.images, data_root, seed)
    if profile.box > part.size:
        raise DemurError(
            f"a box of {profile.box} pixels a side does not lie in the images of "
            f"{part.train.name}, {part.size}x{part.size}."
        )
    train, validation = part.train.split(0.15, seeds.derive(seed, "validation"))
    train.balanced(profile.per_class, seed)
    images = part.test.sample(profile.attack.images, seeds.derive(seed, "attacked"))
    return Material(part, train, validation, images)


def plan(profile: Profile, data_root: Path | None, seed: int) -> Study:
    """Load the images, and say what is to be computed.

    Raises
    ------
    DemurError
        If the data is missing, or the profile does not fit it.
    """
    given = gathered(profile, data_root, seed)
    models = _models(profile, given.train, given.validation, seed)
    nodes = [
        node
        for model in models
        for node in _attacked(profile, model, models[0], given.images, seed)
    ]
    return Study(
        nodes=tuple(nodes),
        gallery=tuple(node for node in nodes if node.attacker == "defence-aware"),
        pictures=profile.gallery,
        data=describe_parts([given.part], None),
        taken=f"Data: {given.part.taken}.",
        show=partial(_show, profile),
    )


def _models(profile: Profile, train: ImageSet, validation: ImageSet, seed: int) -> list[Train]:
    """All models; the first one has no defence."""
    plain = SmallNetwork(profile.epochs, profile.batch_size)
    background = replace(plain, backgrounds=profile.made_per_kind)
    attacked = AttackedTraining(
        replace(plain, epochs=profile.attacked_epochs),
        PGD(steps=profile.attack_steps, random_start=True),
        ThreatModel("linf", profile.attack.eps),
    )
    machines = Machines(LAYERS, profile.per_class, profile.C, profile.false_rejection)
    inner = tuple(f"module.network.{layer}" for layer in LAYERS)
    combined = replace(machines, layers=inner, combined=True)
    undefended = Train(plain, train, seed, name="no defence")
    blurred = replace(background, sigma=profile.sigma)
    both = Train(blurred, train, seed, name="Gaussian blur and background class")
    return [
        undefended,
        Train(background, train, seed, name="background class"),
        Train(
            replace(attacked, box=profile.box), train, seed, name="localized adversarial training"
        ),
        Train(machines, train, seed, validation, undefended, name="deep neural rejection"),
        Train(replace(plain, sigma=profile.sigma), train, seed, name="Gaussian blur"),
        Train(combined, train, seed, validation, both, name=COMBINED),
        Train(attacked, train, seed, name="adversarial training"),
    ]


def _attacked(
    profile: Profile, model: Train, plain: Train, images: ImageSet, seed: int
) -> list[Evaluate]:
    """The four attackers of a model."""
    attack = profile.attack
    descent = PGD(steps=attack.steps)
    surest = replace(descent, loss="cross_entropy", keep_maximizing=True)
    ensemble = Strongest(
        steps=attack.ensemble_steps, n_queries=attack.n_queries, n_targets=attack.n_targets
    )
    threat = ThreatModel("linf", attack.eps)
    any_error = replace(threat, goal=AnyError())
    on = partial(Evaluate, seed=seed, base=plain)
    return [
        on(model, images, None),
        on(plain, images, any_error, surest, through=model, attacker="defence-unaware"),
        on(model, images, threat, descent, attacker="defence-aware", keep="stored"),
        on(model, images, threat, ensemble, attacker="strongest"),
    ]


def _show(profile: Profile, outputs: Outputs) -> Shown:
    texts = read_texts("comparison")
    records = outputs.records()
    note = texts["front"].format(attack=profile.attack)
    table = outcome_table(FRONT, by_attacker(records), note=note)
    of = lookup(table)
    summary = [
        texts["model"].format(
            name=name, eps=profile.attack.eps, clean=of[ATTACKED_BY[0]][name], worst=worst
        )
        for name, worst in of[ATTACKED_BY[-1]].items()
    ]
    return Shown([table], summary=summary)
