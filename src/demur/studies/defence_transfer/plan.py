"""Every defence against images crafted on every other one, and the defences nested in pairs."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from demur.attacks import APGD, PGD, Attack, Strongest, WithWiderKernels
from demur.attacks.strongest import WIDER
from demur.evaluation.nodes import Node, Train
from demur.evaluation.on_images import Evaluate
from demur.evaluation.tables import Case
from demur.studies.comparison.plan import LAYERS, Material, gathered
from demur.studies.comparison.recipes import AttackedTraining
from demur.studies.defence_transfer.designs import (
    BASELINE,
    DEFENCES,
    PLAIN,
    Design,
    Pair,
    pairs_of,
)
from demur.studies.defence_transfer.profile import Profile
from demur.studies.defence_transfer.recipes import Rejection, ThroughBox, TwoFilters
from demur.studies.defence_transfer.tables import show
from demur.studies.material import describe_parts
from demur.studies.recipes import SmallNetwork
from demur.studies.study import Study
from demur.threat import ThreatModel

TITLE = "Defences against the attacks on others, and in pairs"
SOURCE = "the four papers: transferred attacks, and combinations that no paper measures"


def plan(profile: Profile, data_root: Path | None, seed: int) -> Study:
    """Load the images, and say what is to be computed.

    Raises
    ------
    DemurError
        If the data is missing, or the profile does not fit it.
    """
    given = gathered(profile, data_root, seed)
    filtered = _network(profile, Design(median=True, gaussian=True))
    assert isinstance(filtered, SmallNetwork)
    # Filters that do not fit the images are refused here.
    filtered.untrained(given.train, seed).scores(given.images.to_float(torch.tensor([0])))
    pairs = pairs_of(profile.defences)
    designs = designs_of(profile, pairs)
    models = models_of(profile, given, designs, seed)
    singles = [name for name in models if name not in {pair.name for pair in pairs}]
    cases = []
    for name, model in models.items():
        design = designs.get(name, Design())
        clean = Evaluate(model, given.images, None, seed=seed, base=models[PLAIN])
        cases.append(Case(clean, {"crafted": ""}))
        known = _aware(profile, given, model, models[PLAIN], design, seed)
        cases += [Case(node, {"crafted": name}) for node in known]
        if name in singles:
            cases += [
                Case(sent(node, other), {"crafted": name})
                for node in known[:2]
                for other in models.values()
                if other is not model
            ]
    # The models are nodes too: the share that each rejects of the validation images is measured.
    nodes: list[Node] = [*models.values(), *(case.node for case in cases)]
    return Study(
        nodes=tuple(nodes),
        data=describe_parts([given.part], None),
        taken=f"Data: {given.part.taken}.",
        show=partial(show, profile, cases, singles, pairs),
        gallery=tuple(
            case.node
            for case in cases
            if case.node.attacker == "defence-aware" and case.node.keep != "nothing"
        ),
        pictures=profile.gallery,
    )


def designs_of(profile: Profile, pairs: list[Pair]) -> dict[str, Design]:
    """Give the designs of all models that reject, by name: baseline, single defences, pairs."""
    singles = {name: DEFENCES[name] for name in DEFENCES if name in profile.defences}
    return {BASELINE: Design(), **singles, **{pair.name: pair.design for pair in pairs}}


def models_of(
    profile: Profile, given: Material, designs: Mapping[str, Design], seed: int
) -> dict[str, Train]:
    """Give all models, the undefended one first. A network is trained once for all its models."""
    train = partial(Train, data=given.train, seed=seed)
    networks: dict[Design, Train] = {}
    models = {}
    for name, design in {PLAIN: Design(), **designs}.items():
        if design.network not in networks:
            label = f"network of {name}" if networks else PLAIN
            networks[design.network] = train(_network(profile, design.network), name=label)
        network = networks[design.network]
        layers = {"deep": LAYERS, "single": LAYERS[-1:]}
        machines = tuple(layers[kind] for kind in design.machines)
        recipe = Rejection(machines, profile.per_class, profile.C, profile.false_rejection)
        models[name] = (
            network
            if name == PLAIN
            else train(recipe, validation=given.validation, base=network, name=name)
        )
    return models


def _network(profile: Profile, design: Design) -> SmallNetwork | AttackedTraining:
    """How the network of a design is trained, with its filters."""
    kind = TwoFilters if design.median and design.gaussian else SmallNetwork
    plain = kind(
        profile.epochs,
        profile.batch_size,
        profile.made_per_kind if design.background else 0,
        profile.sigma if design.gaussian else None,
        profile.window if design.median else None,
    )
    if not design.attacked:
        return plain
    return AttackedTraining(
        replace(plain, epochs=profile.attacked_epochs),
        PGD(steps=profile.attack_steps, random_start=True),
        ThreatModel("linf", profile.attack.eps),
        profile.box if design.attacked == "around" else None,
    )


def _aware(
    profile: Profile, given: Material, model: Train, plain: Train, design: Design, seed: int
) -> list[Evaluate]:
    """The attacks that know a model: the ensemble, and descents to the surest accepted error.

    The first two are sent to other models too. What only crosses the boundary of one model rarely
    crosses that of another one.
    """
    attack = profile.attack
    threat = ThreatModel("linf", attack.eps)
    descent = APGD(steps=attack.steps, keep_maximizing=True)
    ensemble = Strongest(attack.ensemble_steps, attack.n_queries, attack.n_targets)
    on: Any = partial(Evaluate, model, given.images, threat, seed=seed, base=plain)

    def aware(one: Attack, keep: str) -> Evaluate:
        # Away from known images the kernels are flat: wider ones still point the way.
        through = WithWiderKernels(one, WIDER[0]) if design.machines else one
        node: Evaluate = on(attack=through, attacker="defence-aware", keep=keep)
        return node

    found = [on(attack=ensemble, attacker="strongest", keep="exact"), aware(descent, "exact")]
    return [*found, aware(ThroughBox(descent), "nothing")] if design.median else found


def sent(node: Evaluate, other: Train) -> Evaluate:
    """Score what was crafted on one model on another one, which the attacker does not know."""
    return replace(node, through=other, attacker="defence-unaware", keep="nothing")
