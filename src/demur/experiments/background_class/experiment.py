"""The background-class experiment from end to end: its images, its cells, its tables and its gallery."""

from pathlib import Path

import torch

from demur import data, seeds
from demur.data import ImageSet, NoSplitError, synthetic_backgrounds
from demur.errors import DemurError
from demur.evaluation.pictures import describe, mixed
from demur.evaluation.results import Curve, Data, Picture, Table, write_gallery
from demur.experiments.background_class import cells, minimum
from demur.experiments.background_class.attacked import (
    ATTACK_WORK,
    AWARE,
    DEFENDED,
    NAIVE,
    PLAIN,
    attack_list,
    curve_against_eps,
    curve_against_rejection,
)
from demur.experiments.background_class.cells import Material, Split
from demur.experiments.background_class.profile import Profile
from demur.experiments.background_class.tables import Sheets
from demur.experiments.cells import Run
from demur.networks import background_class_network
from demur.studies.material import counted, first_at_hand, load_entry, passed_over

TITLE = "Background class"
SOURCE = "McCoyd & Wagner 2018, Background Class Defense Against Adversarial Examples"
MADE_FROM = 0.2  # of a set without a test split, as much as the embedded digits have in theirs


def prepare(profile: Profile, data_root: Path | None, seed: int) -> Material:
    """Load the images, and find what will not work with them before anything is written."""
    known = {status.name: status for status in data.list_datasets(data_root)}
    entry = first_at_hand(profile.data, known)
    images = load_entry(entry, data_root)
    if profile.made_per_kind:
        images, source = _apart(entry, images, data_root, seeds.derive(seed, "made of"))
        images = synthetic_backgrounds(
            images, profile.made_per_kind, seeds.derive(seed, "made"), source
        )
    selection_entry = first_at_hand(profile.selection.data or (entry,), known)
    selection = load_entry(selection_entry, data_root) if profile.selection.data else images
    keys = tuple(profile.keys)
    candidates = tuple(name for name in images.class_names if name not in keys)
    chosen = candidates if profile.background == "selected" else tuple(profile.background)
    if not chosen:
        raise DemurError(
            f"{images.name} has no classes but the key classes: nothing is left for the background."
        )
    images.select_classes((*keys, *chosen))
    _, held_out = images.select_classes(keys).split(profile.held_out, seed)
    if len(held_out) <= profile.curve.images:
        raise DemurError(
            f"curve.images is {profile.curve.images}, but only {len(held_out)} are held out, and some must be left to set a threshold."
        )
    rarest = int(held_out.counts().min())
    if rarest < profile.carlini.per_class:
        raise DemurError(
            f"carlini.per_class is {profile.carlini.per_class}, but of one class only {rarest} images are held out."
        )
    settings = profile.selection
    selection.select_classes((*keys, *candidates)).balanced(settings.per_class, seed)
    if settings.folds > settings.per_class:
        raise DemurError(
            f"selection.folds is {settings.folds}, but there are only {settings.per_class} images of a class."
        )
    for part in (images, selection):
        channels, height, width = part.images.shape[1:]
        if height != width:
            raise DemurError(
                f"the background-class network needs square images; those of {part.name} are {height}x{width}."
            )
        background_class_network(2, channels=channels, size=height)
    taken = f"Data: {counted(images)}{passed_over(profile.data, entry, data_root)}."
    if profile.selection.data:
        taken += f" The selection's: {counted(selection)}{passed_over(profile.selection.data, selection_entry, data_root)}."
    where = {known[one].where if one in known else "" for one in (entry, selection_entry)}
    rooted = bool(where - {"", "embedded"})
    description = Data(images.name, images.fingerprint, len(images), images.num_classes, rooted)
    return Material(
        images, keys, candidates, selection, description, taken, embedded=where == {"embedded"}
    )


def _apart(entry: str, images: ImageSet, root: Path | None, seed: int) -> tuple[ImageSet, ImageSet]:
    """The images to train and test on, and those to make backgrounds of: no image is both, since a morph of one that is tested
    would be a hint. The latter are the test split, which is not used otherwise, or else a part of the set that is held out for them.
    """
    try:
        return images, data.load(entry, "test", root)
    except NoSplitError:
        return images.split(MADE_FROM, seed)


def work(profile: Profile, material: Material) -> float:
    """Units of work, about one image trained on once, for the time left."""
    counts = material.images.select_classes(material.keys).counts()
    keys, share = int(counts.sum()) * (1 - profile.held_out), profile.background_share or 0.9
    selection, trade, curve = profile.selection, profile.trade_off, profile.curve
    trained = profile.splits * keys * profile.epochs * (2 + share)
    plans = sum(
        attack.work for model in (PLAIN, DEFENDED) for attack in attack_list(profile, model)
    )
    attacked = profile.splits * plans * (profile.attacked or int(counts.sum()) * profile.held_out)
    attacked += curve.images * (
        4 * len(curve.eps) + 2 * len(curve.rejected) + 6 * len(trade.kept) * trade.repeats
    )
    classes = len(material.keys) + len(material.candidates)
    smallest = (
        profile.splits
        * 5
        * profile.carlini.per_class
        * len(material.keys)
        * minimum.work(profile.carlini)
    )
    selected = (
        selection.per_class * classes * selection.repeats * (selection.folds - 1) * selection.epochs
    )
    traded = (
        len(trade.kept) * trade.repeats * min(keys, trade.key_images) * trade.epochs * (1 + share)
    )
    return trained + ATTACK_WORK * attacked + smallest + selected + traded


def carry_out(
    profile: Profile, material: Material, run: Run, out: Path
) -> tuple[list[Table], list[Curve], list[str], list[str]]:
    """Run all cells; write the gallery; give the tables, the curves, the summary and the warnings."""
    selection = cells.select(profile, material, run)
    kept = selection.kept if profile.background == "selected" else tuple(profile.background)
    if not kept:
        cutoff = profile.selection.cutoff
        raise DemurError(
            f"no kind of background image is told apart from the keys at the cutoff of {cutoff:g}: lower it."
        )
    splits = [
        cells.measure(profile, material, kept, number, run) for number in range(profile.splits)
    ]
    sheets = Sheets(
        profile,
        material,
        selection,
        kept,
        splits,
        cells.trade_off(profile, material, selection, run),
    )
    curves = _curves(profile, splits[0], run)
    _write_pictures(profile, splits[0], out)
    return sheets.tables(), curves, sheets.summary(), sheets.warnings()


def _curves(profile: Profile, first: Split, run: Run) -> list[Curve]:
    """Both curves, on part of the first split's test images; the rest sets the thresholds."""
    order = torch.randperm(len(first.test), generator=seeds.generator(first.seed, "curve"))
    images = first.test.subset(order[: profile.curve.images])
    validation = first.test.subset(order[profile.curve.images :])
    return [
        curve_against_eps(profile, dict(first.models), images, first.seed, run),
        curve_against_rejection(
            profile, first.models[DEFENDED], images, validation, first.seed, run
        ),
    ]


def _write_pictures(profile: Profile, first: Split, out: Path) -> None:
    """Choose pictures of the first split for the gallery: the same number of each model and attack, and of each outcome where there are.

    They take turns, the defended model's first, so that the first cards are a fair mix.
    """
    pairs = [(name, attack) for name, attack in first.attacks if attack.attacker in (NAIVE, AWARE)]
    pairs.sort(key=lambda pair: pair[0] != DEFENDED)
    each = profile.gallery // len(pairs)
    described: list[list[Picture]] = []
    originals, attacked = [], []
    for number, (name, attack) in enumerate(pairs):
        tensors = first.attacks[name, attack].tensors
        index = torch.tensor(mixed(tensors["stored_outcomes"], number)[:each], dtype=torch.int64)
        originals.append(first.attacked.images[index])
        attacked.append(tensors["images"][index])
        if each:
            named = f"{attack.name} eps {attack.eps:g}"
            shown = first.attacked.subset(index)
            described.append(
                list(
                    describe(
                        first.models[name].classifier,
                        name,
                        named,
                        attack.attacker,
                        shown,
                        attacked[-1],
                    )
                )
            )
    # Each pair has as many pictures as the others: `each`, or all images.
    pictures = [picture for turn in zip(*described, strict=True) for picture in turn]
    write_gallery(
        out, pictures, *(torch.stack(parts, dim=1).flatten(0, 1) for parts in (originals, attacked))
    )
