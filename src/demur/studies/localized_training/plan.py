"""Localized training: three models of each data set, and networks for ImageNet, attacked around
the object. The box that stands for the object is chosen on the natural model.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from demur import masks, seeds
from demur.attacks import PGD, Evade, Strongest
from demur.data import ImageSet
from demur.errors import DemurError
from demur.evaluation.nodes import Measure, Train
from demur.evaluation.on_images import Evaluate
from demur.evaluation.plan import Outputs
from demur.evaluation.tables import Case
from demur.studies import album as albums
from demur.studies.localized_training import recipes
from demur.studies.localized_training.profile import AttackedPhotographs, Profile, SetProfile
from demur.studies.localized_training.recipes import AROUND, EVERYWHERE, MODELS, Stage
from demur.studies.localized_training.tables import Nodes, choose, show
from demur.studies.material import Part, describe_parts, gather_part, in_random_order
from demur.studies.public import Public
from demur.studies.study import Shown, Study
from demur.threat import ThreatModel

TITLE = "Localized training"
SOURCE = (
    "Rothberg, Chen, Jie & Ji 2019, Localized Adversarial Training for Increased Accuracy and "
    "Robustness in Image Classification"
)
STEP_SHARE = 0.1
"""Of eps: a step of the attack on photographs."""
AWARE = "defence-aware"


def plan(profile: Profile, data_root: Path | None, seed: int) -> Study:
    """Load the images, and say what is computed first: what the boxes are chosen by.

    Raises
    ------
    DemurError
        If the data is missing, or the profile does not fit it.
    """
    parts = [gather_part(one, profile.attack.images, data_root, seed) for one in profile.sets]
    tries = [case for part in parts for case in _around_boxes(profile, part, seed)]
    album = albums.gather(profile.photographs, data_root)
    taken = [part.taken for part in parts]
    taken += [str(album)] if album else albums.without_album(profile.photographs)
    first = Study(
        nodes=tuple(case.node for case in tries),
        data=describe_parts(parts, album.fingerprint if album else None),
        taken=f"Data: {'; '.join(taken)}.",
        show=lambda outputs: Shown([]),
        pictures=profile.gallery,
    )

    def whole(outputs: Outputs) -> Study:
        nodes = Nodes(profile, parts, tries, album)
        for part in parts:
            _attack_set(nodes, part, choose(part, tries, outputs), seed)
        if album and profile.photographs:
            _attack_photographs(nodes, profile.photographs, album, outputs, seed)
        shown = tuple(case.node for case in nodes.cases if case.node.keep != "nothing")
        return replace(first, nodes=nodes.all, gallery=shown, show=partial(show, nodes), then=None)

    return replace(first, then=whole)


def _loss_images(part: Part[SetProfile], seed: int) -> ImageSet:
    """Give the test images of Figure 2 in random order. The first ones are attacked otherwise."""
    wanted = part.settings.loss_images or len(part.test)
    return in_random_order(part.test.sample(wanted, seeds.derive(seed, "attacked")), seed)


def _first(images: ImageSet, count: int) -> ImageSet:
    return images.subset(torch.arange(count))


def _around_boxes(profile: Profile, part: Part[SetProfile], seed: int) -> list[Case]:
    """Attack the natural model of a set around each box; the first case is without an attack."""
    settings, attack, size = part.settings, profile.attack, part.size
    if max(settings.boxes) > size:
        raise DemurError(
            f"a box of {max(settings.boxes)} pixels a side does not lie in the images of "
            f"{part.train.name}, {size}x{size}."
        )
    left = len(part.train) - (settings.held_out or 0)
    if settings.batch_size > left:
        raise DemurError(
            f"batch_size is {settings.batch_size}, but {part.train.name} has {left} training "
            "images that are not held out."
        )
    if settings.loss_images and settings.loss_images < attack.images:
        raise DemurError(
            f"loss_images is {settings.loss_images}, fewer than attack.images, {attack.images}."
        )
    _stage(settings).untrained(part.train, seed)
    images = _first(_loss_images(part, seed), attack.images)
    few = images.sample(attack.calibration_images, seeds.derive(seed, "calibration"))
    natural = _trained(part, MODELS[0], None, seed)
    on = partial(Evaluate, natural, few, seed=seed, base=natural, split="calibration")
    descent = recipes.paper_attack(attack.steps, attack.step_share, settings.eps, largest=False)
    found = {-1: on(None)}
    for side in settings.boxes:
        inside = masks.centre_box((size, size), side, side)
        threat = recipes.threats(settings.eps, inside, few, seed)[AROUND]
        found[side] = on(threat, descent, attacker=AWARE)
    return [Case(node, {"set": settings.name, "side": side}) for side, node in found.items()]


def _stage(settings: SetProfile) -> Stage:
    return Stage(
        settings.network,
        settings.steps,
        settings.batch_size,
        settings.learning_rate,
        held_out=settings.held_out,
    )


def _stages(settings: SetProfile, attacked: bool) -> list[tuple[float, int]]:
    """Give the part of eps and the steps of each stage of a training."""
    if not attacked:
        return [(1.0, settings.steps)]
    *before, last = settings.ramp
    if settings.warm_up is None:
        return [(factor, round(settings.steps / len(settings.ramp))) for factor in settings.ramp]
    warm_up = [(factor, round(settings.warm_up / len(before))) for factor in before]
    return [*warm_up, (last, settings.steps - settings.warm_up)]


def _trained(part: Part[SetProfile], kind: str, threat: ThreatModel | None, seed: int) -> Train:
    """Train one of the three models; against a threat in stages of a growing eps."""
    settings = part.settings
    model = None
    for number, (factor, steps) in enumerate(_stages(settings, threat is not None)):
        recipe = replace(_stage(settings), steps=steps, number=number)
        if threat:
            attack = PGD(settings.attack_steps, factor * settings.step_size, random_start=True)
            within = replace(threat, eps=factor * settings.eps)
            recipe = replace(recipe, attack=attack, threat=within)
        name = f"{settings.name}, {kind}" + ("" if factor == 1 else f", eps times {factor:g}")
        model = Train(recipe, part.train, seed, base=model, name=name)
    assert model is not None
    return model


def _attack_set(nodes: Nodes, part: Part[SetProfile], box: int, seed: int) -> None:
    """Train the three models of a set, and attack them in each region."""
    attack, strongest = nodes.profile.attack, nodes.profile.strongest
    name, eps = part.settings.name, part.settings.eps
    of_loss = _loss_images(part, seed)
    images = _first(of_loss, attack.images)
    allowed = recipes.threats(eps, masks.centre_box((part.size, part.size), box, box), images, seed)
    trained_on = (None, allowed[EVERYWHERE], allowed[AROUND])
    models = [_trained(part, *pair, seed) for pair in zip(MODELS, trained_on, strict=True)]
    ensemble = Strongest(**strongest.model_dump(exclude={"images"}))
    first = _first(images, strongest.images)
    sizes = {eps, *(min(1.0, factor * eps) for factor in attack.curve if factor)}
    descent = partial(recipes.paper_attack, attack.steps, attack.step_share)
    compared: list[Train | Evaluate] = []
    for kind, model in zip(MODELS, models, strict=True):
        on = partial(Evaluate, model, seed=seed, base=models[0])
        aware = partial(on, images, attacker=AWARE)
        found: list[tuple[str, Evaluate]] = [("", on(part.test, None))]
        for region, threat in allowed.items():
            both = region in (EVERYWHERE, AROUND)
            own = [
                aware(replace(threat, eps=size), descent(size, largest=False))
                for size in (sorted(sizes) if both else [eps])
            ]
            if both:
                own.append(on(of_loss, threat, descent(eps), attacker=AWARE, keep="exact"))
                wrong = replace(threat, goal=Evade())
                own.append(on(first, wrong, ensemble, attacker="strongest"))
            found += [(region, node) for node in own]
        compared += [model, *(node for _, node in found if node.keep == "exact")]
        for region, node in found:
            full = node.threat is None or node.threat.eps == eps
            labels: dict[str, str | float] = {
                "set": name,
                "kind": kind,
                "region": region,
                "full": bool(full),
            }
            nodes.cases.append(Case(node, labels))
    given = (part.test, of_loss, *compared)
    nodes.losses[name] = Measure(recipes.losses, given, f"{name}: cross-entropy", attacked=True)
    nodes.boxes[name] = box


def _attack_photographs(
    nodes: Nodes, settings: AttackedPhotographs, album: albums.Album, outputs: Outputs, seed: int
) -> None:
    """Attack networks at each eps around the objects, and at the largest one in all regions."""
    names = tuple(photo.name for photo in album.photos[: settings.listed])
    for name, path in album.networks.items():
        network = Public(name, path).node(name)
        images, inside = albums.seen_by(outputs.model(network), album.photos)
        on = partial(Evaluate, network, images, seed=seed, batch_size=albums.BATCH, base=network)
        found = {(name, 0.0, ""): on(None)}
        for eps in settings.eps:
            descent = recipes.paper_attack(settings.steps, STEP_SHARE, eps)
            for region, threat in recipes.threats(eps, inside, images, seed).items():
                if region == AROUND or eps == settings.eps[-1]:
                    sent = on(threat, descent, attacker=AWARE, keep="stored")
                    found[name, eps, region] = sent
        for place, node in found.items():
            given = (network, images, names, *([node] if node.attack else []))
            said = f"{name}: {place[2] or 'no attack'} {place[1]:g}"
            nodes.answers[place] = Measure(albums.answers, given, said, attacked=True)
            nodes.cases.append(Case(node, {"set": ""}))
