"""Self-tests that ask the model itself, beside those that are queries over records.

Each test is a probe: a frozen dataclass that a `SelfTest` node runs on a few images. The rows of
the report are made from what the probes found.
"""

from demur.evaluation.selftests.binarization import Binarization
from demur.evaluation.selftests.constancy import Constancy
from demur.evaluation.selftests.convergence import Convergence
from demur.evaluation.selftests.node import Probe, SelfTest
from demur.evaluation.selftests.stability import Stability

__all__ = ["Binarization", "Constancy", "Convergence", "Probe", "SelfTest", "Stability"]
