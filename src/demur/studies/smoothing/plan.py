"""Small networks behind each filter, networks for ImageNet, and transfer learning, all attacked."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from demur import data, seeds
from demur.attacks import PGD, AnyError, NormalizedGradient, Strongest, Target
from demur.data import to_float
from demur.defenses import gaussian_blur
from demur.errors import DemurError
from demur.evaluation.nodes import Measure, Train
from demur.evaluation.on_images import Evaluate
from demur.evaluation.tables import Case
from demur.files import digest, file_digest
from demur.networks import CLASSES, weights
from demur.studies import album, material
from demur.studies.public import FromOwnAnswer, Public, Tuned, Tuning, describe_network
from demur.studies.recipes import SmallNetwork
from demur.studies.smoothing import profile as profiles
from demur.studies.smoothing import tables
from demur.studies.smoothing.recipes import StandIn, WithoutFilter
from demur.studies.study import Study
from demur.threat import ThreatModel

TITLE = "Smoothing"
SOURCE = "Jézéquel 2019, Protecting networks against adversarial attacks"
CONFIDENCE = 5.0
"""The margin of the images that are sent from the public network, in units of its scores."""


def plan(profile: profiles.Profile, data_root: Path | None, seed: int) -> Study:
    """Load the images, and say what is to be computed.

    Raises
    ------
    DemurError
        If the data is missing, or the profile does not fit it.
    """
    gather = partial(material.gather_part, data_root=data_root, seed=seed)
    parts = [gather(one, profile.attack.images) for one in profile.sets]
    sets = [line for part in parts for line in _set(profile, part, seed)]
    photos = album.gather(profile.photographs, data_root)
    pictures, facts = _photographs(profile, photos, seed) if photos else ([], [])
    tuned, said, tuned_on = _tuning(profile.tuning, data_root, seed)
    taken = [part.taken for part in parts]
    taken += [str(photos)] if photos else album.without_album(profile.photographs)
    described = material.describe_parts(parts, photos.fingerprint if photos else None)
    fingerprint = digest(described.fingerprint, tuned_on) if tuned else described.fingerprint
    toy = not described.rooted and all(part.train.name == "digits" for part in parts)
    lines = tables.Lines(sets, pictures, tuned, " ".join(photos.notes) if photos else "", toy)
    return Study(
        nodes=(*(case.node for case in (*sets, *pictures, *tuned)), *facts),
        gallery=tuple(
            case.node for case in (*pictures, *sets) if case.labels["column"] == tables.TARGETED
        ),
        pictures=profile.gallery,
        data=replace(described, fingerprint=fingerprint),
        taken=f"Data: {'; '.join([*taken, *said])}.",
        show=partial(tables.show, profile, lines),
    )


def _set(
    profile: profiles.Profile, part: material.Part[profiles.SetProfile], seed: int
) -> list[Case]:
    """Train a network behind each filter, and attack them all."""
    settings = part.settings
    plain = SmallNetwork(settings.epochs, settings.batch_size)
    recipes = {tables.NONE: plain}
    recipes |= {tables.gaussian(one): replace(plain, sigma=one) for one in settings.gaussian}
    recipes |= {f"median, {one}x{one}": replace(plain, window=one) for one in settings.median}
    made = {}
    for name, recipe in recipes.items():
        try:
            recipe.untrained(part.train, seed).scores(part.test.to_float(torch.tensor([0])))
        except DemurError as error:
            raise DemurError(f"{settings.name}: {error}") from error
        made[name] = Train(recipe, part.train, seed, name=f"{settings.name}: {name}")
    base = made[tables.NONE]
    return [
        case
        for name, model in made.items()
        for case in _cases(
            settings.name, name, _attacked(profile, part, model, base, recipes[name], seed)
        )
    ]


def _cases(group: str, row: str, nodes: Mapping[str, Evaluate]) -> list[Case]:
    """Give the nodes of a line of a table, which are named by its columns."""
    at = {"group": group, "row": row}
    return [Case(node, {**at, "column": column}) for column, node in nodes.items()]


def _attacked(
    profile: profiles.Profile,
    part: material.Part[profiles.SetProfile],
    model: Train,
    plain: Train,
    recipe: SmallNetwork,
    seed: int,
) -> dict[str, Evaluate]:
    """Give the nodes of a model by the columns of the tables."""
    attack = profile.attack
    drawn = part.test.sample(attack.images, seeds.derive(seed, "attacked"))
    images = material.in_random_order(drawn, seed)
    few = images.subset(torch.arange(profile.strongest.images))
    goal = Target(
        other_classes(seeds.image_keys(images.to_float()), images.labels, images.num_classes, seed)
    )
    linf = ThreatModel("linf", part.settings.eps)
    pgd = PGD(steps=attack.steps)
    step = NormalizedGradient(step_size=attack.step_size, steps=attack.targeted_steps)
    ensemble = Strongest(**profile.strongest.model_dump(exclude={"images"}))
    on = partial(Evaluate, seed=seed, base=plain)
    aware = partial(on, model, images, attacker="defence-aware")
    found = {
        tables.CLEAN: on(model, part.test, None),
        tables.TARGETED: aware(ThreatModel("l2", goal=goal), step, keep="stored"),
        tables.UNAWARE: on(model, images, linf, pgd, attacker="defence-unaware"),
        tables.THROUGH: aware(linf, pgd),
    }
    if model is not plain:
        alone = Train(WithoutFilter(), part.train, seed, base=model, name=f"{model.name}, network")
        # This attacker cannot query the filtered model: it maximises the confidence of the error.
        surest = replace(pgd, loss="cross_entropy", keep_maximizing=True)
        unaware = partial(on, alone, images, replace(linf, goal=AnyError()), surest)
        found[tables.UNAWARE] = unaware(through=model, attacker="defence-unaware")
        found[tables.IDENTITY] = aware(linf, StandIn(pgd, "identity"))
    if recipe.window is not None:
        found[tables.BOX] = aware(linf, StandIn(pgd, "box"))
    return {**found, tables.STRONGEST: on(model, few, linf, ensemble, attacker="strongest")}


def other_classes(keys: Sequence[int], labels: Tensor, classes: int, seed: int) -> Tensor:
    """Give a class for each label (N,) that is another one, drawn by the key of the image."""
    drawn = seeds.uniform(keys, (), seed, "targets") * (classes - 1)
    return (labels + 1 + drawn.long()) % classes


def _photographs(
    profile: profiles.Profile, photos: album.Album, seed: int
) -> tuple[list[Case], list[Measure]]:
    """Attack every network toward the same random classes, and show the files to all networks."""
    settings = profile.photographs
    assert settings is not None
    keys = [seeds.image_keys(to_float(photo.pixels[None]))[0] for photo in photos.photos]
    labels = torch.tensor([photo.label or 0 for photo in photos.photos])
    targets = other_classes(keys, labels, len(CLASSES), seed)
    threat = ThreatModel("l2", goal=Target(targets))
    step = NormalizedGradient(step_size=settings.step_size, steps=settings.steps)
    public = {name: Public(name, file) for name, file in photos.networks.items()}
    shown = {name: replace(one, stored=True).node(f"{name}, files") for name, one in public.items()}
    lines: list[Case] = []
    facts = []
    for name, one in public.items():
        network = one.node(name)
        images = album.at_size(photos.photos, *one.sizes())
        on = partial(Evaluate, network, images, seed=seed, batch_size=25)
        sent = on(threat, step, attacker="defence-aware", keep="exact")
        passed = partial(replace, sent, attacker="defence-unaware", keep="nothing")
        nodes = {tables.TARGETED: sent, tables.CLEAN: on(None)}
        nodes |= {other: passed(through=to) for other, to in shown.items()}
        lines += _cases("", name, nodes)
        facts.append(Measure(describe_network, (network, sent, targets), name, attacked=True))
    return lines, facts


def _tuning(
    settings: profiles.TuningProfile | None, data_root: Path | None, seed: int
) -> tuple[list[Case], list[str], str]:
    """Tune a network with and without the filter, and attack it by way of the public one too.

    Give also what is said to the user, and a digest of the images and weights.
    """
    if settings is None:
        return [], [], ""
    file = weights.find(settings.network, data_root)
    if file is None:
        return [], [f"no weights of {settings.network} to tune"], ""
    known = {status.name: status for status in data.list_datasets(data_root)}
    entry = material.first_at_hand(settings.data, known)
    train, test = material.load_splits(entry, data_root, seeds.derive(seed, "test"))
    if train.images.shape[1] != 3:
        raise DemurError(
            f"a network for photographs sees colours; the images of {train.name} are grey."
        )
    wanted = settings.train_images or len(train)
    if settings.images > len(test) or wanted > len(train):
        raise DemurError(
            f"tuning.images and tuning.train_images ask for more than the {len(test)} and "
            f"{len(train)} images of {train.name}."
        )
    gaussian_blur(train.to_float(torch.tensor([0])), settings.sigma)  # refuses too small images
    train = train.sample(wanted, seeds.derive(seed, "tuning"))
    images = test.sample(settings.images, seeds.derive(seed, "tuned"))
    public = Public(settings.network, file, settings.size).node(settings.network)
    linf = ThreatModel("linf", settings.eps)
    pgd = PGD(steps=settings.steps)
    away = FromOwnAnswer(replace(pgd, loss="cross_entropy", confidence=CONFIDENCE))
    sent = Evaluate(public, images, replace(linf, goal=AnyError()), away, batch_size=50)
    common = settings.model_dump(include={"epochs", "batch_size", "learning_rate"})
    lines: list[Case] = []
    for layers in ("all layers", "last layer"):
        for sigma in (None, settings.sigma):
            name = tables.NONE if sigma is None else tables.gaussian(sigma)
            called = f"{settings.network}, {layers}: {name}"
            recipe = Tuning(layers == "all layers", sigma, **common)
            model = Tuned(recipe, train, seed, base=public, name=called)
            whole = Evaluate(model, images, linf, pgd, batch_size=50, attacker="defence-aware")
            nodes = {
                tables.CLEAN: Evaluate(model, images, None),
                tables.PUBLIC: replace(sent, through=model, attacker="defence-unaware"),
                tables.WHITE: whole,
            }
            lines += _cases(layers, name, nodes)
    said = f"{len(train):,} images of {train.name} to tune {settings.network}"
    return lines, [said], digest(train.fingerprint, images.fingerprint, file_digest(file))
