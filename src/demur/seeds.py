"""Seeds: each random draw comes from a named generator, so order, batching and resuming cannot
change it.
"""

import hashlib
import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from demur.errors import DemurError


def check_seed(seed: int) -> None:
    """Raise DemurError for a seed that numpy and torch do not both take.

    Examples
    --------
    >>> check_seed(2**32)
    Traceback (most recent call last):
    demur.errors.DemurError: the seed is a whole number from 0 to 4294967295, not 4294967296.
    """
    if not 0 <= seed < 2**32:
        raise DemurError(f"the seed is a whole number from 0 to {2**32 - 1}, not {seed}.")


def derive(seed: int, *names: object) -> int:
    """Derive a seed for one purpose from the seed of the run.

    Parameters
    ----------
    seed : int
        Seed of the run. Integers of numpy count as those of Python.
    *names : object
        Description of the purpose. Each object counts by its `repr`.

    Returns
    -------
    int
        A seed of 63 bits.

    Raises
    ------
    DemurError
        If the seed is no integer.

    Examples
    --------
    >>> derive(0, "order", 1) == derive(0, "order", 1)
    True
    >>> derive(0, "order", 1) == derive(0, "order", 2)
    False
    """
    try:
        number = operator.index(seed)
    except TypeError:
        raise DemurError(f"seed must be an integer, not {seed!r}.") from None
    text = "\x1f".join(map(repr, (number, *names)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def generator(seed: int, *names: object) -> torch.Generator:
    """Make a CPU generator for one purpose.

    Parameters
    ----------
    seed : int
        Seed of the run.
    *names : object
        Description of the purpose, as in `derive`.

    Returns
    -------
    torch.Generator
        A new generator on the CPU.

    Examples
    --------
    >>> first = torch.rand(3, generator=generator(0, "noise"))
    >>> torch.equal(first, torch.rand(3, generator=generator(0, "noise")))
    True
    """
    return torch.Generator().manual_seed(derive(seed, *names))


def image_keys(images: Tensor) -> list[int]:
    """Compute an integer key for each image from its pixels.

    Parameters
    ----------
    images : Tensor of shape (N, ...)
        The images. They count as float32.

    Returns
    -------
    list of int
        N keys. Equal images have equal keys in every batch, call and process.

    Examples
    --------
    >>> images = torch.rand(2, 1, 4, 4)
    >>> image_keys(images)[1:] == image_keys(images[1:])
    True
    """
    rows = images.detach().to("cpu", torch.float32).contiguous().flatten(1).numpy()
    return [
        int.from_bytes(hashlib.blake2b(row.tobytes(), digest_size=8).digest(), "little")
        for row in rows
    ]


def uniform(keys: Sequence[int], shape: Sequence[int], seed: int, *names: object) -> Tensor:
    """Draw from the uniform distribution on [0, 1), one row for each key.

    Parameters
    ----------
    keys : sequence of int
        N keys, as from `image_keys`.
    shape : sequence of int
        Shape of one row.
    seed : int
        Seed of the run.
    *names : object
        Description of the purpose, as in `derive`.

    Returns
    -------
    Tensor of shape (N, *shape)
        Row i depends on ``keys[i]``, the seed and the names only.

    Examples
    --------
    >>> torch.equal(uniform([1, 2], (3,), 0)[1:], uniform([2], (3,), 0))
    True
    """
    return torch.stack(
        [torch.rand(tuple(shape), generator=generator(seed, key, *names)) for key in keys]
    )


def normal(keys: Sequence[int], shape: Sequence[int], seed: int, *names: object) -> Tensor:
    """Draw from the standard normal distribution, one row for each key.

    Parameters
    ----------
    keys : sequence of int
        N keys, as from `image_keys`.
    shape : sequence of int
        Shape of one row.
    seed : int
        Seed of the run.
    *names : object
        Description of the purpose, as in `derive`.

    Returns
    -------
    Tensor of shape (N, *shape)
        Row i depends on ``keys[i]``, the seed and the names only.

    Examples
    --------
    >>> torch.equal(normal([1, 2], (3,), 0)[1:], normal([2], (3,), 0))
    True
    """
    return torch.stack(
        [torch.randn(tuple(shape), generator=generator(seed, key, *names)) for key in keys]
    )
