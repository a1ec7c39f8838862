"""`demur demo`: the main job on embedded digits, its front page, and a kill on the way."""

import json
import shlex
import shutil
from pathlib import Path

import pytest

from command import demur
from demur import DemurError, data, load_model
from demur.commands import demo as demo_module
from demur.commands import demo_setup
from demur.commands.demo import _exported, main_job
from demur.commands.demo_setup import IMAGES, THREAT, Places, commands, prepare
from demur.evaluation.audit_results import read as read_audit
from demur.evaluation.audit_results import write as write_audit
from demur.evaluation.results import JobStep, Measurement, Table, read, write
from demur.evaluation.shares import FRONT
from demur.loading.export import Parity
from demur.report.compare import MainJob, compare
from test_audit_page import RESULTS
from test_report import results, write_run

EVIL = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("demo") / "main-job", device="cpu")


def test_the_demo_begins_with_a_network_and_images_that_it_was_not_trained_on(places):
    """R17."""
    base = load_model(places.base)
    new = data.read_images(places.images, "train")
    test = data.in_memory(data.read_images(places.images, "test"))
    assert set(base.provenance.images).isdisjoint([*new.hashes, *test.hashes])
    right = base.predict(test.to_float()) == test.labels
    assert float(right.float().mean()) > 0.85


def test_what_is_there_is_kept_and_another_seed_is_refused(places, monkeypatch):
    files = {path: path.read_bytes() for path in sorted(places.folder.rglob("*")) if path.is_file()}
    prepare(places.folder, device="cpu")
    assert files == {path: path.read_bytes() for path in files}
    with pytest.raises(DemurError, match=r"holds a demo with another seed.*another --out"):
        prepare(places.folder, device="cpu", seed=1)
    # After an update of demur, the same command works again.
    (places.after / "old").mkdir(parents=True)
    monkeypatch.setattr(demo_setup, "code_fingerprint", lambda _: "other")
    prepare(places.folder, device="cpu")
    assert not places.after.exists()
    assert load_model(places.base).provenance.code == "other"


def test_the_commands_are_those_of_the_command_line(tmp_path):
    lines = commands(Places(Path("a b")), seed=3, device="cpu")
    assert list(lines) == ["before", "harden", "after", "gate", "export"]
    assert shlex.split(lines["before"])[:3] == ["demur", "audit", "a b/base"]
    for name in ("before", "harden", "after"):
        assert "--seed 3" in lines[name] and "--device cpu" in lines[name]
    for line in lines.values():  # each option exists: what is missing is the file
        done = demur(*shlex.split(line)[1:], cwd=tmp_path)
        assert done.returncode == 2
        assert "a b" in done.stderr and "No such option" not in done.stderr


def test_without_the_packages_of_onnx_a_program_of_torch_is_exported(tmp_path, monkeypatch):
    def export(bundle, form, seed):
        if form not in known:
            raise DemurError(f"an export to {form} needs a package")
        return tmp_path / f"model.{form}", Parity(256, 256, 0.0, 1.0)

    monkeypatch.setattr(demo_module, "export", export)
    for known, said in (
        (("onnx", "pt2"), "safer/model.onnx: 256 of 256"),
        (("pt2",), "safer/model.pt2: 256 of 256"),
        ((), "No onnx file: an export to onnx needs a package"),
    ):
        assert _exported(tmp_path / "safer", 0).startswith(said)
    assert "No pt2 file" in _exported(tmp_path, 0)


# The front page


def cell(row, outcome, value, group="no attack"):
    return Measurement(row, outcome, group, "%", measured=value, n=30)


def main_part(text="Found.", link="main-job/before/report.html"):
    rows = [
        cell(row, *pair)
        for row in ("before", "after")
        for pair in (("correct", 90.0), ("wrong", 10.0))
    ]
    steps = [JobStep("Audit", text, "demur audit x", link), JobStep("Gate", "passed")]
    return MainJob(steps, Table("Before and after hardening", rows), 1.5)


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "demo" / "comparison"
    folder.mkdir(parents=True)
    table = {"title": FRONT, "rows": [vars(cell("plain", "wrong", 50.0))]}
    (folder / "results.json").write_text(json.dumps(results(tables=[table], seed=2)))
    return folder


def test_the_main_job_stands_on_top_with_commands_and_links(run):
    text = compare([run], run.parent, main_part()).read_text()
    order = [
        *("The main job", "Before and after hardening", 'href="main-job/before/report.html"'),
        *("demur audit x", "passed", 'href="comparison/report.html"', "How to read it"),
    ]
    places = [text.index(one) for one in order]
    assert places == sorted(places)
    assert text.count("Before and after hardening") == 1  # it is not among the other tables again
    assert "demur demo --seed 2 --out" in text
    found = read(run.parent)
    assert found.cost.seconds >= 1.5 and found.experiment == "demo"
    compare([run], run.parent, main_part())  # made anew
    compare([run], run.parent)
    assert not read(run.parent).steps


def test_sentences_of_one_run_have_no_title_before_them_and_those_of_several_have(run):
    (run / "results.json").write_text(
        json.dumps({**json.loads((run / "results.json").read_text()), "summary": ["It holds."]})
    )
    compare([run], run.parent)
    assert read(run.parent).summary == ["It holds."]
    other = run.parent / "other"
    shutil.copytree(run, other)
    compare([run, other], run.parent)
    title = read(run).title
    assert read(run.parent).summary == [f"{title}: It holds."] * 2


def test_an_audit_is_refused_with_what_compares_audits(tmp_path):
    write_audit(RESULTS, tmp_path)
    with pytest.raises(DemurError, match=r"is an audit; demur compare takes .* with --baseline"):
        compare([tmp_path], tmp_path / "out")
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(DemurError, match="demur run STUDY --out"):
        compare([tmp_path], tmp_path / "out")


def test_text_of_a_step_is_escaped_and_a_link_stays_in_the_folder(run):
    text = compare([run], run.parent, main_part(EVIL)).read_text()
    assert "<script>alert" not in text
    for link in ("javascript:alert(1)", "https://x.org/a.html", "../a.html", "/a.html", "//x.html"):
        with pytest.raises(ValueError, match="should match pattern"):
            main_part(link=link)


def test_the_folder_of_a_run_is_refused_before_anything_is_computed(run, monkeypatch):
    monkeypatch.setattr(demo_module, "main_job", None)
    write_run(run)
    done = demur("demo", "--out", run)
    assert done.returncode == 2 and "holds a run" in done.stderr


# The whole way


class KilledError(Exception):
    """The process ends here."""


@pytest.mark.slow
def test_the_main_job_goes_on_after_a_kill_and_its_page_says_what_its_files_say(
    tmp_path, monkeypatch
):
    """R10."""

    def killed(*given, **options):
        raise KilledError

    folder = tmp_path / "main-job"
    with monkeypatch.context() as patch:
        patch.setattr(demo_module, "harden", killed)
        with pytest.raises(KilledError):
            main_job(folder, device="cpu")
    submitted = []
    with monkeypatch.context() as patch:
        patch.setattr(demo_module, "_steps", killed)
        with pytest.raises(KilledError):
            main_job(folder, device="cpu")
    with monkeypatch.context() as patch:
        patch.setattr("demur.evaluation.engines.Local.submit", lambda *_: submitted.append(1))
        again = main_job(folder, device="cpu")
    assert not submitted  # all attacks were in the store
    audits = {name: read_audit(folder / name) for name in ("before", "after")}
    figures = {(row.row, row.group, row.column): row.measured for row in again.table.rows}
    for name, audit in audits.items():
        rows = {row.threat: row for row in audit.threats if row.goal != "force-reject"}
        attacked = figures[name, f"attacked within {THREAT}", "wrong"]
        assert attacked == pytest.approx(100 * rows[THREAT].wrong)
        assert rows[THREAT].n == IMAGES
    assert audits["after"].baseline["images"] == IMAGES
    wrong = [figures[name, f"attacked within {THREAT}", "wrong"] for name in ("before", "after")]
    assert wrong[1] < wrong[0]
    said = {step.title: step.text for step in again.steps}
    assert "The network as it was trained: failed. The hardened one: passed." in said["Gate"]
    assert "256 of 256 decisions are equal" in said["Export"]
    assert (folder / "safer" / "model.onnx").is_file()


def test_the_results_of_the_page_are_read_again(run):
    compare([run], run.parent, main_part())
    found = read(run.parent)
    write(found, run.parent)
    assert read(run.parent) == found
