"""What the conclusion of the rejection paper leaves open, measured."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from demur import seeds
from demur.attacks import PGD, Attack, Strongest, WithWiderKernels
from demur.attacks.strongest import WIDER
from demur.data import ImageSet
from demur.errors import DemurError
from demur.evaluation.nodes import Node, Train
from demur.evaluation.on_images import Evaluate
from demur.evaluation.tables import Case
from demur.networks import dnr_cnn
from demur.studies.material import describe_parts, gather_part
from demur.studies.neural_rejection.attackers import DoubleStart
from demur.studies.neural_rejection.recipes import LAYERS, NetworkTraining
from demur.studies.rejection_extensions.generator import AdvGAN
from demur.studies.rejection_extensions.profile import Profile
from demur.studies.rejection_extensions.recipes import ALL_LAYERS, Grid, Machines, Made
from demur.studies.rejection_extensions.tables import show
from demur.studies.study import Study
from demur.threat import ThreatModel

TITLE = "Neural rejection, its conclusion"
SOURCE = "Thanthulage 2020, section 4: what the paper leaves to future work"
NETWORK = "DNN"


@dataclass(frozen=True)
class Material:
    """The images: none is in two of the sets."""

    train: ImageSet
    validation: ImageSet
    known: ImageSet
    attacked: ImageSet


def plan(profile: Profile, data_root: Path | None, seed: int) -> Study:
    """Load the images, and say what is to be computed.

    Raises
    ------
    DemurError
        If the data is missing, or the profile does not fit it.
    """
    every = profile.model_copy(update={"train_images": None})
    part = gather_part(every, profile.attack.images, data_root, seed)
    known = profile.generator.images
    wanted = profile.train_images + profile.validation_images + known
    if wanted > len(part.train):
        raise DemurError(
            f"train_images, validation_images and generator.images are {wanted} together: more "
            f"than the {len(part.train)} images that {part.train.name} has for them."
        )
    chosen = part.train.sample(wanted, seeds.derive(seed, "chosen"))
    rest, apart = chosen.split(known / wanted, seeds.derive(seed, "known"))
    share = profile.validation_images / len(rest)
    train, validation = rest.split(share, seeds.derive(seed, "validation"))
    train.balanced(max(profile.per_class, profile.search.per_class), seed)
    dnr_cnn(train.num_classes, channels=train.image_shape[0], size=part.size)
    images = part.test.sample(profile.attack.images, seeds.derive(seed, "attacked"))
    given = Material(train, validation, apart, images)
    models = _models(profile, given, seed)
    cases = [case for model in models.values() for case in _attacked(profile, given, model, seed)]
    cases += _densities(profile, given, models, seed)
    # The models are nodes too: what the grid search chose is a measurement of its model.
    nodes: list[Node] = [*models.values(), *(case.node for case in cases)]
    stored = tuple(case.node for case in cases if case.node.keep == "stored")
    return Study(
        nodes=tuple(nodes),
        data=describe_parts([part], None),
        taken=f"Data: {part.taken}.",
        show=partial(show, profile, cases),
        gallery=stored,
        pictures=profile.gallery,
    )


def _models(profile: Profile, given: Material, seed: int) -> Mapping[str, Train]:
    """All models, by name."""
    train = partial(Train, data=given.train, seed=seed)
    network = train(
        NetworkTraining(profile.epochs, profile.batch_size, profile.learning_rate), name=NETWORK
    )
    common: dict[str, Any] = {
        "per_class": profile.per_class,
        "C": profile.C,
        "gamma": profile.gamma,
        "false_rejection_rate": profile.false_rejection,
    }
    deep = Machines(tuple(LAYERS), **common)
    search = profile.search
    generator = Made(
        AdvGAN(given.known, profile.generator.epochs),
        ThreatModel("l2", profile.attack.eps),
        1,
        profile.per_class * given.train.num_classes // 2,
    )
    recipes = {
        "DNR, layers 5, 7 and 8": deep,
        **{f"NR, {name}": replace(deep, layers=(layer,)) for layer, name in LAYERS.items()},
        "DNR, all layers": replace(deep, layers=tuple(ALL_LAYERS)),
        "DNR, C and gamma searched": replace(
            deep, grid=Grid(search.per_class, search.C, search.gamma)
        ),
    }
    for rounds in profile.generator.rounds:
        name = f"DNR, generator, {rounds} round{'s' * (rounds > 1)}"
        recipes[name] = replace(deep, made=replace(generator, rounds=rounds))
    rejecting = {
        name: train(recipe, validation=given.validation, base=network, name=name)
        for name, recipe in recipes.items()
    }
    return {NETWORK: network, **rejecting}


def _attacked(profile: Profile, given: Material, model: Train, seed: int) -> list[Case]:
    """The attackers of a model: on the network, on the whole, by a generator, and all of them."""
    attack = profile.attack
    threat = ThreatModel("l2", attack.eps)
    network = model.base or model
    on = partial(Evaluate, model, given.attacked, seed=seed, base=network)
    unaware = partial(Evaluate, network, given.attacked, seed=seed, base=network)
    descent: Attack = PGD(steps=attack.steps)
    sent = PGD(steps=attack.steps, keep_maximizing=True)
    if model.base is not None:
        # Away from known images the kernels are flat: wider ones still point the way.
        descent = WithWiderKernels(descent, WIDER[0])
    ensemble = Strongest(attack.ensemble_steps, attack.n_queries, attack.n_targets)
    generator = AdvGAN(given.known, profile.generator.epochs)
    return [
        Case(on(None), {"line": ""}),
        Case(
            unaware(threat, sent, through=model, attacker="defence-unaware"), {"line": "PGD, sent"}
        ),
        Case(on(threat, descent, attacker="defence-aware", keep="stored"), {"line": "PGD"}),
        Case(on(threat, generator, attacker="defence-aware"), {"line": "generator"}),
        Case(on(threat, ensemble, attacker="strongest"), {"line": "ensemble"}),
    ]


def _densities(
    profile: Profile, given: Material, models: Mapping[str, Train], seed: int
) -> list[Case]:
    """The attack with a density term, at each weight, on the paper's two rejections."""
    attack = profile.attack
    threat = ThreatModel("l2", attack.eps)
    descent = PGD(steps=attack.steps)
    found = []
    for name in ("NR, layer 8", "DNR, layers 5, 7 and 8"):
        model = models[name]
        on = partial(Evaluate, model, given.attacked, threat, seed=seed, base=model.base)
        plain = DoubleStart(replace(descent, restarts=2), given.validation)
        lines = {"0": plain} | {
            f"{weight:g}": replace(plain, term="density", weight=weight)
            for weight in attack.densities
        }
        found += [
            Case(on(attack=one, attacker="defence-aware"), {"line": f"density {line}"})
            for line, one in lines.items()
        ]
    return found
