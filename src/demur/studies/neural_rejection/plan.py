"""Is (deep) neural rejection robust to a defence-aware attacker? (Thanthulage 2020)"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from demur import seeds
from demur.attacks import DDN, PGD, Attack, ForceReject, RandomNoise, Strongest, WithWiderKernels
from demur.attacks.strongest import WIDER
from demur.errors import DemurError
from demur.evaluation.nodes import Measure, Node, Train
from demur.evaluation.on_images import Evaluate
from demur.evaluation.plan import Outputs
from demur.evaluation.thresholds import moved, offsets
from demur.networks import dnr_cnn
from demur.studies.material import describe_parts, gather_part
from demur.studies.neural_rejection.attackers import DoubleStart
from demur.studies.neural_rejection.profile import Material, Profile
from demur.studies.neural_rejection.recipes import (
    LAYERS,
    NetworkTraining,
    Rejection,
    machine_figures,
    network_figures,
)
from demur.studies.neural_rejection.tables import DNN, DNR, NR, PAPER, show
from demur.studies.rejection import noise_rejected
from demur.studies.study import Study
from demur.threat import ThreatModel

TITLE = "Neural rejection"
SOURCE = "Thanthulage 2020, deep neural rejection (after Melis et al. 2017 and Sotgiu et al. 2020)"


def plan(profile: Profile, data_root: Path | None, seed: int) -> Study:
    """Load the images, and say what is to be computed.

    Raises
    ------
    DemurError
        If the data is missing, or the profile does not fit it.
    """
    every = profile.model_copy(update={"train_images": None})
    said = "attack.images times attack.repeats"
    part = gather_part(every, profile.attacked, data_root, seed, said)
    wanted = profile.train_images + profile.validation_images
    if wanted > len(part.train):
        raise DemurError(
            f"train_images {profile.train_images} and validation_images "
            f"{profile.validation_images} are more than the {len(part.train)} images that "
            f"{part.train.name} has for them."
        )
    chosen = part.train.sample(wanted, seeds.derive(seed, "chosen"))
    share = profile.validation_images / wanted
    train, validation = chosen.split(share, seeds.derive(seed, "validation"))
    if profile.machines.per_class:
        train.balanced(profile.machines.per_class, seed)
    dnr_cnn(train.num_classes, channels=train.image_shape[0], size=part.size)
    images = part.test.sample(profile.attacked, seeds.derive(seed, "attacked"))
    given = Material(profile, seed, train, validation, part.test, images)
    attacks = _attacks(given)
    nodes = _nodes(given, attacks)
    titles = {repr(attack): title for title, attack in attacks.items()}
    kept = [one for one in nodes if isinstance(one, Evaluate) and one.keep == "stored"]
    first = Study(
        nodes=tuple(nodes),
        data=describe_parts([part], None),
        taken=f"Data: {part.taken}.",
        show=partial(show, given, titles, {}),
        gallery=tuple(kept),
        pictures=profile.gallery,
    )
    return replace(first, then=partial(_at_other_thresholds, given, titles, first))


def _attacks(given: Material) -> dict[str, Attack]:
    """The paper's attack, and those that it is compared with, by title."""
    attack, strongest = given.profile.attack, given.profile.strongest
    start = partial(DoubleStart, known=given.validation)
    paper = PGD(attack.steps, attack.step_size, restarts=2, tolerance=attack.tolerance)
    whole = replace(paper, tolerance=None)
    return {
        PAPER: start(paper),
        "the paper's, twice the steps": start(replace(paper, steps=2 * attack.steps)),
        "random noise": RandomNoise(draws=10),
        "hinge (sec. 2.5.2)": start(replace(whole, loss="hinge")),
        "margin and density": start(whole, term="density"),
        "feature matching": start(replace(whole, loss="cross_entropy"), term="matching"),
        "ensemble": Strongest(strongest.ensemble_steps, strongest.n_queries, strongest.n_targets),
    }


def _nodes(given: Material, attacks: Mapping[str, Attack]) -> list[Node]:
    """All models with their evaluations, but for those at other thresholds."""
    profile = given.profile
    once, always = profile.retraining, profile.adversarial
    layers = tuple(LAYERS)
    plain = NetworkTraining(profile.epochs, profile.batch_size, profile.learning_rate)
    deep = Rejection(layers, **profile.machines.model_dump())
    train = partial(Train, data=given.train, seed=given.seed)
    reject = partial(train, validation=given.validation)
    evaluated = partial(_evaluations, given, attacks)
    network = train(plain, name=DNN)
    figures = Measure(network_figures, (network, given.train, given.test), name=DNN)
    nodes = [network, figures, *evaluated(network)]
    for name, recipe in ((NR, replace(deep, layers=layers[-1:])), (DNR, deep)):
        nodes += evaluated(reject(recipe, base=network, name=name))
    further = partial(NetworkTraining, batch_size=profile.batch_size)
    for suffix, how, attack, attacked in (
        ("retrained", once, PGD(once.steps), once.attacked),
        ("adversarially trained", always, PGD(always.steps, random_start=True), None),
    ):
        threat = ThreatModel("l2", how.eps)
        training = further(how.epochs, attack=attack, threat=threat, attacked=attacked)
        harder = train(training, base=network, name=f"{DNN}, {suffix}")
        nodes += evaluated(harder)
        nodes += evaluated(reject(deep, base=harder, name=f"{DNR}, {suffix}"))
    return nodes


def _evaluations(given: Material, attacks: Mapping[str, Attack], model: Train) -> list[Node]:
    """The clean images, and all attackers of a model."""
    attack, strongest = given.profile.attack, given.profile.strongest
    rejects = isinstance(model.recipe, Rejection)
    network = model.base if rejects and model.base else model
    three = model.name in (DNN, NR, DNR)
    shared: dict[str, Any] = {"seed": given.seed, "base": network}
    nodes: list[Node] = [Evaluate(model, given.test, None, **shared)]
    if rejects:
        nodes.append(Evaluate(model, given.validation, None, split="validation", **shared))
        noise = (model, given.test.image_shape, given.seed)
        nodes.append(Measure(machine_figures, (model, given.test), name=model.name))
        nodes.append(Measure(noise_rejected, noise, name=model.name))
    shared |= {"images": given.images, "split": "attacked", "per_repeat": attack.images}
    on = partial(Evaluate, model, **shared)
    aware = partial(on, attacker="defence-aware")
    worst = partial(on, attacker="strongest")
    sent = partial(Evaluate, network, through=model, attacker="defence-unaware", **shared)
    nodes.append(on(threat=None))
    for eps in attack.eps[1:]:
        threat = ThreatModel("l2", eps)
        keep = "stored" if three and eps == strongest.eps else "nothing"
        nodes.append(sent(threat=threat, attack=PGD(attack.steps, keep_maximizing=True)))
        nodes.append(aware(threat=threat, attack=attacks[PAPER], keep=keep))
    search = DDN(strongest.steps)
    free = ThreatModel("l2")
    nodes.append(worst(threat=free, attack=search))
    if rejects:
        nodes += [worst(threat=free, attack=one) for one in _wider(search)[1:]]
        # Away from known images the kernels themselves point the way.
        nodes.append(worst(threat=replace(free, goal=ForceReject()), attack=search))
    at = ThreatModel("l2", strongest.eps)
    for title, one in attacks.items():
        if title == "ensemble":
            nodes.append(worst(threat=at, attack=one))
        elif three and title != PAPER:
            nodes.append(aware(threat=at, attack=one))
    if rejects and three:
        asked = (model, given.validation, given.profile.thresholds.rates, 0.99)
        nodes.append(Measure(offsets, asked, name=model.name))
    return nodes


def _wider(attack: Attack) -> list[Attack]:
    return [attack, *(WithWiderKernels(attack, factor) for factor in WIDER)]


def _at_other_thresholds(
    given: Material, titles: Mapping[str, str], first: Study, outputs: Outputs
) -> Study:
    """The whole study, when the offsets of the reject score are known."""
    settings = given.profile.thresholds
    few = given.images.subset(range(settings.images))
    threat = ThreatModel("l2", given.profile.strongest.eps)
    attacks = _wider(PGD(settings.steps))
    found = {
        node.name: moved(node.inputs[0], few, outputs.value(node), attacks, threat, given.seed)
        for node in first.nodes
        if isinstance(node, Measure) and node.function is offsets
    }
    nodes = [node for by in found.values() for one in by.values() for node in one.nodes]
    shown = partial(show, given, titles, found)
    return replace(first, nodes=(*first.nodes, *nodes), show=shown, then=None)
