"""What a part of the fuzzer is, and what a case may end with."""

import random
import warnings
from collections.abc import Callable
from typing import Literal

import numpy as np
import torch

from demur.errors import DemurError, DemurWarning

Outcome = Literal["valid", "refused"]
"""A result that is valid, or an error of one line (`DemurError`). Anything else is a finding: the
part raises it."""

Case = Callable[[np.random.Generator], Outcome]
"""One case: it draws everything from the generator, tries it, and raises what it must not."""

Part = Callable[[], Case]
"""Builds what all cases of a part need, once in each process, and gives the function of a case."""


def seeded(tried: Callable[[random.Random], str]) -> Case:
    """Make a case of a function that draws from Python's own generator."""
    torch.set_num_threads(1)

    def case(rng: np.random.Generator) -> Outcome:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                warnings.simplefilter("ignore", DemurWarning)
                tried(random.Random(int(rng.integers(1 << 62))))
        except DemurError as error:
            if "\n" in str(error) or not str(error).strip():
                raise FindingError(f"a message of no or several lines: {error!r}") from error
            return "refused"
        return "valid"

    return case


class FindingError(AssertionError):
    """A case that ended without an error, but must not end so."""
