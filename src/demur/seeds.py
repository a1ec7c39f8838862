"""Seeds: every random draw comes from a generator that is named, so that order, batching and resuming never change it."""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def derive(seed: int, *names: object) -> int:
    """A 63-bit seed for the thing that `names` describe, under the run's `seed`."""
    text = "\x1f".join(map(repr, (seed, *names)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def generator(seed: int, *names: object) -> torch.Generator:
    """A CPU generator for the thing that `names` describe, under the run's `seed`."""
    return torch.Generator().manual_seed(derive(seed, *names))


def image_keys(images: Tensor) -> list[int]:
    """One integer an image, made of its pixels: the same image has the same key in any batch, call or process."""
    rows = images.detach().to("cpu", torch.float32).contiguous().flatten(1).numpy()
    return [int.from_bytes(hashlib.blake2b(row.tobytes(), digest_size=8).digest(), "little") for row in rows]


def uniform(keys: Sequence[int], shape: Sequence[int], seed: int, *names: object) -> Tensor:
    """Uniform draws in [0, 1), shape (len(keys), *shape): row i depends on keys[i], the seed and the names alone."""
    return torch.stack([torch.rand(tuple(shape), generator=generator(seed, key, *names)) for key in keys])


def normal(keys: Sequence[int], shape: Sequence[int], seed: int, *names: object) -> Tensor:
    """Standard normal draws, shape (len(keys), *shape): row i depends on keys[i], the seed and the names alone."""
    return torch.stack([torch.randn(tuple(shape), generator=generator(seed, key, *names)) for key in keys])
