"""What section VII of the background-class paper leaves open, measured."""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from demur import seeds
from demur.attacks import FGSM, PGD, AnyError, Strongest
from demur.data import ImageSet
from demur.errors import DemurError
from demur.evaluation.nodes import Measure, Node, Train
from demur.evaluation.on_images import Evaluate
from demur.evaluation.results import Data
from demur.files import digest
from demur.studies.background_class.recipes import Split
from demur.studies.background_extensions.profile import Profile
from demur.studies.background_extensions.recipes import KINDS, MADE, OTHERS, Extended, Growth, made
from demur.studies.background_extensions.tables import Parts, show
from demur.studies.material import Loaded, check_square, counted, load_first
from demur.studies.recipes import rejected
from demur.studies.study import Study
from demur.threat import ThreatModel

TITLE = "Background class, section VII"
SOURCE = "McCoyd & Wagner 2018, section VII: what the paper leaves to future work"
WIDTH = 32
"""Of the paper's network."""


@dataclass(frozen=True)
class Material:
    """All images, the split, the attacked test images, and images of no key class by kind."""

    images: ImageSet
    split: Split
    attacked: ImageSet
    strange: tuple[tuple[str, Tensor], ...]


def plan(profile: Profile, data_root: Path | None, seed: int) -> Study:
    """Load the images, and say what is to be computed.

    Raises
    ------
    DemurError
        If the data is missing, or the profile does not fit it.
    """
    loaded = load_first(profile.data, data_root)
    given = _gather(profile, loaded, seed)
    parts = _models(profile, given, seed)
    nodes: list[Node] = []
    for model, base in parts.models(WIDTH):
        nodes += _attacked(profile, given, model, base, seed)
    for model in parts.kinds.values():
        nodes.append(Measure(rejected, (model, *given.strange), model.name))
    content = digest(loaded.images.fingerprint)
    images = loaded.images
    rooted = loaded.where not in ("", "embedded")
    stored = [node for node in nodes if isinstance(node, Evaluate) and node.keep == "stored"]
    return Study(
        nodes=tuple(nodes),
        data=Data(images.name, content, len(images), images.num_classes, rooted),
        taken=f"Data: {counted(images)}{loaded.missing}.",
        show=partial(show, profile, parts, loaded.where == "embedded"),
        gallery=tuple(stored),
        pictures=profile.gallery,
    )


def _gather(profile: Profile, loaded: Loaded, seed: int) -> Material:
    """Split the images, and make those of no key class from images that are not trained on."""
    images = loaded.images
    check_square(images, images.name)
    keys, background = tuple(profile.keys), tuple(profile.background)
    images.select_classes((*keys, *background))
    own = seeds.derive(seed, "split")
    share = profile.background_share
    split = Split(keys, background, profile.held_out, own, share, profile.key_images)
    train, test, used, spare = split.parts(images)
    if share is None:
        # Without a share all images of other classes would be trained on: a fifth is kept apart.
        split = replace(split, share=0.8 * len(used) / len(train))
        _, _, used, spare = split.parts(images)
    wanted = profile.attack.images
    if len(train) < profile.key_images or wanted > len(test):
        raise DemurError(
            f"key_images is {profile.key_images} and attack.images is {wanted}, but {images.name} "
            f"has {len(train)} images of the key classes to train on, and {len(test)} to attack."
        )
    if len(used) == 0:
        raise DemurError(f"background_share is {share}: no background image is trained on.")
    return Material(
        images,
        split,
        test.sample(wanted, seeds.derive(seed, "attacked")),
        tuple(_strange(profile, test, spare, seeds.derive(seed, "strange"))),
    )


def _strange(
    profile: Profile, test: ImageSet, spare: Tensor, seed: int
) -> list[tuple[str, Tensor]]:
    """Give images of each kind of background, and noise, that no model is trained on (R21)."""
    most = profile.strange
    found = [(OTHERS, spare[:most])] if len(spare) else []
    found += [(kind, made(kind, test, most, seed)) for kind in MADE]
    shape = (most, *test.image_shape)
    noise = torch.randint(0, 256, shape, generator=seeds.generator(seed), dtype=torch.uint8)
    return [*found, ("uniform noise", noise)]


def _models(profile: Profile, given: Material, seed: int) -> Parts:
    """All models, by part of the study and line of its table."""
    plain = Extended(given.split, profile.epochs, profile.batch_size)
    train = partial(Train, data=given.images, seed=seed)
    with_letters = replace(plain, kinds=(OTHERS,))
    capacity = {
        (width, background): train(
            replace(with_letters if background else plain, width=width),
            name=f"width {width}, {'background' if background else 'no background'}",
        )
        for width in dict.fromkeys((*profile.widths, WIDTH))
        for background in (False, True)
    }
    some = replace(plain, made=profile.made_per_kind)
    kinds = {
        kind: train(replace(some, kinds=(kind,)) if kind != OTHERS else with_letters, name=kind)
        for kind in KINDS
    }
    kinds["all kinds"] = train(replace(some, kinds=KINDS), name="all kinds")
    growth = Growth(
        1,
        profile.grown.images,
        profile.grown.epochs,
        PGD(steps=profile.grown.steps, random_start=True),
        ThreatModel("linf", profile.attack.eps),
    )
    grown = {0: train(with_letters, name="round 0")}
    for number in range(1, profile.grown.rounds + 1):
        own = replace(with_letters, growth=replace(growth, rounds=number))
        grown[number] = train(own, name=f"round {number}")
    return Parts(capacity, kinds, grown)


def _attacked(
    profile: Profile, given: Material, model: Train, base: Train, seed: int
) -> list[Evaluate]:
    """The four attackers of a model."""
    attack = profile.attack
    threat = ThreatModel("linf", attack.eps)
    any_error = replace(threat, goal=AnyError())
    ensemble = Strongest(attack.ensemble_steps, attack.n_queries, attack.n_targets)
    on = partial(Evaluate, model, given.attacked, seed=seed, base=base)
    return [
        on(None),
        on(any_error, FGSM(loss="cross_entropy"), attacker="defence-unaware"),
        on(threat, PGD(steps=attack.steps), attacker="defence-aware", keep="stored"),
        on(threat, ensemble, attacker="strongest"),
    ]
