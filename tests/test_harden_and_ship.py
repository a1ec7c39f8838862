"""The example of the main job runs from the network to the answers."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from demur.loading import load_model

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "harden_and_ship.py"


@pytest.mark.slow
def test_a_model_is_audited_hardened_gated_exported_and_used(tmp_path):
    done = subprocess.run(
        [sys.executable, EXAMPLE, tmp_path / "ship"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "256 of 256 decisions are equal" in done.stdout
    assert "16 images: " in done.stderr and "rejected" in done.stderr
    before, after = (
        json.loads((tmp_path / "ship" / name / "results.json").read_text())
        for name in ("before", "after")
    )
    assert after["threats"][0]["rejected"] > 0 == before["threats"][0]["rejected"]
    safer = load_model(tmp_path / "ship" / "safer")
    assert safer.rejects and Path(safer.provenance.base).name == "base"
    noise = torch.rand(20, 1, 12, 12, generator=torch.Generator().manual_seed(1))
    assert int((safer.predict(noise) == -1).sum()) > 10
