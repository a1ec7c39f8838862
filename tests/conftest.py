import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings

# How long an example takes says nothing about it on a busy machine. The examples are the same in
# each run, so that a failure is somebody's change; `HYPOTHESIS_PROFILE=random pytest` draws new
# ones.
settings.register_profile("demur", deadline=None, derandomize=True)
settings.register_profile("random", deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "demur"))


STUDIES = {"test_background_class_study", "test_localized_training_study"}
STUDIES |= {"test_neural_rejection_study"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that carry out a whole study of a paper are slow: `make test-all` runs them."""
    for item in items:
        module = getattr(item, "module", None)
        whole = "folder" in getattr(item, "fixturenames", ())
        if whole and module is not None and module.__name__ in STUDIES:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def data_root() -> Path:
    """A folder with the real data: DEMUR_DATA, or the packed copy beside the checkout, unpacked
    (what is there is kept).
    """
    if root := os.environ.get("DEMUR_DATA"):
        return Path(root)
    unpack = Path(__file__).resolve().parents[2] / "shared" / "data" / "unpack.py"
    if not unpack.is_file():
        pytest.skip("the real data is not here: set DEMUR_DATA to a data root")
    root = Path(tempfile.gettempdir()) / "demur-test-data"
    done = subprocess.run([sys.executable, unpack, root], capture_output=True, text=True)
    if done.returncode:
        pytest.fail(f"the packed data could not be unpacked:\n{done.stderr}")
    return root
