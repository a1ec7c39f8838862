"""Splits that follow from the content of images, and the exclusion of images that were used."""

from collections.abc import Collection, Sequence
from typing import TypeVar

import torch

from demur.data.image_source import ImageSource
from demur.errors import DemurError
from demur.seeds import derive

_Source = TypeVar("_Source", bound=ImageSource)

_SEED_BITS = 63


def split_by_hash(
    source: _Source, fractions: Sequence[float], seed: int = 0
) -> tuple[_Source, ...]:
    """Split images by the hashes of their content, for example into train, validation and test.

    The part of an image depends on its content, the fractions and the seed only. It stays the same
    when images are added, removed, renamed or moved to another class. Images with the same content
    are always in the same part. The sizes of the parts are therefore random; classes are not
    balanced.

    Parameters
    ----------
    source : ImageSource
        The images.
    fractions : sequence of float
        Expected fraction of each part, each above 0, of sum 1.
    seed : int, default=0
        Seed of the split.

    Returns
    -------
    tuple of ImageSource
        One part for each fraction, in the order of `source`.

    Raises
    ------
    DemurError
        If the fractions are wrong, or a part has no image.

    Examples
    --------
    >>> from demur import data
    >>> parts = split_by_hash(data.load("digits", "test"), (0.6, 0.2, 0.2))
    >>> sum(len(part) for part in parts)
    359
    """
    if not fractions or not min(fractions) > 0 or not abs(sum(fractions) - 1) < 1e-9:
        raise DemurError(
            f"the fractions of a split must be above 0 and sum to 1, got {list(fractions)}."
        )
    ends = torch.tensor(fractions, dtype=torch.float64).cumsum(0)
    places = torch.tensor(
        [derive(seed, "split by hash", one) / 2**_SEED_BITS for one in source.hashes],
        dtype=torch.float64,
    )
    # Rounding may leave the last end below 1.
    part_of = torch.searchsorted(ends, places, right=True).clamp(max=len(fractions) - 1)
    parts = []
    for number, fraction in enumerate(fractions):
        rows = (part_of == number).nonzero().flatten()
        if len(rows) == 0:
            raise DemurError(
                f"part {number + 1} of the split of {source.name}, {fraction:g} of "
                f"{len(source)} images, has no image. Give more images, or another seed."
            )
        parts.append(source.subset(rows))
    return tuple(parts)


def without(source: _Source, hashes: Collection[str]) -> tuple[_Source, int]:
    """Leave out the images with some hashes, such as those that a model was fitted on (R17).

    Parameters
    ----------
    source : ImageSource
        The images.
    hashes : collection of str
        Hashes as of `source.hashes`. The hash of a file differs from that of the same image in an
        array, so use the same kind of source for both.

    Returns
    -------
    rest : ImageSource
        The other images, in their order.
    left_out : int
        Number of images that were left out.

    Raises
    ------
    DemurError
        If no image remains.

    Examples
    --------
    >>> from demur import data
    >>> digits = data.load("digits", "test")
    >>> rest, left_out = without(digits, digits.hashes[:9])
    >>> len(rest), left_out
    (350, 9)
    """
    known = frozenset(hashes)
    rows = [row for row, one in enumerate(source.hashes) if one not in known]
    left_out = len(source) - len(rows)
    if not rows:
        raise DemurError(
            f"all {left_out} images of {source.name} were used to make the model: no image remains "
            "for an independent test. Give other images."
        )
    return (source.subset(rows) if left_out else source), left_out
