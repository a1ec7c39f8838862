"""Background images, the "none of the above" of a set of key classes: which classes of a set may serve, and made ones.

Source: McCoyd & Wagner 2018, "Background Class Defense Against Adversarial Examples", sections IV.A, IV.B and VII.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import distance_transform_edt
from sklearn.datasets import load_sample_images
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms

from demur.classifier import check_labels
from demur.data.images import ImageSet
from demur.errors import DemurError
from demur.progress import job
from demur.seeds import derive, generator

GREY_LEVELS = 16  # level sets of an image that a morph interpolates
MORPHS_AT_ONCE = 64


def with_background(images: ImageSet, keys: Sequence[str], background: Sequence[str], name: str = "background") -> ImageSet:
    """Keep the key classes in the given order, and make one last class, `name`, of all background classes' images.

    Raises: DemurError for an unknown class, one that is named twice, no background class, or a key class called `name`.
    """
    if not background:
        raise DemurError("a background class needs at least one class of background images.")
    if name in keys:
        raise DemurError(f"the background class cannot be called {name!r}: a key class is.")
    return images.merged({**{images.class_names[i]: [i] for i in images.class_indices(keys)}, name: background})


class FitPredict(Protocol):
    """Trains a classifier on one set and predicts the classes of another."""

    def __call__(self, train: ImageSet, test: ImageSet, *, repeat: int, fold: int, seed: int) -> Tensor:
        """Predict (N,) labels of the N test images, over all classes of the sets.

        `repeat` and `fold` say which part of the cross-validation it is; `seed` is that part's own.
        """
        ...


@dataclass(frozen=True)
class CandidateRate:
    """How a candidate class fared: its images, and the share of their predictions that are any candidate class."""

    name: str
    images: int
    rate: float
    confused_with: str | None
    """The key class that its images are most often mistaken for; None if they never are."""
    confused_rate: float
    """The share of its predictions that are this key class."""


@dataclass(frozen=True)
class Selection:
    """The outcome of `confusing_classes`: the candidates by rate, highest first, and the cutoff for keeping them."""

    table: tuple[CandidateRate, ...]
    cutoff: float
    images: int
    """The images (of keys and candidates) that were cross-validated."""

    @property
    def kept(self) -> tuple[str, ...]:
        """The candidates that make good background images: seldom mistaken for a key class."""
        return self.at(self.cutoff)

    @property
    def dropped(self) -> tuple[str, ...]:
        """The confusing candidates."""
        return tuple(row.name for row in self.table if row.rate < self.cutoff)

    def at(self, cutoff: float) -> tuple[str, ...]:
        """The candidates that would be kept at another cutoff, by rate, the highest first."""
        return tuple(row.name for row in self.table if row.rate >= cutoff)


def confusing_classes(
    images: ImageSet,
    keys: Sequence[str],
    candidates: Sequence[str],
    fit_predict: FitPredict,
    *,
    folds: int = 10,
    repeats: int = 4,
    cutoff: float = 0.98,
    seed: int = 0,
) -> Selection:
    """Find the candidate classes that look like a key class, by repeated cross-validation (paper, section IV.A).

    A classifier of all classes is trained on each training part; a candidate class is kept if at least `cutoff` of the
    predictions for its images, over all folds and repeats, are any candidate class. Only images of keys and candidates
    take part; they keep their labels.

    Raises: DemurError for classes that are unknown, named twice or too rare for the folds, and for predictions that are
        not labels of the set.
    """
    if repeats < 1 or not 0 <= cutoff <= 1:
        raise DemurError(f"repeats must be at least 1 and the cutoff in [0, 1], not {repeats} and {cutoff:g}.")
    if not keys or not candidates:
        raise DemurError("a selection needs at least one key class and one candidate class.")
    chosen = torch.tensor(images.class_indices([*keys, *candidates]))
    key_labels, candidate_labels = chosen[: len(keys)], chosen[len(keys) :]
    part = images.subset(torch.isin(images.labels, chosen).nonzero().flatten())
    for label in chosen.tolist():
        if int(part.counts()[label]) < folds:
            raise DemurError(
                f"class {images.class_names[label]!r} of {images.name} has {int(part.counts()[label])} images: too few for {folds} folds."
            )
    confusion = torch.zeros(images.num_classes, images.num_classes, dtype=torch.int64)
    with job("selecting background classes", repeats * folds) as progress:
        for repeat in range(repeats):
            for fold, (train, test) in enumerate(part.folds(folds, derive(seed, "repeat", repeat))):
                test_set = part.subset(test)
                part_seed = derive(seed, "selection", repeat, fold)
                predicted = fit_predict(part.subset(train), test_set, repeat=repeat, fold=fold, seed=part_seed).cpu()
                check_labels(predicted, len(test_set), images.num_classes)
                pairs = test_set.labels * images.num_classes + predicted
                confusion += torch.bincount(pairs, minlength=confusion.numel()).view_as(confusion)
                progress.advance(1)
    rates = confusion.double() / confusion.sum(dim=1, keepdim=True)
    rows = []
    for label in candidate_labels.tolist():
        confused = key_labels[rates[label, key_labels].argmax()]
        confused_rate = float(rates[label, confused])
        rows.append(
            CandidateRate(
                images.class_names[label],
                int(part.counts()[label]),
                float(rates[label, candidate_labels].sum()),
                images.class_names[confused] if confused_rate else None,
                confused_rate,
            )
        )
    return Selection(tuple(sorted(rows, key=lambda row: (-row.rate, row.name))), cutoff, len(part))


def chopped(images: Tensor, n: int, parts: int = 2, seed: int = 0) -> Tensor:
    """Cut images into parts x parts pieces and put pieces together anew: (n, C, H, W) uint8 (paper, section VII.C).

    Half of the results are pieces of one image, half of several. No piece is where it was: the places are exchanged in
    one cycle, so that neither an image nor its two halves swapped come out.

    Raises: DemurError unless images are uint8 (N, C, H, W) whose sides `parts` (at least 2) divides.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or len(images) == 0:
        raise DemurError(f"chopping needs uint8 images (N, C, H, W), not {images.dtype} {tuple(images.shape)}.")
    count, channels, height, width = images.shape
    if parts < 2 or height % parts or width % parts:
        raise DemurError(f"images of {width}x{height} cannot be cut into {parts}x{parts} equal pieces.")
    _check_number(n)
    draw = generator(seed, "chopped", parts)
    source = torch.randint(count, (n, parts**2), generator=draw)
    from_one = torch.rand(n, 1, generator=draw) < 0.5
    source = torch.where(from_one, source[:, :1], source)
    order = torch.rand(n, parts**2, generator=draw).argsort(dim=1)
    piece = torch.empty_like(order).scatter_(1, order, order.roll(1, dims=1))  # one random cycle through all places
    pieces = images.view(count, channels, parts, height // parts, parts, width // parts).permute(0, 2, 4, 1, 3, 5)
    picked = pieces[source, piece // parts, piece % parts]  # (n, parts * parts, C, H / parts, W / parts)
    picked = picked.view(n, parts, parts, channels, height // parts, width // parts).permute(0, 3, 1, 4, 2, 5)
    return picked.reshape(n, channels, height, width)


def morphs(images: ImageSet, n: int, fraction: float, seed: int = 0, pairs: Tensor | None = None) -> Tensor:
    """Change images `fraction` of the way into images of another class: (n, C, H, W) uint8 (paper, section VII.B).

    The shape at each of 16 grey levels moves: the signed squared distances to its edge are interpolated, and cut where
    the area is the interpolated area. (Squares, because between strokes that do not overlap their sum is least at that
    fraction of the way, where plain distances would jump from one to the other; the area, because at distance 0 such
    strokes would vanish.) At fraction 0 and 1 the two images come out, up to the grey levels' width; colours are
    morphed one channel at a time.

    Args:
        pairs: (n, 2) indices of the images to morph; by default drawn at random, of different classes.

    Raises: DemurError for a fraction outside [0, 1], pairs of another shape, or images of one class only.
    """
    if not 0 <= fraction <= 1:
        raise DemurError(f"a morph's fraction lies in [0, 1], not {fraction:g}.")
    _check_number(n)
    pairs = _pairs(images.labels, n, seed) if pairs is None else pairs
    if pairs.shape != (n, 2):
        raise DemurError(f"pairs must have shape ({n}, 2), not {tuple(pairs.shape)}.")
    first, second = (images.subset(column).images.numpy() for column in pairs.unbind(1))
    chunks = [slice(start, start + MORPHS_AT_ONCE) for start in range(0, n, MORPHS_AT_ONCE)]
    return torch.from_numpy(np.concatenate([_morph(first[chunk], second[chunk], fraction) for chunk in chunks]))


def _pairs(labels: Tensor, n: int, seed: int) -> Tensor:
    """Indices (n, 2) of images of different classes."""
    draw = generator(seed, "pairs")
    first = torch.randint(len(labels), (n,), generator=draw)
    counts = torch.bincount(labels)
    others = len(labels) - counts[labels[first]]
    if int(others.min()) == 0:
        raise DemurError("a morph needs images of two different classes, but all are of one.")
    # the images by class; draw among those before and after the first one's class
    by_class, starts = labels.argsort(stable=True), counts.cumsum(0) - counts
    drawn = (torch.rand(n, generator=draw, dtype=torch.float64) * others).long()
    drawn += torch.where(drawn >= starts[labels[first]], counts[labels[first]], 0)
    return torch.stack([first, by_class[drawn]], dim=1)


def _morph(first: NDArray[np.uint8], second: NDArray[np.uint8], fraction: float) -> NDArray[np.uint8]:
    """Morph images (n, C, H, W), each pair by the level sets between its darkest and its brightest pixel."""
    (low, high, distance, area), (other_low, other_high, other_distance, other_area) = map(_level_sets, (first, second))
    mixed = ((1 - fraction) * distance + fraction * other_distance).reshape(*area.shape, -1)
    pixels = np.rint((1 - fraction) * area + fraction * other_area).astype(np.int64)[..., None]
    ranked = np.sort(mixed, axis=-1)[..., ::-1]
    inside = np.take_along_axis(ranked, np.maximum(pixels - 1, 0), axis=-1)
    outside = np.take_along_axis(ranked, np.minimum(pixels, ranked.shape[-1] - 1), axis=-1)
    filled = (mixed - (inside + outside) / 2 + 0.5).clip(0, 1)  # with a soft edge
    grey = filled.mean(axis=0).reshape(first.shape)
    mixed_low, mixed_high = (1 - fraction) * low + fraction * other_low, (1 - fraction) * high + fraction * other_high
    morphed: NDArray[np.uint8] = np.rint(mixed_low + (mixed_high - mixed_low) * grey).astype(np.uint8)
    return morphed


def _level_sets(
    images: NDArray[np.uint8],
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]:
    """Find the darkest and brightest pixels (n, C, 1, 1), and what is brighter than each grey level between them.

    Of that, the squared distances (levels, n, C, H, W) to its edge, positive within, and its area (levels, n, C).
    """
    low, high = (extreme(axis=(2, 3), keepdims=True).astype(np.float64) for extreme in (images.min, images.max))
    levels = (np.arange(GREY_LEVELS) + 0.5).reshape(-1, 1, 1, 1, 1) / GREY_LEVELS
    inside = images > low + levels * (high - low)
    # one transform of all level sets, stacked too far apart to see each other
    stack = inside.reshape(-1, *images.shape[2:])
    apart = (1e6, 1, 1)
    signed = distance_transform_edt(stack, sampling=apart) - distance_transform_edt(~stack, sampling=apart)
    reach = sum(images.shape[2:])  # an image of one colour has no edge at all
    return low, high, (signed * abs(signed)).clip(-(reach**2), reach**2).reshape(inside.shape), inside.sum(axis=(3, 4))


def foreign(photos: Sequence[Tensor] | Tensor, n: int, shape: Sequence[int], seed: int = 0) -> Tensor:
    """Crop foreign images (C, H, W) at random, brought to `shape` (C, H, W): (n, C, H, W) uint8 (paper, section VII.C).

    Crops have the proportions of `shape` and are between its size and as large as fits; an image that is smaller than
    `shape` is enlarged.

    Raises: DemurError for no images, images that are not uint8 with 1 or 3 channels, or a shape with other channels.
    """
    channels, height, width = shape
    if len(photos) == 0 or any(photo.dtype != torch.uint8 or photo.ndim != 3 or len(photo) not in (1, 3) for photo in photos):
        raise DemurError("foreign images must be uint8 (C, H, W) with 1 or 3 channels, and at least one.")
    if channels not in (1, 3):
        raise DemurError(f"foreign images can be brought to 1 or 3 channels, not {channels}.")
    _check_number(n)
    draw = generator(seed, "foreign")
    chosen = torch.randint(len(photos), (n,), generator=draw).tolist()
    crops = []
    for index, (size, top, left) in zip(chosen, torch.rand(n, 3, generator=draw).tolist(), strict=True):
        photo = photos[index]
        largest = min(photo.shape[1] / height, photo.shape[2] / width)
        scale = min(largest, max(1.0, largest) ** size)
        rows, columns = max(1, int(scale * height)), max(1, int(scale * width))
        corner = int(top * (photo.shape[1] - rows + 1)), int(left * (photo.shape[2] - columns + 1))
        crop = transforms.resized_crop(photo, *corner, rows, columns, [height, width], antialias=True)
        crops.append(transforms.rgb_to_grayscale(crop) if channels == 1 else transforms.grayscale_to_rgb(crop))
    return torch.stack(crops)


def photo_patches(n: int, size: int, channels: int = 1, seed: int = 0) -> Tensor:
    """Crop scikit-learn's two embedded photographs at random: (n, channels, size, size) uint8."""
    photos = [torch.from_numpy(photo.copy()).permute(2, 0, 1) for photo in load_sample_images().images]
    return foreign(photos, n, (channels, size, size), seed)


def _check_number(n: int) -> None:
    if n < 1:
        raise DemurError(f"cannot make {n} background images; make at least 1.")


def embedded_backgrounds(digits: ImageSet, per_kind: int, seed: int = 0, source: ImageSet | None = None) -> ImageSet:
    """Add made candidate classes of `per_kind` images each to `digits`, so that embedded data has a background too.

    The classes are "chopped", "morph 30 %", "morph 50 %", "morph 70 %" and "photo patches"; the first four are made of the
    images of `source`, else of `digits` itself.

    Raises: DemurError unless per_kind is at least 1 and the images are square, with an even side.
    """
    channels, height, width = digits.images.shape[1:]
    if height != width:
        raise DemurError(f"made background images need square images, not {width}x{height}.")
    source = source or digits
    made = {
        "chopped": chopped(source.images, per_kind, seed=seed),
        **{f"morph {percent} %": morphs(source, per_kind, percent / 100, derive(seed, percent)) for percent in (30, 50, 70)},
        "photo patches": photo_patches(per_kind, height, channels, seed),
    }
    labels = torch.arange(len(made)).repeat_interleave(per_kind) + digits.num_classes
    return ImageSet(
        torch.cat([digits.images, *made.values()]),
        torch.cat([digits.labels, labels]),
        (*digits.class_names, *made),
        f"{digits.name} + made backgrounds",
    )
