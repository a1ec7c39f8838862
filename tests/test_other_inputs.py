"""Other inputs than attacked ones: risk and coverage, images of no class, and rules on both."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from sklearn.metrics import roc_auc_score
from torch import nn
from typer.testing import CliRunner

import demur
from demur import Classifier, DemurError, data
from demur.classifier import Preprocess
from demur.cli.running import app
from demur.data.images import ImageSet
from demur.evaluation.audit_other import (
    CorruptionRow,
    OtherInputs,
    OutOfDistribution,
    answers,
    corrupted,
    corruption_rows,
    other_inputs,
)
from demur.evaluation.audit_results import AuditResults, CheckRow
from demur.evaluation.gate_other import decide_other
from demur.evaluation.gate_rules import Rules, parse_rules
from demur.evaluation.store import NodeResult
from demur.metrics import aurc, risk_coverage
from demur.report.corruptions import MEAN, SEVERITY, corruption_tables
from models import Linear, images_of

# Risk and coverage


WRONG = [False, True, False, False, True]


def mean_risk(confidence, wrong):
    """The area by numpy, for confidences that differ."""
    order = np.argsort(-np.asarray(confidence, dtype=float))
    errors = np.cumsum(np.asarray(wrong, dtype=float)[order])
    return float((errors / np.arange(1, len(errors) + 1)).mean())


@given(st.lists(st.booleans(), min_size=1, max_size=40), st.randoms(use_true_random=False))
def test_the_area_is_the_mean_of_all_risks(wrong, random):
    confidence = list(range(len(wrong)))
    random.shuffle(confidence)
    found = aurc(torch.tensor(confidence, dtype=torch.float32), ~torch.tensor(wrong))
    assert found == pytest.approx(mean_risk(confidence, wrong))


@given(st.lists(st.booleans(), min_size=1, max_size=40))
def test_equal_confidences_give_the_error_rate_at_every_coverage(right):
    risk = risk_coverage(torch.zeros(len(right)), torch.tensor(right))
    assert torch.allclose(risk, torch.full_like(risk, 1 - sum(right) / len(right)))


def test_ties_are_the_mean_over_their_orders():
    """Against a simulation of random orders."""
    confidence = torch.tensor([3.0, 2.0, 2.0, 2.0, 1.0])
    right = ~torch.tensor(WRONG)
    generator = torch.Generator().manual_seed(0)
    shaken = [
        mean_risk(
            (confidence + 1e-3 * torch.rand(5, generator=generator)).tolist(), [0, 1, 0, 0, 1]
        )
        for _ in range(3000)
    ]
    assert aurc(confidence, right) == pytest.approx(float(np.mean(shaken)), abs=0.01)


def test_a_perfect_order_is_better_than_its_reverse():
    right = torch.tensor([True] * 8 + [False] * 2)
    order = torch.arange(10.0)
    assert aurc(-order, right) < 0.2 < aurc(order, right)
    with pytest.raises(DemurError, match="NaN"):
        aurc(torch.tensor([torch.nan]), torch.tensor([True]))
    with pytest.raises(DemurError, match="some images"):
        aurc(torch.zeros(0), torch.zeros(0, dtype=torch.bool))


# The answers of a model


def result(values, tensors):
    return NodeResult("key", values, tensors, 0.0)


def test_the_confidence_is_the_reject_margin_or_the_largest_probability():
    images = (255 * images_of(5)).to(torch.uint8)
    labels = torch.zeros(5, dtype=torch.int64)
    weights = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    scores = (images.float() / 255).flatten(1) @ weights.T
    plain = Classifier(Linear(weights[:3]), 3)
    values, found = answers(plain, images, labels, "cpu", 0, 2)
    assert not values["rejects"]
    assert torch.allclose(found["confidence"], scores[:, :3].softmax(1).amax(1), atol=1e-5)
    assert found["accepted"].all()
    rejecting = Classifier(Linear(weights), 3)
    values, found = answers(rejecting, images, labels, "cpu", 0, 2)
    margin = scores[:, :3].amax(1) - scores[:, 3]
    assert torch.allclose(found["confidence"], margin, atol=1e-4)
    assert torch.equal(found["accepted"], margin >= 0)


def test_figures_of_images_of_no_class_are_those_of_scikit_learn():
    generator = torch.Generator().manual_seed(0)
    own = torch.rand(60, generator=generator) + 0.3
    other = torch.rand(40, generator=generator)
    right = torch.rand(60, generator=generator) > 0.2
    accepted = other > 0.5
    found = other_inputs(
        [result({"rejects": True}, {"confidence": own, "right": right})],
        [result({"rejects": True}, {"confidence": other, "accepted": accepted})],
        "noise",
        seed=0,
    )
    sides = [1] * 60 + [0] * 40
    assert found.ood.auroc == pytest.approx(roc_auc_score(sides, [*own.tolist(), *other.tolist()]))
    assert found.ood.accepted == pytest.approx(float(accepted.float().mean()))
    assert found.ood.accepted_low < found.ood.accepted < found.ood.accepted_high
    assert found.aurc_low < found.aurc < found.aurc_high
    assert found.risk[-1] == pytest.approx(float((~right).float().mean()))
    assert found.coverage[-1] == 1


def test_outcomes_of_corrupted_images_are_counted_like_all_others():
    """Against the classifier on the corrupted images themselves."""
    images = (255 * images_of(6)).to(torch.uint8)
    labels = torch.arange(6) % 3
    weights = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    model = Classifier(Linear(weights), 3)
    _, found = corrupted(model, images, labels, "contrast", "cpu", 0, 4)
    rows = corruption_rows("contrast", [result({}, found)])
    for severity, row in enumerate(rows, 1):
        moved = data.corrupt(images.float() / 255, "contrast", severity)
        expected = demur.outcomes(model, moved, labels)
        assert row.wrong == pytest.approx(float((expected == 2).float().mean()))
        assert row.rejected == pytest.approx(float((expected == 1).float().mean()))


def corruption(family, severity, correct, rejected=0.0):
    wrong = 1 - correct - rejected
    return CorruptionRow(family, severity, 10, correct, rejected, wrong, 0.0, wrong)


def test_corruptions_are_a_line_for_each_kind_and_a_column_for_each_severity():
    rows = [corruption("fog", 1, 1.0), corruption("fog", 2, 0.5)]
    rows += [corruption("frost", 1, 0.5), corruption("frost", 2, 0.0)]
    wrong, correct = corruption_tables(rows)  # none is rejected, so there is no table of it
    assert (wrong.outcome, correct.outcome) == ("wrong", "correct")
    assert wrong.severities == (1, 2)
    assert [line.name for line in wrong.lines] == ["fog", "frost", MEAN]
    assert [line.shares for line in wrong.lines] == [
        [0, 0.5, 0.25],
        [0.5, 1, 0.75],
        [0.25, 0.75, 0.5],
    ]
    assert wrong.lines[0].cells[1].high == 0.5
    assert correct.lines[-1].cells[0].low is None
    assert len(corruption_tables([*rows, corruption("snow", 1, 0.4, 0.2)])) == 3
    assert corruption_tables([*rows, corruption("snow", 1, 0.4)])[0].lines[2].shares[1] is None
    assert corruption_tables([]) == []


# Reading


def test_a_folder_of_any_shape_is_read(tmp_path):
    for number, place in enumerate((tmp_path, tmp_path / "a", tmp_path / "a" / "b")):
        place.mkdir(exist_ok=True)
        pixels = np.full((9 + number, 9, 3), 50 * number, dtype=np.uint8)
        Image.fromarray(pixels).save(place / "one.png")
    images = data.read_unlabelled(tmp_path, Preprocess(size=(8, 8), channels=1))
    assert len(images) == 3
    assert images.image_shape == (1, 8, 8)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(DemurError, match="holds no images"):
        data.read_unlabelled(empty, Preprocess(size=(8, 8)))
    with pytest.raises(DemurError, match="missing"):
        data.read_unlabelled(tmp_path / "missing", Preprocess(size=(8, 8)))


# The audit and the gate


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("other")
    images = place / "images"
    images.mkdir()
    for number in range(4):
        pixels = np.random.default_rng(number).integers(0, 256, (8, 8), dtype=np.uint8)
        Image.fromarray(pixels).save(images / f"{number}.png")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
    model = Classifier(network, 3, rejects=True).eval()
    pixels = (255 * images_of(8)).to(torch.uint8)
    labels = model.predict(pixels.float() / 255).clamp(min=0)
    audited = ImageSet(pixels, labels, ("a", "b", "c"), "tiny")
    options = {"ood": images, "corruptions": True, "device": "cpu"}
    demur.audit(model, audited, ["linf:0.5"], out=place / "audit", **options)
    return place


def test_an_audit_reports_other_inputs(folder):
    raw = json.loads((folder / "audit" / "results.json").read_text())["other_inputs"]
    assert raw["ood"]["n"] == 4
    assert raw["ood"]["name"] == "images"
    assert raw["n"] == 8
    rows = raw["corruptions"]
    assert [(one["family"], one["severity"]) for one in rows] == [
        (family, severity) for family in data.CORRUPTIONS for severity in range(1, 6)
    ]
    for one in rows:
        assert one["correct"] + one["rejected"] + one["wrong"] == pytest.approx(1)
        assert one["wrong_low"] <= one["wrong"] <= one["wrong_high"]
    page = (folder / "audit" / "report.html").read_text()
    assert "Without an attack" in page
    assert "images of none of the classes" in page
    assert "Corrupted images" in page
    lines = page.count('<th scope="row">JPEG compression</th>')
    assert lines == 3  # one in the table of each outcome
    assert MEAN in page and SEVERITY in page
    summary = (folder / "audit" / "summary.md").read_text()
    assert "images of none of the classes" in summary
    assert f"| {MEAN} |" in summary


def test_the_gate_reads_the_figures_and_a_rule_on_them_needs_no_threat(folder, tmp_path):
    rules = tmp_path / "gate.toml"
    rules.write_text('[[gate.rule]]\nmetric = "accepted_ood"\nmax = 1.0\n')
    done = CliRunner().invoke(app, ["gate", str(folder / "audit"), "--rules", str(rules)])
    assert "accepted_ood" in done.output


def audit_with(other):
    rest = {"handshake": [], "notes": [], "cost": {}, "code": "", "command": "", "profile": ""}
    return AuditResults(
        schema="demur.audit/1",
        verdict="sound",
        **{"model": {}, "data": {}, "threats": [], "versions": {}},
        checks=[CheckRow("noise", 0, 0, "passed", "")],
        **rest,
        seed=0,
        device="cpu",
        other_inputs=other,
    )


OTHER = OtherInputs(
    "max-prob", 500, 0.02, 0.01, 0.03, [1.0], [0.1], OutOfDistribution("x", 100, 0.1, 0, 1, 0.9)
)


def decided(text, other=OTHER, head=""):
    rules = parse_rules(f"[gate]\n{head}\n[[gate.rule]]\n{text}")
    (found,) = decide_other(rules.rule[0], audit_with(other), rules)
    return found


def test_a_rule_on_accepted_images_of_no_class_uses_exact_bounds():
    """10 of 100: the one-sided bounds are .0553 and .1637 (Clopper and Pearson)."""
    found = decided('metric = "accepted_ood"\nmax = 0.2')
    assert found.state == "passed"
    assert (found.low, found.high) == pytest.approx((0.0553, 0.1637), abs=1e-4)
    assert decided('metric = "accepted_ood"\nmax = 0.05').state == "failed"
    assert decided('metric = "accepted_ood"\nmax = 0.1').state == "inconclusive"
    few = decided('metric = "accepted_ood"\nmax = 0.2', head="min_images = 200")
    assert few.state == "inconclusive"


def test_a_rule_on_aurc_uses_the_stored_bounds():
    assert decided('metric = "aurc"\nmax = 0.03').state == "passed"
    assert decided('metric = "aurc"\nmax = 0.025').state == "inconclusive"
    assert decided('metric = "aurc"\nmax = 0.005').state == "failed"
    surer = decided('metric = "aurc"\nmax = 0.03', head="confidence = 0.99")
    assert surer.state == "inconclusive"
    assert "95 %" in surer.reason


def test_a_figure_that_was_not_measured_and_a_threat_are_errors():
    with pytest.raises(DemurError, match=r"no accepted_ood\. Run the audit again with --ood"):
        decided('metric = "accepted_ood"\nmax = 0.2', replace(OTHER, ood=None))
    with pytest.raises(DemurError, match="no aurc"):
        decided('metric = "aurc"\nmax = 0.2', None)
    with pytest.raises(DemurError, match="has no threat"):
        decided('metric = "aurc"\nthreat = "linf:0.1"\nmax = 0.2')
    assert isinstance(parse_rules('[[gate.rule]]\nmetric = "aurc"\nmax = 1'), Rules)
    assert asdict(OTHER)["ood"]["n"] == 100
