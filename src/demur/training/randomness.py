"""Global random states: seeded for datasets and networks, and restored."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def preserved_randomness() -> Iterator[None]:
    """Restore the global random states of torch, numpy and Python after the block.

    Examples
    --------
    >>> state = random.getstate()
    >>> with preserved_randomness():
    ...     random.seed(0)
    >>> random.getstate() == state
    True
    """
    of_python = random.getstate()
    of_numpy = np.random.get_state()  # noqa: NPY002 - datasets draw from it
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)  # noqa: NPY002


def seed_globals(seed: int) -> None:
    """Seed the global random states of torch (CPU), numpy and Python."""
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002


def seed_step(device: torch.device, seed: int) -> None:
    """Seed the draws inside the network."""
    # Not by torch.manual_seed: without a GPU it queues a seed for one at every call.
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
