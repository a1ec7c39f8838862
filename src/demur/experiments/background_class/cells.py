"""The cells of the background-class experiment: its images, splits, models, selection and trade-off."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from demur import seeds
from demur.classifier import REJECT, Classifier, outcomes
from demur.data import ImageSet, to_float
from demur.data.background import Selection, confusing_classes
from demur.defenses import BackgroundClass
from demur.evaluation import NodeResult
from demur.evaluation.results import Data
from demur.evaluation.store import Computed
from demur.experiments.background_class.attacked import (
    DEFENDED,
    FORCING,
    PLAIN,
    Attack,
    Trained,
    attack_cell,
    attack_list,
)
from demur.experiments.background_class.minimum import attackers, carlini_cell
from demur.experiments.background_class.profile import Profile
from demur.experiments.cells import Run
from demur.files import digest
from demur.networks import background_class_network
from demur.training import fit

OUT_OF_DISTRIBUTION = 2000  # at most so many images of each kind


@dataclass(frozen=True)
class Material:
    """The images of a run: all classes, the names of the key classes, and of the others (the candidates)."""

    images: ImageSet
    keys: tuple[str, ...]
    candidates: tuple[str, ...]
    selection_images: ImageSet
    description: Data
    taken: str
    """A line that says which data sets were taken."""
    embedded: bool
    """Whether they are the package's own, small ones."""

    @property
    def fingerprint(self) -> str:
        """A digest of all that is measured on."""
        return digest(self.images.fingerprint, self.selection_images.fingerprint)


@dataclass(frozen=True)
class Fold:
    """One random split of the key images; with background images to train on, the rest of those kinds, and the other kinds."""

    number: int
    seed: int
    train: ImageSet
    test: ImageSet
    background: Tensor
    spare: Tensor
    others: Tensor
    kept: tuple[str, ...]
    fingerprint: str


@dataclass(frozen=True)
class Split:
    """What was measured on one split."""

    seed: int
    sizes: Mapping[str, int]
    test: ImageSet
    attacked: ImageSet
    models: Mapping[str, Trained]
    attacks: Mapping[tuple[str, Attack], NodeResult]
    carlini: Mapping[tuple[str, str], NodeResult]
    declined: Mapping[str, Mapping[str, tuple[int, int]]]


TradeOff = dict[int, list[tuple[Trained, dict[Attack, NodeResult]]]]
"""Kinds kept -> a (model, attack cells) for each repeat."""


def measure(
    profile: Profile, material: Material, kept: Sequence[str], number: int, run: Run
) -> Split:
    """Train both models on one split, attack them, and test them on out-of-distribution images."""
    fold = split(profile, material, kept, run.seed, number)
    images = (
        fold.test if profile.attacked is None else fold.test.sample(profile.attacked, fold.seed)
    )
    models = {PLAIN: train(profile, fold, False, run), DEFENDED: train(profile, fold, True, run)}
    attacked = {
        (name, attack): attack_cell(
            model, attack, images, fold.seed, f"{name}, split {number + 1}", run
        )
        for name, model in models.items()
        for attack in attack_list(profile, name)
    }
    few = fold.test.balanced(profile.carlini.per_class, fold.seed)
    nearest = {
        (name, attacker): carlini_cell(
            profile.carlini,
            models[name],
            attacker,
            few,
            fold.seed,
            f"{name}, split {number + 1}",
            run,
        )
        for name in models
        for attacker in attackers(name)
    }
    declined = {name: _declined(model, name, fold, run) for name, model in models.items()}
    sizes = {
        "train key images": len(fold.train),
        "test key images": len(fold.test),
        "train background": len(fold.background),
    }
    return Split(fold.seed, sizes, fold.test, images, models, attacked, nearest, declined)


def split(
    profile: Profile,
    material: Material,
    kept: Sequence[str],
    seed: int,
    number: int,
    key_images: int | None = None,
) -> Fold:
    """Split the key images at random; all background images are for training (none is scored), up to the share asked for."""
    own = seeds.derive(seed, "split", number)
    train_images, test = material.images.select_classes(material.keys).split(profile.held_out, own)
    if key_images is not None:
        train_images = train_images.sample(key_images, own)
    share = (
        None
        if profile.background_share is None
        else round(profile.background_share * len(train_images))
    )
    background = _of(material.images, kept, own)
    left_out = _of(material.images, [name for name in material.candidates if name not in kept], own)
    used = background[:share]
    fingerprint = material.images.fingerprint
    return Fold(
        number,
        own,
        train_images,
        test,
        used,
        background[len(used) :],
        left_out,
        tuple(kept),
        fingerprint,
    )


def _of(images: ImageSet, names: Sequence[str], seed: int) -> Tensor:
    """The images of these classes, in random order."""
    wanted = torch.tensor([images.class_names.index(name) for name in names], dtype=torch.int64)
    index = torch.isin(images.labels, wanted).nonzero().flatten()
    return images.images[
        index[torch.randperm(len(index), generator=seeds.generator(seed, "background"))]
    ]


def train(
    profile: Profile, fold: Fold, with_background: bool, run: Run, epochs: int | None = None
) -> Trained:
    """Train one model on a fold, and count its outcomes on the clean test images."""
    classes, (channels, size) = fold.train.num_classes, fold.train.images.shape[1:3]
    weights = seeds.derive(fold.seed, "weights", with_background)
    network = background_class_network(
        classes + with_background, channels=channels, size=size, seed=weights
    )
    passes = epochs or profile.epochs

    def compute(checkpoint: Path) -> Computed:
        options: dict[str, Any] = {
            "epochs": passes,
            "batch_size": profile.batch_size,
            "seed": fold.seed,
        }
        options |= {"device": run.device, "checkpoint": checkpoint}
        classifier: Classifier
        if with_background:
            classifier = BackgroundClass(network, classes).fit(
                fold.train.images, fold.train.labels, fold.background, **options
            )
        else:
            fit(network, fold.train.images, fold.train.labels, **options)
            classifier = Classifier(network, classes)
        found = outcomes(classifier, fold.test.to_float(), fold.test.labels)
        return {}, {
            "clean": found,
            **{f"network.{name}": value for name, value in network.state_dict().items()},
        }

    config = {
        "cell": "train",
        "data": fold.fingerprint,
        "keys": fold.train.class_names,
        "kept": fold.kept if with_background else (),
        "images": len(fold.train),
        "background": len(fold.background) if with_background else 0,
        "held_out": profile.held_out,
        "epochs": passes,
        "batch_size": profile.batch_size,
        "seed": fold.seed,
    }
    units = (len(fold.train) + with_background * len(fold.background)) * passes
    kind = f"{DEFENDED} ({kinds(len(fold.kept))})" if with_background else PLAIN
    cell = run.cell(f"train {kind}, split {fold.number + 1}", config, compute, units)
    # Training leaves the network channels last: a restored model must round in the same way.
    network.to(memory_format=torch.channels_last)
    network.load_state_dict(
        {
            name.removeprefix("network."): value
            for name, value in cell.tensors.items()
            if name != "clean"
        }
    )
    restored = (
        BackgroundClass(network, classes, prefit=True)
        if with_background
        else Classifier(network, classes)
    )
    return Trained(restored.to(run.device).eval(), cell.key, cell.tensors["clean"])


def _declined(model: Trained, name: str, fold: Fold, run: Run) -> dict[str, tuple[int, int]]:
    """How many out-of-distribution images of each kind a model rejects, and of how many (R21)."""
    shape = fold.test.images.shape[1:]
    noise = torch.randint(
        0,
        256,
        (OUT_OF_DISTRIBUTION, *shape),
        generator=seeds.generator(fold.seed, "noise"),
        dtype=torch.uint8,
    )
    kinds = {
        "kept kinds, images not trained on": fold.spare,
        "kinds left out": fold.others,
        "uniform noise": noise,
    }
    ood = {kind: images[:OUT_OF_DISTRIBUTION] for kind, images in kinds.items() if len(images)}

    def compute(_: Path) -> Computed:
        rejected = {
            kind: model.classifier.predict(to_float(images)) == REJECT
            for kind, images in ood.items()
        }
        return {kind: [int(found.sum()), len(found)] for kind, found in rejected.items()}, {}

    shown = {kind: digest(images.contiguous().numpy().tobytes()) for kind, images in ood.items()}
    values = run.cell(
        f"out-of-distribution images, on {name}, split {fold.number + 1}",
        {"cell": "out of distribution", "model": model.key, "images": shown},
        compute,
        0,
    ).values
    return {kind: (values[kind][0], values[kind][1]) for kind in ood}


def select(profile: Profile, material: Material, run: Run) -> Selection:
    """Find the confusing kinds of background image by cross-validation over all classes; each fold is a cell."""
    settings = profile.selection
    seed = seeds.derive(run.seed, "selection")
    chosen = material.selection_images.select_classes(
        (*material.keys, *material.candidates)
    ).balanced(settings.per_class, seed)

    def fit_predict(
        train: ImageSet, test: ImageSet, *, repeat: int, fold: int, seed: int
    ) -> Tensor:
        def compute(checkpoint: Path) -> Computed:
            network = background_class_network(
                chosen.num_classes,
                channels=chosen.images.shape[1],
                size=chosen.images.shape[-1],
                seed=seeds.derive(seed, "weights"),
            )
            fit(
                network,
                train.images,
                train.labels,
                epochs=settings.epochs,
                batch_size=profile.batch_size,
                seed=seed,
                device=run.device,
                checkpoint=checkpoint,
            )
            return {}, {
                "predictions": Classifier(network, chosen.num_classes).predict(test.to_float())
            }

        config = {
            "cell": "selection",
            "data": chosen.fingerprint,
            "folds": settings.folds,
            "repeat": repeat,
            "fold": fold,
            "epochs": settings.epochs,
            "batch_size": profile.batch_size,
            "seed": seed,
        }
        name = f"selection, repeat {repeat + 1}, fold {fold + 1}"
        return run.cell(name, config, compute, len(train) * settings.epochs).tensors["predictions"]

    return confusing_classes(
        chosen,
        material.keys,
        material.candidates,
        fit_predict,
        folds=settings.folds,
        repeats=settings.repeats,
        cutoff=settings.cutoff,
        seed=seed,
    )


def kinds(count: int) -> str:
    """So many kinds of background image, in words."""
    return f"{count} kind{'s' if count != 1 else ''}"


def trade_off(profile: Profile, material: Material, selection: Selection, run: Run) -> TradeOff:
    """Keep more and more of the confusing kinds, and see what that does to clean accuracy and detection (end of sec. IV.B)."""
    settings = profile.trade_off
    ranked = [row.name for row in selection.table]
    levels: TradeOff = {}
    for count in dict.fromkeys(min(kept, len(ranked)) for kept in settings.kept):
        for repeat in range(settings.repeats):
            fold = split(
                profile,
                material,
                ranked[:count],
                seeds.derive(run.seed, "trade-off"),
                repeat,
                settings.key_images,
            )
            model = train(profile, fold, True, run, settings.epochs)
            images = fold.test.sample(profile.curve.images, fold.seed)
            name = f"{DEFENDED} ({kinds(count)}), split {repeat + 1}"
            plan = [
                attack
                for attack in attack_list(profile, DEFENDED)
                if not attack.draws and attack.steps == 1 and attack.attacker != FORCING
            ]
            levels.setdefault(count, []).append(
                (
                    model,
                    {
                        attack: attack_cell(model, attack, images, fold.seed, name, run)
                        for attack in plan
                    },
                )
            )
    return levels
