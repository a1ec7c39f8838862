"""The images of the background-class study, and what does not fit them."""

from dataclasses import dataclass, replace
from pathlib import Path

from demur import data, seeds
from demur.data import ImageSet, NoSplitError, synthetic_backgrounds
from demur.errors import DemurError
from demur.evaluation.results import Data
from demur.files import digest
from demur.networks import background_class_network
from demur.studies.background_class.profile import Profile
from demur.studies.material import check_square, counted, load_first

MADE_FROM = 0.2
"""Of a set without a test split: about the share of the embedded digits' test split."""


@dataclass(frozen=True)
class Material:
    """Images, key classes, the other classes (candidates for the background), what was taken."""

    images: ImageSet
    keys: tuple[str, ...]
    candidates: tuple[str, ...]
    for_selection: ImageSet
    data: Data
    taken: str
    embedded: bool


def gather(profile: Profile, data_root: Path | None, seed: int) -> Material:
    """Load the images. Raise DemurError if data is missing, or the profile does not fit it."""
    main = load_first(profile.data, data_root)
    images = main.images
    if profile.made_per_kind:
        # No image is both tested and made a background of: a morph of it would be a hint.
        try:
            source = data.load(main.entry, "test", data_root)
        except NoSplitError:
            images, source = images.split(MADE_FROM, seeds.derive(seed, "made of"))
        made = seeds.derive(seed, "made")
        images = synthetic_backgrounds(images, profile.made_per_kind, made, source)
    other = replace(main, images=images)
    taken = f"Data: {counted(images)}{main.missing}."
    if profile.selection.data:
        other = load_first(profile.selection.data, data_root)
        taken += f" The selection's: {counted(other.images)}{other.missing}."
    keys = tuple(profile.keys)
    candidates = tuple(name for name in images.class_names if name not in keys)
    _check(profile, images, keys, candidates, seed)
    for part in (images, other.images):
        check_square(part, part.name)
        channels, size, _ = part.image_shape
        background_class_network(2, channels=channels, size=size)
    where = {main.where, other.where}
    content = digest(images.fingerprint, other.images.fingerprint)
    rooted = bool(where - {"", "embedded"})
    said = Data(images.name, content, len(images), images.num_classes, rooted)
    embedded = where == {"embedded"}
    return Material(images, keys, candidates, other.images, said, taken, embedded)


def _check(
    profile: Profile, images: ImageSet, keys: tuple[str, ...], others: tuple[str, ...], seed: int
) -> None:
    chosen = others if profile.background == "selected" else tuple(profile.background)
    if not chosen:
        raise DemurError(f"{images.name} has no classes but the key classes for the background.")
    if f"{profile.fgs_eps:g}" == f"{profile.fg_eps:g}":
        raise DemurError("fgs_eps and fg_eps must differ: the tables tell attacks apart by eps.")
    images.select_classes((*keys, *chosen))
    train, held_out = images.select_classes(keys).split(profile.held_out, seed)
    share = profile.background_share
    if share is not None and round(share * len(train)) == 0:
        raise DemurError(f"background_share is {share:g}: no background image is trained on.")
    wanted = profile.curve.images
    if len(held_out) <= wanted:
        raise DemurError(
            f"curve.images is {wanted}, but only {len(held_out)} are held out, and some must be "
            "left to set a threshold."
        )
    wanted = profile.carlini.per_class
    rarest = int(held_out.counts().min())
    if rarest < wanted:
        raise DemurError(
            f"carlini.per_class is {wanted}, but of one class only {rarest} images are held out."
        )
