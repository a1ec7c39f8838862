"""`demur audit --certify`: proven shares in results, records, report and gate."""

import json

import polars as pl
import pytest
import torch
from torch import nn

import demur
from command import demur as command
from demur import DemurError, data
from demur.certificates import Prover, UnsoundBoundError, certify
from demur.commands.gate import gate
from demur.defenses import CertifiedConsistency
from demur.evaluation.audit_certified import Proofs, certified_row, with_certificates
from demur.evaluation.store import NodeResult
from demur.report.audit import page, summary
from demur.threat import ThreatModel
from demur.training import certified_fit

RULES = """
[gate]
require_selftests = false
[[gate.rule]]
metric = "proven"
threat = "{threat}"
min = {limit}
"""


@pytest.fixture(scope="module")
def audited(tmp_path_factory):
    train, test = data.load("digits"), data.load("digits", "test")
    network = nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(49, 32), nn.BatchNorm1d(32))
    network.extend([nn.ReLU(), nn.Linear(32, 10)])
    options = {"eps": 0.08, "epochs": 6, "batch_size": 64, "ramp": 2, "learning_rate": 5e-3}
    certified_fit(network, train.images, train.labels, **options)
    model = CertifiedConsistency(network, 10, 0.02)
    folder = tmp_path_factory.mktemp("audit") / "run"
    threats = ["linf:0.05", "l2:0.3", "linf"]
    found = demur.audit(model, test, threats, num_samples=24, certify=True, out=folder)
    return model, found, folder


@pytest.mark.slow
def test_the_proven_share_is_that_of_certify_and_below_the_robust_share(audited):
    model, found, folder = audited
    assert [row.threat for row in found.results.certified] == ["linf:0.05", "l2:0.3"]
    images = data.load("digits", "test").sample(24, 0)
    for row in found.results.certified:
        whole = certify(model, images.to_float(), images.labels, row.threat, ("ibp", "crown-ibp"))
        assert row.proven == pytest.approx(whole.bounds().proven) and row.n == 24
        assert 0.2 < row.proven <= float(found.threat(row.threat)) and row.radius > 0
        assert row.proven_low < row.proven <= row.proven_high and row.unsupported is None
    written = json.loads((folder / "results.json").read_text())
    assert written["certified"][0]["methods"] == ["ibp", "crown-ibp"]


@pytest.mark.slow
def test_records_hold_the_certificates_of_their_threat_alone(audited):
    _, found, folder = audited
    records = pl.read_parquet(folder / "records.parquet")
    here = records.filter((pl.col("eps") == 0.05) & (pl.col("goal") == "Evade()"))
    assert here["certified"].null_count() == 0
    for (_,), rows in here.group_by("attack"):
        assert int(rows["certified"].sum()) == round(24 * found.results.certified[0].proven)
    assert not here.filter(pl.col("certified") & (pl.col("outcome") == "wrong")).height
    assert records.filter(pl.col("attack").is_null())["certified"].null_count() == 24
    proven = here.filter(pl.col("certified"))
    assert bool((proven["certified_radius"] > 0.045).all())


@pytest.mark.slow
def test_the_report_says_it(audited):
    _, found, _ = audited
    text = page(found.results, None)
    assert "images are proven never to be wrong and accepted" in text
    assert "The median certified radius is" in summary(found.results)
    assert "are proven" in str(found)


@pytest.mark.slow
def test_the_gate_decides_on_it(audited, tmp_path):
    _, found, folder = audited
    rules = tmp_path / "gate.toml"
    proven = found.results.certified[0].proven
    for limit, code in ((0.05, 0), (1.0, 1), (round(proven, 3), 3)):
        rules.write_text(RULES.format(threat="linf:0.05", limit=limit))
        assert gate(folder, rules).exit_code == code, limit
    rules.write_text(RULES.format(threat="linf:0.01", limit=0.5))
    with pytest.raises(
        DemurError, match=r"no certificates at linf:0\.01\. Known: linf:0\.05, l2:0\.3"
    ):
        gate(folder, rules)
    rules.write_text(RULES.format(threat="clean", limit=0.5))
    with pytest.raises(DemurError, match="proven needs a threat"):
        gate(folder, rules)


@pytest.mark.slow
def test_the_command_line_has_it_and_names_a_layer_without_bounds(tmp_path):
    (tmp_path / "net.py").write_text(
        "from torch import nn\n"
        "def make():\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(784, 8), nn.GELU(), nn.Linear(8, 10))\n"
    )
    arguments = ["--data", "digits", "--threat", "linf:0.1", "--num-samples", "6"]
    done = command(
        "audit",
        f"py:{tmp_path / 'net.py'}:make",
        *arguments,
        "--certify",
        "--out",
        tmp_path / "run",
    )
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["certified"][0]["proven"] == 0
    assert "gelu" in results["certified"][0]["unsupported"]


def test_the_time_of_certificates_counts(monkeypatch):
    """A few images are certified for the estimate. What takes too long is left out, and said."""
    images = data.load("digits", "test").sample(6, 0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    original = Prover.proofs
    seen = []

    def counted(self, classifier, given, labels, threat):
        seen.append(len(given))
        return original(self, classifier, given, labels, threat)

    def audited(minutes):
        options = {"certify": True, "max_minutes": minutes, "device": "cpu"}
        return demur.audit(network, images, ["linf:0.1"], **options).results

    monkeypatch.setattr(Prover, "proofs", counted)
    found = audited(60)
    assert seen == [4, 6] and len(found.certified) == 1
    missing = "Not run, for lack of time: certificates."
    assert missing not in found.findings

    def slow(self, known):
        return {id(node): 3600.0 for node in self.proofs}

    monkeypatch.setattr("demur.commands.audit_run.AuditRun._proof_costs", slow)
    found = audited(60)
    assert seen == [4, 6] and not found.certified and missing in found.findings
    assert found.cost["estimate"] < 3600


def test_a_proven_image_that_an_attack_broke_is_an_error_unless_a_draw_proved_it():
    """Negative control."""
    images = data.load("digits", "test").sample(3, 0)
    node = Proofs(None, images, ThreatModel("linf", 0.1), Prover())
    flags = torch.tensor([True, True, False])
    tensors = {"certified": flags, "radius": torch.tensor([0.1, 0.2, 0.0]).double()}
    sure = NodeResult("a", {"unsupported": ""}, {**tensors, "probability": flags.double()}, 0.0)
    row, certified, _ = certified_row(node, [sure], [2])
    assert row.proven == pytest.approx(2 / 3) and certified.tolist() == flags.tolist()
    with pytest.raises(UnsoundBoundError, match="image 1 is broken and proven"):
        certified_row(node, [sure], [1])
    drawn = NodeResult("b", {"unsupported": ""}, {**tensors, "probability": flags * 0.999}, 0.0)
    row, certified, _ = certified_row(node, [drawn], [1])
    assert row.contradictions == 1 and certified.tolist() == [True, False, False]
    assert row.probability == pytest.approx(0.999)
    records = pl.DataFrame(
        {
            "index": [2, 0],
            "norm": ["linf", "linf"],
            "eps": [0.1, 0.2],
            "goal": ["Evade()"] * 2,
            "certified": [None, None],
            "certified_radius": [None, None],
        },
        schema_overrides={"certified": pl.Boolean, "certified_radius": pl.Float64},
    )
    marked = with_certificates(records, ThreatModel("linf", 0.1), certified, tensors["radius"])
    assert marked["certified"].to_list() == [False, None]
