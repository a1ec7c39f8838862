"""The regression set: each broken defence is flagged by a check that should flag it, no honest
model is.
"""

import sys
from pathlib import Path

import pytest

import demur
from demur import data, hardware
from demur.evaluation.handshake import HandshakeError

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from broken_models import BROKEN, EPS, HONEST, embedded

IMAGES = 30
FLAGGED_BY = {
    "kWTA activations": {"white-box >= black-box"},
    "quantised input": {"unavailable gradients"},
    "sparse activations": {"unavailable gradients"},
    "saturated softmax": {"unavailable gradients"},
    "detached gradient": {"unconstrained failure"},
    "call counter": {"hidden state"},
    "compression": {"unavailable gradients"},
    "checkerboard": {"unstable predictions"},
    "sign detector": {"unconstrained failure"},
    "temperature-scaled detector": {"unavailable gradients"},
}
REFUSED = {
    "batch statistics": "scores depend on the other images of the batch",
    "reseeding": "scores depend on the other images of the batch",
}
RANDOMISED = "randomised input"


@pytest.fixture(autouse=True)
def in_float32(monkeypatch):
    """Models are trained and attacked in float32: they are the same ones on all machines."""
    monkeypatch.setattr(hardware, "_cpu_has_bfloat16", lambda: False)


def audited(model):
    images = data.load("digits", "test").sample(IMAGES, seed=0)
    return demur.audit(model, images, [f"linf:{EPS}"], device="cpu")


def test_the_set_is_complete():
    assert len(BROKEN) == 13
    assert len(HONEST) == 10
    assert {*FLAGGED_BY, *REFUSED, RANDOMISED} == set(BROKEN)


@pytest.mark.slow
@pytest.mark.parametrize("name", FLAGGED_BY)
def test_a_broken_model_is_flagged_by_its_check(name):
    """R14, R15."""
    found = audited(BROKEN[name](embedded()))
    flagged = {check.name for check in found.results.checks if check.state == "flagged"}
    assert flagged >= FLAGGED_BY[name]
    assert found.verdict == "unsound"


@pytest.mark.slow
@pytest.mark.parametrize("name", REFUSED)
def test_the_handshake_refuses_a_model_whose_answers_depend_on_the_batch(name):
    """R16."""
    with pytest.raises(HandshakeError, match=REFUSED[name]):
        audited(BROKEN[name](embedded()))


@pytest.mark.slow
def test_a_randomised_model_is_doubtful():
    """R15. Its mean is attacked, and no figure of it is called sound."""
    found = audited(BROKEN[RANDOMISED](embedded()))
    assert found.verdict == "doubtful"
    assert "The model is randomised." in found.results.doubts


@pytest.mark.slow
@pytest.mark.parametrize("name", HONEST)
def test_an_honest_model_is_not_flagged(name):
    found = audited(HONEST[name](embedded()))
    assert [check.name for check in found.results.checks if check.state == "flagged"] == []
    assert found.verdict == "sound"
