"""Which share is proven never wrong and accepted, and which share no attack breaks."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from demur import seeds
from demur.attacks import PGD, Strongest
from demur.certificates import Prover
from demur.data import ImageSet
from demur.errors import DemurError
from demur.evaluation.nodes import Node, Train
from demur.evaluation.on_images import Certify, Evaluate
from demur.evaluation.scoring import Recipe
from demur.goals import ForceReject
from demur.networks import certified_cnn
from demur.studies.certified_rejection.profile import PapersProfile, Profile
from demur.studies.certified_rejection.recipes import (
    Blur,
    ColumnAtRate,
    Consistency,
    SmallCnn,
    Threshold,
)
from demur.studies.certified_rejection.smoothing import smoothed
from demur.studies.certified_rejection.tables import FAMILIES, at_rate, show
from demur.studies.comparison.recipes import Machines
from demur.studies.material import Part, describe_parts, gather_part
from demur.studies.study import Study
from demur.threat import ThreatModel

TITLE = "Certified rejection"
SOURCE = "Sheikholeslami et al. 2021, Chen et al. 2023, and the defences of the four papers"
LAYERS = ("5", "9")
"""Of the small network: the rectifier after the convolutions, and the one after the dense layer."""
CHEAP = ("ibp", "crown-ibp")
CPR = 0.1
"""Delta of Chen et al. 2023 on MNIST."""


@dataclass(frozen=True)
class Material:
    """Images to learn from, those that set thresholds, all test images, and those attacked."""

    train: ImageSet
    validation: ImageSet
    test: ImageSet
    attacked: ImageSet


def plan(profile: Profile, data_root: Path | None, seed: int) -> Study:
    """Load the images, and say what is to be computed.

    Raises
    ------
    DemurError
        If the data is missing, or the profile does not fit it.
    """
    part, given = material(profile, data_root, seed)
    models = _models(profile, given, seed)
    nodes: list[Node] = [*models.values()]
    for name, model in models.items():
        nodes += _measured(profile, given, name, model, models["plain"], seed)
    if profile.smoothing is not None:
        nodes += smoothed(
            profile.smoothing,
            profile.batch_size,
            given.train,
            given.validation,
            given.test,
            seed,
        )
    stored = [node for node in nodes if isinstance(node, Evaluate) and node.keep == "stored"]
    return Study(
        nodes=tuple(nodes),
        data=describe_parts([part], None),
        taken=f"Data: {part.taken}.",
        show=partial(show, profile),
        gallery=tuple(stored),
        pictures=profile.gallery,
    )


def material(profile: Profile, data_root: Path | None, seed: int) -> tuple[Part[Profile], Material]:
    """Load the images, and say which serve for what."""
    part = gather_part(profile, profile.attack.images, data_root, seed)
    train, validation = part.train.split(0.1, seeds.derive(seed, "validation"))
    if profile.papers is not None:
        train.balanced(profile.papers.per_class, seed)
    channels, size, _ = train.image_shape
    certified_cnn(train.num_classes, channels=channels, size=size)
    test = part.test
    if profile.test_images is not None:
        if not profile.attack.images <= profile.test_images <= len(test):
            raise DemurError(
                f"test_images is {profile.test_images}: it must be at least attack.images, "
                f"{profile.attack.images}, and at most {len(test)}."
            )
        test = test.sample(profile.test_images, seeds.derive(seed, "test images"))
    attacked = test.sample(profile.attack.images, seeds.derive(seed, "attacked"))
    return part, Material(train, validation, test, attacked)


def _models(profile: Profile, given: Material, seed: int) -> Mapping[str, Train]:
    """All models, by name."""
    certified = profile.certified
    train = partial(Train, data=given.train, seed=seed)
    held = partial(Train, data=given.validation, seed=seed)
    simple = SmallCnn(profile.epochs, profile.batch_size)
    proven = SmallCnn(
        certified.epochs,
        certified.batch_size,
        certified.eps,
        certified.ramp,
        certified.kappa,
        certified.learning_rate,
    )
    plain = train(simple, name="plain")
    safe = train(proven, name="certified training")
    found = {one.name: one for one in (plain, safe)}
    threshold, checked, attacked, learned = FAMILIES

    def add(name: str, recipe: Recipe, base: Train) -> None:
        found[name] = held(recipe, base=base, name=name)

    if profile.adversarial is not None:
        steps, within = profile.adversarial.steps, profile.adversarial.eps
        adversarial = SmallCnn(
            profile.adversarial.epochs,
            profile.batch_size,
            attack=PGD(steps=steps, random_start=True),
            threat=ThreatModel("linf", within),
        )
        robust = train(adversarial, name="adversarial training")
        found[robust.name] = robust
        for rate in profile.rates:
            add(at_rate(threshold, rate), Threshold(rate), robust)
            add(at_rate(attacked, rate), Consistency("pgd", rate=rate), robust)
        add(f"CPR (unproven check), delta {CPR:g}", Consistency("pgd", CPR), robust)
    if certified.column:
        column = train(replace(proven, reject=True), name="learned reject column")
        found[column.name] = column
        for rate in profile.rates:
            add(at_rate(learned, rate), ColumnAtRate(rate), column)
    for rate in profile.rates:
        add(at_rate(checked, rate), Consistency("ibp", rate=rate), safe)
    for delta in profile.deltas:
        add(f"certified consistency, delta {delta:g}", Consistency("ibp", delta), safe)
    if profile.papers is not None:
        found |= _papers(profile, profile.papers, given, (plain, simple), (safe, proven), seed)
    return found


def _papers(
    profile: Profile,
    papers: PapersProfile,
    given: Material,
    simple: tuple[Train, SmallCnn],
    proven: tuple[Train, SmallCnn],
    seed: int,
) -> dict[str, Train]:
    """The papers' defences on the plain network, and on the one with certified training."""
    train = partial(Train, data=given.train, seed=seed)
    machines = Machines(LAYERS, papers.per_class, papers.C, min(profile.rates))
    found = []
    for name, (base, recipe) in (("", simple), (", certified training underneath", proven)):
        background = replace(recipe, backgrounds=papers.made_per_kind)
        found += [
            train(background, name=f"background class{name}"),
            train(
                machines,
                validation=given.validation,
                base=base,
                name=f"deep neural rejection{name}",
            ),
            Train(
                Blur(papers.sigma), given.validation, seed, base=base, name=f"Gaussian blur{name}"
            ),
        ]
    return {one.name: one for one in found}


def _measured(
    profile: Profile, given: Material, name: str, model: Train, plain: Train, seed: int
) -> list[Node]:
    """The clean images; at each eps, the ensemble and a certificate; and whether a rejection can be
    forced.
    """
    attack = profile.attack
    ensemble = Strongest(attack.steps, attack.n_queries, attack.n_targets)
    on = partial(Evaluate, model, seed=seed, base=plain)
    machines = name.startswith("deep neural rejection")
    unproven = name.startswith("CPR")
    trained = "certified" in name or name.startswith("learned")
    certified = profile.certified
    cheap = Prover(("ibp",) if machines else CHEAP, steps=0)
    prover = cheap
    attacked, proven_on = given.attacked, given.test
    if machines or not trained:
        # Of networks that are not trained for certificates nearly nothing is proven, and linear
        # bounds of every image are slow. So are kernels against all support vectors. Each score of
        # CPR is an attack of 20 steps.
        attacked = attacked.sample(attack.few, seeds.derive(seed, "fewer"))
        proven_on = attacked
    else:
        prover = replace(cheap, methods=certified.methods, splits=certified.splits)
    nodes: list[Node] = [on(given.test, None), on(attacked, None, split="attacked")]
    for eps in attack.eps:
        threat = ThreatModel("linf", eps)
        nodes.append(on(attacked, threat, ensemble, attacker="strongest", split="attacked"))
        if not unproven:
            nodes.append(Certify(model, proven_on, threat, prover))
    if _rejects(model.recipe) and not unproven:
        forced = ThreatModel("linf", profile.denial, goal=ForceReject())
        nodes.append(Certify(model, proven_on, forced, cheap))
    return nodes


def _rejects(recipe: Recipe) -> bool:
    if isinstance(recipe, SmallCnn):
        return recipe.reject or recipe.backgrounds > 0
    return not isinstance(recipe, Blur)
