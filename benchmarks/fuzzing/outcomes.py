"""What a part of the fuzzer is, and what a case may end with."""

from collections.abc import Callable
from typing import Literal

import numpy as np

Outcome = Literal["valid", "refused"]
"""A result that is valid, or an error of one line (`DemurError`). Anything else is a finding: the
part raises it."""

Case = Callable[[np.random.Generator], Outcome]
"""One case: it draws everything from the generator, tries it, and raises what it must not."""

Part = Callable[[], Case]
"""Builds what all cases of a part need, once in each process, and gives the function of a case."""


class FindingError(AssertionError):
    """A case that ended without an error, but must not end so."""
