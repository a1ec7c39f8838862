"""Checks of records: each flags what it is for, and nothing else."""

import polars as pl
import pytest

from demur.evaluation.checks import check
from demur.evaluation.records import SCHEMA


def rows(attacker, attack, outcomes, **values):
    """Records of one attack on images 0, 1, ..."""
    usual = {
        "dataset": "digits",
        "split": "test",
        "repeat": 0,
        "model": "m",
        "attacker": attacker,
        "attack": attack,
        "norm": "linf" if attack else None,
        "eps": 0.1 if attack else None,
        "goal": "evade" if attack else None,
        "backwards": 10,
        "zero_gradients": 0,
    }
    return [
        {
            **usual,
            "index": place,
            "image": str(place),
            "outcome": outcome,
            "success": outcome == "wrong",
            **values,
        }
        for place, outcome in enumerate(outcomes)
    ]


def findings(*parts):
    records = pl.DataFrame([row for part in parts for row in part], schema=SCHEMA)
    return [(one.check, str(one)) for one in check(records)]


SOUND = [
    rows("none", None, ["correct", "correct", "wrong"], backwards=None, zero_gradients=None),
    rows("defence-unaware", "PGD()", ["correct", "correct", "wrong"]),
    rows("defence-aware", "PGD(steps=40)", ["wrong", "correct", "wrong"]),
    rows("defence-aware", "FGSM()", ["correct", "correct", "wrong"]),
    rows("defence-aware", "RandomNoise(10)", ["correct", "correct", "wrong"], backwards=0),
    rows("defence-aware", "PGD(steps=40)", ["wrong", "wrong", "wrong"], eps=0.2),
    rows("strongest", "Strongest()", ["wrong", "correct", "wrong"]),
]


def test_one_step_is_compared_with_many_steps_on_the_same_images():
    elsewhere = rows("defence-aware", "FGSM()", ["wrong"] * 3, split="others")
    assert findings(*SOUND, elsewhere) == []


def test_sound_attacks_are_not_flagged():
    assert findings(*SOUND) == []


@pytest.mark.parametrize(
    ("name", "part", "said"),
    [
        (
            "blind gradients",
            rows("defence-aware", "APGD()", ["wrong"] * 3, zero_gradients=2),
            "m: 20 % of the gradients of APGD() were zero",
        ),
        (
            "defence-unaware beats defence-aware",
            rows("defence-unaware", "DDN()", ["wrong"] * 3),
            "breaks 3 images, the defence-aware one 2",
        ),
        (
            "noise beats attacks",
            rows("defence-aware", "RandomNoise(100)", ["wrong"] * 3, backwards=0),
            "within linf 0.1 breaks 1 image that no attack breaks",
        ),
        (
            "single step beats iterative",
            rows("defence-aware", "FGM()", ["wrong"] * 3),
            "breaks 3 images, many steps break 2",
        ),
        (
            "success falls with eps",
            rows("defence-aware", "PGD(steps=40)", ["correct", "correct", "wrong"], eps=0.3),
            "succeeds on 3 images at eps 0.2 and on 1 of them at 0.3",
        ),
        (
            "another attack beats the ensemble",
            rows("strongest", "Strongest()", ["correct", "correct", "wrong"]),
            "m: within linf 0.1, other attacks break 1 image that the ensemble does not break",
        ),
        (
            "near chance",
            [
                {**row, "label": row["index"] % 2}
                for row in rows("none", None, ["correct", "wrong"] * 20, split="other")
            ],
            "the accuracy on clean images, 35.2 to 64.8 %, is close to chance",
        ),
    ],
)
def test_each_fault_is_flagged_once_by_its_check(name, part, said):
    parts = [*SOUND[:-1], part]
    if name == "defence-unaware beats defence-aware":
        parts = [SOUND[0], SOUND[1], SOUND[2], part]
    found = findings(*parts)
    assert [one for one, _ in found] == [name]
    assert said in found[0][1]


def test_other_models_and_threats_do_not_mix():
    """Noise at a larger eps, or on another model, is no fault of the attacks."""
    larger = rows("defence-aware", "RandomNoise(9)", ["wrong"] * 3, eps=0.9, backwards=0)
    other = rows("defence-aware", "RandomNoise(9)", ["wrong"] * 3, model="n", backwards=0)
    assert findings(*SOUND, larger, other) == []


def test_no_records_no_findings():
    assert findings() == []
