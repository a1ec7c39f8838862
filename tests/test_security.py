"""Outcomes against the size of an attack and against the threshold, as queries over records."""

import math

import polars as pl
import pytest
import torch
from torch import nn

from demur import Classifier, ThreatModel
from demur.attacks import PGD
from demur.data import ImageSet
from demur.evaluation.curves import shifted
from demur.evaluation.records import SCHEMA
from demur.evaluation.thresholds import AtThreshold, decided, offsets
from demur.studies.rejection import implied_accuracy, near_rejections
from demur.studies.security import at_each_eps, counts, eps_curve, eps_table, lenient
from demur.studies.security import smallest_changes as smallest

TITLES = {"defence-unaware": "unaware", "defence-aware": "aware"}


def record(index, attacker, eps, size, outcome):
    place = {"dataset": "d", "split": "test", "repeat": 0, "index": index, "image": f"{index}"}
    found = {"attacker": attacker, "eps": eps, "l2": size, "outcome": outcome}
    return {**place, **found, "model": "m"}


def frame(rows):
    return pl.DataFrame(rows, schema_overrides={"outcome": SCHEMA["outcome"]})


@pytest.fixture
def records():
    """Image 0 breaks under the aware attacker at 1 only; image 1 by the search at 1.5; image 2 is
    rejected where the unaware attacker seeks more than 2; image 3 stands.
    """
    rows = [record(index, "none", None, 0.0, "correct") for index in range(4)]
    for eps in (1.0, 2.0, 4.0):
        for index in range(4):
            late = "rejected" if (index, eps) == (2, 4.0) else "correct"
            rows.append(record(index, "defence-unaware", eps, eps, late))
            broken = "wrong" if (index, eps) == (0, 1.0) else "correct"
            rows.append(record(index, "defence-aware", eps, eps, broken))
    rows += [record(1, "strongest", None, 1.5, "wrong"), record(3, "strongest", None, 9.0, "wrong")]
    return frame(rows)


def outcomes(points, title):
    return {
        at: part.sort("index")["outcome"].to_list()
        for (at,), part in points.filter(title=title).group_by("at", maintain_order=True)
    }


def test_the_worst_is_wrong_if_any_change_within_eps_makes_it_so(records):
    """R12."""
    points = at_each_eps(records, (0.0, 1.0, 2.0, 4.0), TITLES)
    good = ["correct"] * 4
    assert outcomes(points, "strongest ensemble") == {
        0.0: good,
        1.0: ["wrong", "correct", "correct", "correct"],
        2.0: ["wrong", "wrong", "correct", "correct"],
        4.0: ["wrong", "wrong", "rejected", "correct"],
    }
    aware = outcomes(points, "aware")
    assert aware[0.0] == good and all(aware[eps][0] == "wrong" for eps in (1.0, 2.0, 4.0))
    assert outcomes(points, "unaware")[2.0] == good


def test_a_rejection_counts_as_correct_where_there_is_an_attack(records):
    points = at_each_eps(records, (0.0, 4.0), TITLES)
    unaware = lenient(points).filter(pl.col("title") == "unaware")
    assert set(unaware["outcome"]) == {"correct"}
    clean = points.with_columns(outcome=pl.lit("rejected").cast(SCHEMA["outcome"]))
    assert counts(lenient(clean).filter(pl.col("at") == 0)).correct == 0


def test_tables_and_curves_have_the_same_figures_and_say_n(records):
    points = at_each_eps(records, (0.0, 1.0, 2.0, 4.0), TITLES)
    rows = {(one.group, one.column): one for one in eps_table("title", points, "correct").rows}
    curve = eps_curve("title", points)
    for line in curve.series:
        shares = [rows[line.name.removeprefix("m, "), f"eps {x:g}"].measured for x in curve.x]
        assert shares == [100 * one for one in line.correct]
    assert all(one.n == 4 and one.low <= one.measured <= one.high for one in rows.values())


def test_the_smallest_changes_are_over_all_records(records):
    found = smallest(records).sort("index")
    assert found["wrong"].to_list() == [1.0, 1.5, math.inf, 9.0]
    assert found["rejected"].to_list() == [math.inf, math.inf, 4.0, math.inf]
    assert implied_accuracy("m", found, 2.0, "").measured == 50
    near = {one.column: one for one in near_rejections("m", found, 4.0)}
    assert near["alpha 0"].measured == 50 and near["alpha 1"].measured == 75
    assert near["median L2 to a rejection"].measured is None
    assert near["median L2 to a rejection"].note


class _Line(nn.Module):
    """Two classes and a constant reject score, for images of one pixel."""

    def forward(self, given):
        pixel = given.flatten(1)
        return torch.cat([pixel, 1 - pixel, torch.full_like(pixel, 0.6)], 1)


def test_an_attack_at_another_threshold_is_decided_there():
    """The records hold the margins of the original classifier."""
    classifier = Classifier(_Line(), 2)
    images = torch.tensor([0.9, 0.75]).reshape(2, 1, 1, 1)
    labels = torch.tensor([0, 0])
    threat = ThreatModel("l2", 0.5)
    attack = AtThreshold(PGD(steps=20), 0.1)
    found = attack(classifier, images, labels, threat, seed=0)
    direct = PGD(steps=20)(shifted(classifier, 0.1), images, labels, threat, seed=0)
    assert torch.equal(found.candidates, direct.candidates)
    assert found.success.tolist() == [False, True]  # 0.4 is rejected, 0.25 is class 1
    scores = classifier.scores(found.candidates)
    rows = {
        "reject_margin": (scores[:, :2].amax(1) - scores[:, 2]).tolist(),
        "class_margin": (scores[:, 0] - scores[:, 1]).tolist(),
    }
    assert decided(pl.DataFrame(rows), 0.1)["outcome"].to_list()[1] == "wrong"
    assert decided(pl.DataFrame(rows), 0.5)["outcome"].to_list() == ["rejected", "rejected"]


def test_offsets_reject_the_asked_share_of_the_validation_images():
    pixels = torch.linspace(130, 255, 20).to(torch.uint8).reshape(20, 1, 1, 1)
    known = ImageSet(pixels, torch.zeros(20, dtype=torch.int64), ("a", "b"))
    classifier = Classifier(_Line(), 2)
    rows = {row.name: row.value for row in offsets(classifier, known, (0.1, 0.5), 0.99)}
    for rate in (0.1, 0.5):
        decisions = shifted(classifier, rows[f"{rate:g}"]).predict(known.to_float())
        assert int((decisions == -1).sum()) == 20 * rate
    decisions = shifted(classifier, rows["accepted"]).predict(known.to_float())
    assert int((decisions == -1).sum()) == 0
