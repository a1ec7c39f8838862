"""The audit: a number that can be defended, for the user's own model."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest
import torch
from PIL import Image
from torch import nn
from typer.testing import CliRunner

import demur
from demur import Classifier, DemurError, data
from demur.classifier import Preprocess
from demur.cli.running import app
from demur.commands import audit_models
from demur.commands.audit_writing import without_eps
from demur.commands.replay import broken_images, replay, show
from demur.evaluation import audit_plan
from demur.evaluation.audit_checks import verdict
from demur.evaluation.audit_costs import TRIMMED, Rates, seconds_of, trimmed
from demur.evaluation.audit_plan import PROFILES, Step, plan
from demur.evaluation.audit_results import CheckRow, read, threat_row, within
from demur.evaluation.audit_rows import COMPUTED
from demur.evaluation.counterexamples import load as load_kept
from demur.evaluation.records import SCHEMA
from demur.networks import background_class_network
from demur.threat import ThreatModel
from demur.training import fit

COUNT = 16


@pytest.fixture(scope="module")
def network():
    digits = data.load("digits")
    made = background_class_network(10, seed=0)
    fit(made, digits.images, digits.labels, epochs=2, batch_size=32, device="cpu")
    return made


@pytest.fixture(scope="module")
def images():
    return data.load("digits", "test").sample(COUNT, seed=0)


@pytest.fixture(scope="module")
def found(network, images, tmp_path_factory):
    out = tmp_path_factory.mktemp("audit") / "plain"
    return demur.audit(network, images, ["linf:0.1", "l2:1"], out=out, device="cpu")


# The result


def test_each_threat_counts_three_outcomes_of_all_images(found, network, images):
    """R2, R9."""
    rows = {row.threat: row for row in found.results.threats}
    assert list(rows) == ["clean", "linf:0.1", "l2:1"]
    for row in rows.values():
        assert row.n == COUNT
        assert row.correct + row.rejected + row.wrong == pytest.approx(1)
        assert row.wrong_low <= row.wrong <= row.wrong_high
    right = Classifier(network, 10).predict(images.to_float()) == images.labels
    assert rows["clean"].correct == pytest.approx(float(right.float().mean()))
    assert rows["linf:0.1"].wrong >= rows["clean"].wrong
    assert sum(rows["linf:0.1"].by.values()) == round(COUNT * rows["linf:0.1"].wrong)


def test_the_worst_case_is_the_worst_of_all_rows_that_the_threat_allows(found):
    """R12. Counted again without the code of the library."""
    size = 0.1
    wrong = set()
    for row in found.records.iter_rows(named=True):
        clean = row["attack"] is None
        allowed = clean or row["linf"] <= size or (row["norm"] == "linf" and row["eps"] <= size)
        if allowed and row["outcome"] == "wrong":
            wrong.add(row["index"])
    assert found.threat("linf:0.1").wrong == pytest.approx(len(wrong) / COUNT)


def test_a_larger_eps_never_has_fewer_wrong_answers(found):
    for curve in found.results.curves:
        assert curve["wrong"] == sorted(curve["wrong"])


def test_the_folder_has_all_files_and_they_agree(found):
    read_again = read(found.folder)
    assert read_again == found.results
    raw = json.loads((found.folder / "results.json").read_text())
    assert raw["schema"] == "demur.audit/1"
    records = pl.read_parquet(found.folder / "records.parquet")
    assert records.schema == SCHEMA
    assert "Audit of" in (found.folder / "summary.md").read_text()
    text = (found.folder / "report.html").read_text()
    assert "it is no proof" in text
    assert "src=" not in text.replace('src="data:', "")


def test_the_table_is_a_frame_and_a_threat_is_found_by_value(found):
    assert found.table["wrong"].to_list() == [row.wrong for row in found.results.threats]
    assert found.threat("linf:0.10").threat == "linf:0.1"
    assert found.threat("clean").threat == "clean"
    with pytest.raises(DemurError, match="unknown threat 'l1:3'"):
        found.threat("l1:3")
    assert "<iframe" in found._repr_html_()


def test_the_same_request_again_computes_nothing_and_another_one_is_refused(
    found, network, images, monkeypatch
):
    def never(*_, **__):
        raise AssertionError("it computes again")

    monkeypatch.setattr("demur.evaluation.engines.Local.submit", never)
    again = demur.audit(network, images, ["linf:0.1", "l2:1"], out=found.folder, device="cpu")
    assert again.results.threats == found.results.threats
    monkeypatch.setattr("demur.commands.audit_subject.handshake", never)
    with pytest.raises(DemurError, match=r"another configuration.*different: threats"):
        demur.audit(network, images, ["linf:0.2"], out=found.folder, device="cpu")


@pytest.mark.slow
def test_the_users_module_keeps_its_modes(network, images):
    """R3."""
    network.train()
    network[0].eval()
    modes = [part.training for part in network.modules()]
    try:
        found = demur.benchmark(network, images, "linf:0.1", device="cpu", num_samples=4)
        assert found.n == 4
        assert [part.training for part in network.modules()] == modes
    finally:
        network.eval()


@pytest.mark.slow
def test_one_number(network, images):
    row = demur.benchmark(network, images, "linf:0.3", device="cpu", num_samples=10)
    assert row.n == 10
    assert float(row) == pytest.approx(row.correct + row.rejected)


@pytest.mark.slow
def test_float_images_of_tensors_are_taken(network, images):
    pair = (images.to_float()[:5], images.labels[:5])
    assert demur.audit(network, pair, ["linf:0.1"], device="cpu").threat("clean").n == 5
    with pytest.raises(DemurError, match="normalisation belongs inside"):
        demur.audit(network, (pair[0] * 4 - 2, pair[1]), ["linf:0.1"], device="cpu")


# Rejection


@pytest.fixture(scope="module")
def rejecting(network, tmp_path_factory):
    return demur.audit(
        network,
        data.load("digits", "test"),
        ["linf:0.1"],
        reject_score="max-prob",
        false_rejection_rate=0.1,
        num_samples=40,
        device="cpu",
        out=tmp_path_factory.mktemp("audit") / "rejecting",
    )


@pytest.mark.slow
def test_held_out_images_set_the_threshold_and_are_not_audited(rejecting):
    """R17."""
    said = " ".join(rejecting.results.notes)
    assert "held-out images, which are not audited" in said
    clean = rejecting.threat("clean")
    assert 0 < clean.rejected < 0.35
    assert rejecting.results.data["images"] == 40


@pytest.mark.slow
def test_a_rejecting_model_meets_the_attackers_of_rejection(rejecting):
    """R8, R19: the defence-unaware attacker, and the one who forces rejections."""
    attackers = set(rejecting.records["attacker"])
    assert {"none", "defence-unaware", "defence-aware", "strongest"} <= attackers
    forced = rejecting.threat("linf:0.1", "force-reject")
    assert forced.rejected > rejecting.threat("clean").rejected
    assert {curve["kind"] for curve in rejecting.results.curves} == {"eps", "threshold"}


@pytest.mark.slow
def test_the_curve_over_the_threshold_is_right_at_the_models_own(rejecting):
    curve = next(one for one in rejecting.results.curves if one.get("at") == "clean images")
    place = curve["x"].index(0.0)
    clean = rejecting.threat("clean")
    assert curve["rejected"][place] == pytest.approx(clean.rejected)
    assert curve["wrong"][place] == pytest.approx(clean.wrong)
    assert curve["rejected"] == sorted(curve["rejected"])


# The plan


def target(rejects=False, base=False, suspicious=False):
    images = data.load("digits", "test").subset(range(4))
    node = audit_models.node_of(Classifier(nn.Flatten(), 784), "a", "model")
    other = audit_models.node_of(Classifier(nn.Flatten(), 784), "b", "other")
    return audit_plan.Target(
        node,
        node,
        images,
        rejects,
        undefended=other if rejects else None,
        base=other if base else None,
        suspicious=suspicious,
    )


def parts(steps):
    return [step.part for step in steps]


def test_the_plan_has_the_attacks_of_the_specification():
    quick = PROFILES["quick"]
    threat = ThreatModel("linf", 0.1)
    usual = ["clean", "noise", "single step", "PGD", "ensemble", *["sweep"] * 4]
    assert parts(plan(target(), [threat], quick)) == usual
    more = plan(target(rejects=True, base=True), [threat], quick)
    assert set(parts(more)) - set(usual) == {"force reject", "defence-unaware", "transfer"}
    thorough = plan(target(suspicious=True), [threat], PROFILES["thorough"])
    assert "BPDA" in parts(thorough)
    assert parts(plan(target(), [ThreatModel("l2")], quick)) == ["clean", "ensemble"]


def test_the_sweep_does_not_repeat_a_threat_that_is_given():
    both = [ThreatModel("linf", 0.1), ThreatModel("linf", 0.2)]
    steps = plan(target(), both, PROFILES["quick"])
    sizes = [str(step.node.threat) for step in steps if step.part == "sweep"]
    assert "linf:0.2" not in sizes
    with pytest.raises(DemurError, match="each threat is given once"):
        plan(target(), [both[0], both[0]], PROFILES["quick"])


def test_what_is_left_out_follows_the_documented_order():
    steps = plan(target(rejects=True, base=True), [ThreatModel("linf", 0.1)], PROFILES["quick"])
    cost = dict.fromkeys(range(len(steps)), 1.0)
    others = {"certificates": 1.0, "self-tests": 1.0}
    left = {*parts(steps), *others}
    possible = [part for part in TRIMMED if part in left]
    for limit in range(len(steps) + 2, 0, -1):
        rest, more = trimmed(steps, cost, limit, others)
        kept = {*parts(rest), *more}
        assert kept <= left
        gone = [part for part in TRIMMED if part in possible and part not in kept]
        assert gone == possible[: len(gone)]
        left = kept
    assert {"clean", "noise", "single step", "PGD"} <= left


def test_what_is_computed_already_is_not_left_out():
    steps = plan(target(), [ThreatModel("linf", 0.1)], PROFILES["quick"])
    free = dict.fromkeys(range(len(steps)), 0.0)
    rest, more = trimmed(steps, free, 0.0, {"certificates": 0.0, "self-tests": 0.0})
    assert len(rest) == len(steps) and more == ["certificates", "self-tests"]
    _, more = trimmed(steps, free, 0.5, {"certificates": 1.0, "self-tests": 0.4})
    assert more == ["self-tests"]


def test_a_slower_model_costs_more_and_a_broken_image_less():
    steps = plan(target(), [ThreatModel("linf", 0.1)], PROFILES["quick"])
    ensemble = next(step for step in steps if step.part == "ensemble")
    fast = seconds_of(ensemble, Rates(100, 30, {}))
    assert seconds_of(ensemble, Rates(50, 15, {})) == pytest.approx(2 * fast)
    assert seconds_of(ensemble, Rates(100, 30, {"linf:0.1": 1.0})) < fast / 5


def test_what_does_not_fit_into_the_time_is_said(network, images):
    found = demur.audit(network, images, ["linf:0.1"], max_minutes=1e-6, device="cpu")
    assert any("for lack of time" in finding for finding in found.results.findings)
    assert all(not row.complete for row in found.results.threats if row.threat != "clean")
    assert found.verdict == "doubtful"


@pytest.mark.slow
def test_after_a_limit_the_same_request_goes_on(network, images, tmp_path):
    out = tmp_path / "limited"
    demur.audit(network, images, ["linf:0.1"], max_minutes=1e-6, device="cpu", out=out)
    whole = demur.audit(network, images, ["linf:0.1"], device="cpu", out=out)
    assert all(row.complete for row in whole.results.threats)


# Self-tests


class Gradientless(nn.Module):
    """Rounds its input coarsely: gradients are zero."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, images):
        return self.network(torch.round(4 * images) / 4)


@pytest.mark.slow
def test_a_model_that_hides_its_gradients_is_unsound_and_an_honest_one_is_not(
    network, images, found
):
    """R14, R20."""
    assert found.verdict == "sound"
    hidden = demur.audit(Gradientless(network), images, ["linf:0.3"], device="cpu")
    assert hidden.verdict == "unsound"
    states = {check.name: check.state for check in hidden.results.checks}
    assert states["unavailable gradients"] == "flagged"


def test_a_model_without_gradients_is_doubtful_at_best(network, images):
    def scores(pixels):
        with torch.no_grad():
            return network(torch.from_numpy(pixels)).numpy()

    box = demur.black_box(scores, 10)
    found = demur.audit(box, images.subset(range(8)), ["linf:0.3"], device="cpu")
    assert found.verdict == "doubtful"
    assert found.threat("linf:0.3").n == 8
    assert any("no gradient" in finding for finding in found.results.findings)
    assert not any("gradient" in note for note in found.results.notes)


def test_the_verdict_follows_the_flags():
    def row(name, state="flagged"):
        return CheckRow(name, None, None, state, "")

    assert verdict([row("noise", "passed"), row("twin", "not_applicable")], certain=True) == "sound"
    assert verdict([row("noise", "passed"), row("twin", "not_run")], certain=True) == "doubtful"
    assert verdict([row("doubling")], certain=True) == "doubtful"
    assert verdict([row("doubling"), row("noise")], certain=True) == "unsound"
    assert verdict([], certain=False) == "doubtful"


def test_the_progress_names_the_self_tests_as_the_report_does(found):
    steps = [step["cell"] for step in found.results.cost["steps"]]
    named = [one.removeprefix("self-test: ") for one in steps if one.startswith("self-test: ")]
    names = {name for one in named for name in one.split(", ")}
    assert names <= {check.name for check in found.results.checks}
    assert names >= {*COMPUTED, "noise"} - {"silent success", "twin"}


def test_square_that_met_every_image_left_is_a_note_and_no_finding(found):
    said = [note for note in found.results.notes if "Square attacked" in note]
    assert said and all("With 95 % confidence" not in note for note in said)
    assert not any("Square" in finding for finding in found.results.findings)


def test_every_self_test_of_the_specification_has_its_place(found):
    states = {check.name: check.state for check in found.results.checks}
    assert {"unavailable gradients", "monotone", "white-box >= black-box", "noise"} <= set(states)
    assert set(COMPUTED) <= set(states)
    assert states["twin"] == "not_applicable"
    assert "not_run" not in states.values()
    assert found.verdict == "sound"


# Counterexamples


def test_counterexamples_replay_on_the_same_model_and_show_themselves(found, network, tmp_path):
    again = replay(found.folder, network, device="cpu")
    assert set(again.table["threat"]) == {"linf:0.1", "l2:1"}
    kept = again.outcomes
    assert (kept["outcome"] == "wrong").all()
    assert len(kept) >= 0.5 * COUNT * found.threat("linf:0.1").wrong_stored
    image = kept["image"][0]
    lines = show(found.folder, image, tmp_path / "one.png")
    assert (tmp_path / "one.png").is_file()
    assert any("linf:0.1" in line for line in lines)
    with pytest.raises(DemurError, match="broke no image 'zz'"):
        show(found.folder, "zz")


def test_show_without_an_image_lists_the_broken_ones(found, monkeypatch):
    rows = broken_images(found.folder)
    kept = load_kept(found.folder).records
    assert sorted(rows["image"]) == sorted(set(kept["image"]))
    done = run("show", found.folder)
    assert done.exit_code == 0
    listed = [line for line in done.output.splitlines() if rows["image"][0][:12] in line]
    assert len(listed) == 2  # in the table, and in the command below it
    assert run(*listed[-1].split("demur ")[1].split()).exit_code == 0
    monkeypatch.setattr("demur.cli.counterexamples.LISTED", 2)
    done = run("show", found.folder)
    assert f"the first 2 of {len(rows)}" in done.output
    assert rows["image"][2][:12] not in done.output
    assert "name it with --image" in str(run("show", found.folder, "--out", "a.png").exception)


def test_stored_counterexamples_keep_to_their_eps(found):
    """R1, R3."""
    kept = load_kept(found.folder)
    linf = kept.records.with_row_index("place").filter(pl.col("threat") == "linf:0.1")
    places = linf["place"].to_list()
    moved = (kept.attacked[places].int() - kept.original[places].int()).abs().amax()
    assert int(moved) <= 0.1 * 255


def test_a_model_of_other_images_cannot_replay(found):
    wide = nn.Sequential(nn.Flatten(), nn.Linear(64 * 64, 10))
    with pytest.raises(DemurError, match="does not take the images of the audit"):
        replay(found.folder, Classifier(wide, 10), device="cpu")


# An audit beside an earlier one


@pytest.mark.slow
def test_a_baseline_is_compared_image_by_image(found, network, images, tmp_path):
    same = demur.audit(
        network, images, ["linf:0.1"], device="cpu", out=tmp_path / "b", baseline=found.folder
    )
    rows = same.results.baseline["threats"]
    assert [row["threat"] for row in rows] == ["clean", "linf:0.1"]
    assert all(row["worse"] == 0 and row["p"] == 1 for row in rows)
    others = data.load("digits").sample(5, seed=0)
    with pytest.raises(DemurError, match="no image or no threat in common"):
        demur.audit(network, others, ["linf:0.1"], device="cpu", baseline=found.folder)


# The command line


MODULE = """
import torch
from demur.networks import background_class_network

def make():
    torch.manual_seed(0)
    return background_class_network(10)
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "net.py"
    path.write_text(MODULE)
    return path


def run(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def test_another_number_of_images_is_named(file, tmp_path):
    words = ["audit", f"py:{file}:make", "--data", "digits", "--out", tmp_path / "out"]
    few = ["--max-minutes", 0.001, "--device", "cpu"]
    assert run(*words, *few, "--num-samples", 5).exit_code == 0
    said = str(run(*words, *few, "--num-samples", 6).exception)
    assert "(different: images, 5 there and 6 here)" in said
    said = str(run(*words, *few, "--num-samples", 5, "--seed", 1).exception)
    assert "(different: data, seed, 0 there and 1 here)" in said


@pytest.fixture
def photos(tmp_path):
    """A folder of ten digits, with a class for each."""
    images = data.load("digits", "test")
    for number, name in enumerate(images.class_names):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for place in (images.labels == number).nonzero().flatten()[:3].tolist():
            picture = Image.fromarray(images.images[place, 0].numpy())
            picture.save(tmp_path / "photos" / name / f"{place}.png")
    return tmp_path / "photos"


def test_all_files_that_cannot_be_read_are_named(file, photos, tmp_path):
    whole = next((photos / "5").iterdir())
    whole.write_bytes(whole.read_bytes()[:-40])  # its header can be read
    for number in range(11):
        (photos / "3" / f"x{number:02}.png").write_text("no image")
    words = [f"py:{file}:make", "--data", photos, "--out", tmp_path / "o"]
    for command in (["audit"], ["harden", "--with", "confidence-threshold"]):
        said = str(run(command[0], *words, *command[1:]).exception)
        assert said.startswith("12 of 41 image files cannot be read")
        assert "x00.png" in said and "x09.png" in said and said.endswith("And 2 more.")
        assert not (tmp_path / "o").exists()


def test_a_class_that_the_model_does_not_have_is_named(file, photos, tmp_path):
    shutil.copytree(photos / "9", photos / "10")
    words = [f"py:{file}:make", "--data", photos, "--img-size", 28, "--out", tmp_path / "o"]
    for command in (["audit"], ["harden", "--with", "confidence-threshold"]):
        said = str(run(command[0], *words, *command[1:]).exception)
        assert "labels reach from 0 to 10" in said and "label 10 is the class '10'" in said


def test_the_command_writes_a_report_and_prints_the_table(file, tmp_path):
    out = tmp_path / "out"
    words = ["audit", f"py:{file}:make", "--data", "digits", "--num-samples", 6]
    done = run(*words, "--threat", "linf:0.1", "--out", out, "--device", "cpu")
    assert done.exit_code == 0, done.output
    assert "linf:0.1" in done.output
    assert "Verdict:" in done.output
    assert (out / "report.html").is_file()
    assert run("show", out, "--image", (read(out).threats and "0") or "0").exit_code in (0, 1)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--data", "digitz"], "digitz"),
        (["--data", "nowhere/"], "there is no folder nowhere/."),
        (["--data", "digits", "--ood", "nowhere/"], "there is no folder nowhere/."),
        (["--data", "digits", "--threat", "linf:8"], "8 / 255"),
        (["--data", "digits", "--threat", "linf:0"], "always audited"),
        (["--data", "digits", "--profile", "fast"], "unknown profile 'fast'"),
        (["--data", "digits", "--reject-threshold", "0.5"], "needs --reject-score"),
    ],
)
def test_bad_input_is_one_line(file, words, said, tmp_path):
    done = run("audit", f"py:{file}:make", *words, "--num-samples", 4, "--out", tmp_path / "o")
    assert isinstance(done.exception, DemurError)
    assert said in str(done.exception)
    assert "\n" not in str(done.exception)
    assert not (tmp_path / "o").exists()


def test_mistakes_of_the_request_are_said_before_the_folder_of_another_run(file, tmp_path):
    out = tmp_path / "o"
    out.mkdir()
    (out / "run.json").write_text('{"command": "other"}')
    words = ["audit", f"py:{file}:make", "--data", "digits", "--out", out]
    for more, said in (
        (["--threat", "linf:8"], "8 / 255"),
        (["--ood", "nowhere/"], "there is no folder nowhere/."),
        (["--base-model", "net.onnx"], "does not read .onnx files"),
        ([], "holds a run with another configuration"),
    ):
        assert said in str(run(*words, *more).exception)
    (out / "run.json").rename(out / "notes.txt")
    assert "is not empty and holds no run" in str(run(*words).exception)


def test_a_threat_without_an_eps_is_explained():
    (said,) = without_eps([ThreatModel("linf"), ThreatModel("l2", 1.0)])
    assert said.startswith("linf has no eps, so every change is allowed")
    assert "median smallest change" in said and "linf:EPS" in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--data", "digitz"], "digitz"),
        (["--data", "digits", "--split", "nowhere"], "unknown split 'nowhere'"),
        (["--data", "empty"], "is empty"),
        (["--data", "digits", "--label-map", "map.csv"], "map.csv"),
        (["--data", "digits", "--num-samples", "0"], "num_samples must be at least 1"),
        (["--data", "digits", "--batch-size", "0"], "batch_size must be at least 1"),
        (["--data", "digits", "--expect-accuracy", "76"], "an expected accuracy is a share"),
        (["--data", "digits", "--reject-score", "mean"], "unknown score 'mean'"),
        (["--data", "digits", "--reject-score", "margin", "--reject-threshold", "nan"], "nan"),
        (["--data", "digits", "--reject-score", "margin", "--false-rejection-rate", "1"], "[0, 1)"),
    ],
)
def test_a_wrong_request_is_said_before_the_model_is_loaded(words, said, tmp_path, monkeypatch):
    """Loading a model may download hundreds of megabytes."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "net.py").write_text("def make():\n    open('loaded', 'w')\n    raise ValueError")
    done = run("audit", "py:net.py:make", *words)
    assert isinstance(done.exception, DemurError)
    assert said in str(done.exception)
    assert not (tmp_path / "loaded").exists()
    # Negative control: a right request loads the model.
    run("audit", "py:net.py:make", "--data", "digits")
    assert (tmp_path / "loaded").exists()


KILLED = """
import sys
import demur
from demur import data
sys.path.insert(0, sys.argv[2])
from net import make
images = data.load("digits", "test").sample(40, seed=0)
demur.audit(make(), images, ["linf:0.1"], device="cpu", out=sys.argv[1], profile="quick")
"""


@pytest.mark.slow
def test_a_killed_audit_goes_on_and_ends_with_the_same_figures(file, tmp_path):
    """R10."""
    words = [sys.executable, "-c", KILLED]
    whole = tmp_path / "whole"
    subprocess.run([*words, whole, tmp_path], check=True, capture_output=True)
    broken = tmp_path / "broken"
    for wait in (6, 8, 10):
        process = subprocess.Popen([*words, broken, tmp_path], stderr=subprocess.PIPE)
        try:
            process.wait(wait)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
        process.communicate()
    subprocess.run([*words, broken, tmp_path], check=True, capture_output=True)
    assert read(broken).threats == read(whole).threats
    costs = ["seconds"]
    first = pl.read_parquet(whole / "records.parquet").drop(costs)
    assert first.equals(pl.read_parquet(broken / "records.parquet").drop(costs))


# Queries


def test_within_counts_smaller_changes_of_other_threats_and_no_forced_rejections():
    def row(**values):
        same = {"dataset": "a", "split": "test", "repeat": 0, "index": 0, "image": "x"}
        return {**same, "outcome": "wrong", **values}

    rows = [
        row(attack=None, outcome="correct", linf=0.0),
        row(attack="DDN()", norm="l2", eps=3.0, linf=0.05, goal="evade"),
        row(attack="FMN()", norm="l2", eps=3.0, linf=0.5, goal="evade"),
        row(attack="PGD()", norm="linf", eps=0.1, linf=0.1, goal="ForceReject()"),
        row(attack="PGD()", norm="linf", eps=0.1, linf=0.1000001, goal="evade"),
    ]
    frame = pl.DataFrame([{name: one.get(name) for name in SCHEMA} for one in rows], schema=SCHEMA)
    kept = within(frame, ThreatModel("linf", 0.1))["attack"].to_list()
    assert kept == [None, "DDN()", "PGD()"]
    assert threat_row(frame, ThreatModel("linf", 0.01)).wrong == 0


def test_a_folder_that_is_no_audit_is_said(tmp_path):
    with pytest.raises(DemurError, match="holds no audit"):
        read(tmp_path)
    (tmp_path / "results.json").write_text('{"schema": 1}')
    with pytest.raises(DemurError, match="is no audit of demur"):
        read(tmp_path)
    assert Path(tmp_path / "results.json").exists()
    assert isinstance(Step("clean", None, None), Step)


def test_a_base_model_of_unknown_size_gets_the_images_of_the_audit(network, tmp_path):
    """The files of the data differ in size, so that their own size says nothing."""
    for number in range(4):
        name = tmp_path / "photos" / "01"[number % 2] / f"{number}.png"
        name.parent.mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(0, 256, (28 + number, 30), dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(name)
    other = background_class_network(10, seed=1)
    model = demur.wrap(network, preprocess=Preprocess((28, 28), channels=1), num_classes=10)
    model.class_names = tuple("0123456789")
    found = demur.audit(
        model, tmp_path / "photos", ["linf:0.1"], base_model=other, device="cpu", profile="quick"
    )
    assert "defence-unaware" in found.records["attacker"].to_list()
