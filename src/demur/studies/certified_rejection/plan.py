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
from demur.studies.certified_rejection.profile import Profile
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
from demur.studies.material import describe_parts, gather_part
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
    part = gather_part(profile, profile.attack.images, data_root, seed)
    train, validation = part.train.split(0.1, seeds.derive(seed, "validation"))
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
    given = Material(train, validation, test, attacked)
    models = _models(profile, given, seed)
    nodes: list[Node] = [*models.values()]
    for name, model in models.items():
        nodes += _measured(profile, given, name, model, models["plain"], seed)
    more = (profile.smoothing, profile.batch_size, train, validation, test, seed)
    nodes += smoothed(*more)
    stored = [node for node in nodes if isinstance(node, Evaluate) and node.keep == "stored"]
    return Study(
        nodes=tuple(nodes),
        data=describe_parts([part], None),
        taken=f"Data: {part.taken}.",
        show=partial(show, profile),
        gallery=tuple(stored),
        pictures=profile.gallery,
    )


def _models(profile: Profile, given: Material, seed: int) -> Mapping[str, Train]:
    """All models, by name."""
    certified, papers = profile.certified, profile.papers
    train = partial(Train, data=given.train, seed=seed)
    held = partial(Train, data=given.validation, seed=seed)
    simple = SmallCnn(profile.epochs, profile.batch_size)
    proven = SmallCnn(
        certified.epochs, certified.batch_size, certified.eps, certified.ramp, certified.kappa
    )
    adversarial = SmallCnn(
        profile.adversarial.epochs,
        profile.batch_size,
        attack=PGD(steps=profile.adversarial.steps, random_start=True),
        threat=ThreatModel("linf", profile.adversarial.eps),
    )
    plain = train(simple, name="plain")
    robust = train(adversarial, name="adversarial training")
    safe = train(proven, name="certified training")
    found = {one.name: one for one in (plain, robust, safe)}

    def add(name: str, recipe: Recipe, base: Train) -> None:
        found[name] = held(recipe, base=base, name=name)

    column = replace(proven, reject=True)
    found["learned reject column"] = train(column, name="learned reject column")
    threshold, checked, attacked, learned = FAMILIES
    for rate in profile.rates:
        add(at_rate(threshold, rate), Threshold(rate), robust)
        add(at_rate(checked, rate), Consistency("ibp", rate=rate), safe)
        add(at_rate(attacked, rate), Consistency("pgd", rate=rate), robust)
        add(at_rate(learned, rate), ColumnAtRate(rate), found["learned reject column"])
    for delta in profile.deltas:
        add(f"certified consistency, delta {delta:g}", Consistency("ibp", delta), safe)
    add(f"CPR (unproven check), delta {CPR:g}", Consistency("pgd", CPR), robust)
    machines = Machines(LAYERS, papers.per_class, papers.C, min(profile.rates))
    for name, base, recipe in (
        ("", plain, simple),
        (", certified training underneath", safe, proven),
    ):
        background = replace(recipe, backgrounds=papers.made_per_kind)
        one = f"background class{name}"
        found[one] = train(background, name=one)
        one = f"deep neural rejection{name}"
        found[one] = train(machines, validation=given.validation, base=base, name=one)
        add(f"Gaussian blur{name}", Blur(papers.sigma), base)
    return found


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
    attacked = given.attacked
    if unproven and profile.papers.images < len(attacked):
        # Each of its scores is an attack of 20 steps.
        attacked = attacked.sample(profile.papers.images, seeds.derive(seed, "fewer"))
    nodes: list[Node] = [on(given.test, None), on(attacked, None, split="attacked")]
    methods = ("ibp",) if machines else CHEAP
    # Of networks that are not trained for certificates nearly nothing is proven, and linear bounds
    # of every image are slow. So are kernels against all support vectors.
    proven_on = given.test
    trained = "certified" in name or name.startswith("learned")
    if (machines or not trained) and profile.papers.images < len(given.attacked):
        proven_on = given.attacked.sample(profile.papers.images, seeds.derive(seed, "fewer"))
    for eps in attack.eps:
        threat = ThreatModel("linf", eps)
        nodes.append(on(attacked, threat, ensemble, attacker="strongest", split="attacked"))
        if not unproven:
            nodes.append(Certify(model, proven_on, threat, Prover(methods, steps=0)))
    if _rejects(model.recipe) and not unproven:
        forced = ThreatModel("linf", profile.denial, goal=ForceReject())
        nodes.append(Certify(model, proven_on, forced, Prover(methods, steps=0)))
    return nodes


def _rejects(recipe: Recipe) -> bool:
    if isinstance(recipe, SmallCnn):
        return recipe.reject or recipe.backgrounds > 0
    return not isinstance(recipe, Blur)
