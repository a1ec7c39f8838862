"""The page of an audit: it says what results.json says, loads nothing, and fits a phone."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from demur.evaluation.audit_counts import few_images
from demur.evaluation.audit_results import AuditResults, CheckRow, ThreatRow, write
from demur.evaluation.results import Picture, write_gallery
from demur.metrics import clopper_pearson
from demur.report import gallery as galleries
from demur.report.audit import page, render_audit, sentences, summary
from test_report_browser import BROWSER, browse

EVIL = "<script>alert(1)</script>|`\x1b[31m\u202e"


def row(threat, goal="evade", wrong=0.5, **values):
    shares = {"correct": 1 - wrong, "rejected": 0.0, "wrong": wrong}
    bounds = {f"{name}_{side}": share for name, share in shares.items() for side in ("low", "high")}
    return ThreatRow(threat, goal, 40, **shares, **bounds, **values)


RESULTS = AuditResults(
    schema="demur.audit/1",
    verdict="doubtful",
    model={"name": "net", "source": "py:net.py:make", "fingerprint": "ab" * 16},
    data={"name": "pets", "source": "pets/", "fingerprint": "cd" * 16, "images": 40},
    threats=[
        row("clean", "none", 0.1),
        row("linf:8/255", wrong=0.9, by={"PGD(steps=10)": 36}, wrong_stored=0.8, distance=0.01),
        row("l2:1", complete=False, by={"Square(n_queries=200)": 1}),
        row("linf:8/255", "force-reject", 0.0),
    ],
    checks=[
        CheckRow("noise", 0, 0, "passed", "fine"),
        CheckRow("doubling", 0.02, 0.005, "flagged", "twice the steps break more"),
        CheckRow("twin", None, None, "not_run", "later"),
    ],
    handshake=[{"name": "pixels", "state": "ok", "text": "in [0, 1]"}],
    notes=["The images are 28x28 grey."],
    findings=["The model is randomised."],
    cost={"seconds": 61.5, "estimate": 60.0, "elapsed": 62.0, "steps": []},
    code="ef" * 16,
    command="demur audit py:net.py:make --data pets/",
    profile="quick",
    seed=0,
    versions={"torch": "2.11"},
    device="cpu",
    curves=[
        {
            "kind": "eps",
            "norm": "linf",
            "x": [0.0, 0.01, 0.03],
            "correct": [0.9, 0.4, 0.1],
            "rejected": [0.0, 0.0, 0.0],
            "wrong": [0.1, 0.6, 0.9],
            "n": 40,
        }
    ],
    baseline={
        "name": "older",
        "images": 40,
        "threats": [
            {"threat": "clean", "n": 40, "before": 0.1, "now": 0.1, "worse": 0, "better": 0, "p": 1}
        ],
    },
)


def pictures(folder, count=30):
    shown = [
        Picture("3", "linf:8/255", "PGD", "defence-aware", "3", 0.9, "5", 0.6, "wrong", 1.0, 0.03)
    ]
    images = torch.zeros(count, 3, 28, 28, dtype=torch.uint8)
    write_gallery(folder, shown * count, images, images + 1)


@pytest.fixture
def folder(tmp_path):
    write(RESULTS, tmp_path)
    pictures(tmp_path)
    render_audit(tmp_path)
    return tmp_path


def test_the_first_sentence_is_the_worst_threat_with_its_interval():
    first = sentences(RESULTS)[0]
    assert first.startswith("Within linf:8/255")
    assert "90.0 % (90.0 to 90.0) of 40 images" in first
    assert "doubt" in sentences(RESULTS)[-1]


def test_where_every_image_is_wrong_no_stronger_attack_is_spoken_of():
    lost = [row("clean", "none", 0.1), row("linf:0.3", wrong=1.0)]
    assert "no attack can find more" in sentences(replace(RESULTS, threats=lost))[-1]
    some = [*lost, row("linf:0.1", wrong=0.9)]
    assert "a stronger attack may find more" in sentences(replace(RESULTS, threats=some))[-1]
    unsound = sentences(replace(RESULTS, threats=lost, verdict="unsound"))[-1]
    assert unsound.startswith("A self-test shows that an attack failed")


def test_the_comparison_with_a_baseline_is_one_line_of_the_terminal_and_the_summary():
    (line,) = [one for one in sentences(RESULTS) if one.startswith("Beside the baseline older")]
    assert "on the 40 images that both audits have" in line
    assert "without an attack, wrong 10.0 % before and 10.0 % now" in line
    assert line in summary(RESULTS)
    assert not any("baseline" in one for one in sentences(replace(RESULTS, baseline=None)))


def shares(n, wrong):
    """A row with the intervals of its counts."""
    found = {}
    for name, count in (("correct", n - wrong), ("rejected", 0), ("wrong", wrong)):
        low, high = clopper_pearson(count, n)
        found |= {name: count / n, f"{name}_low": low, f"{name}_high": high}
    return ThreatRow("linf:0.1", "evade", n, **found)


@pytest.mark.parametrize(("n", "wrong", "few"), [(5, 5, True), (40, 20, True), (67, 33, False)])
def test_few_images_are_said_by_the_width_of_the_interval(n, wrong, few):
    said = few_images([shares(300, 0), shares(n, wrong)])
    assert bool(said) == few
    if few:
        assert said[0].startswith(f"{n} images are few: the 95 % intervals are up to ")
        assert "at linf:0.1" in said[0] and "From 67 images on" in said[0]


def test_the_limit_of_a_self_test_has_its_direction(folder):
    checks = [
        CheckRow("noise", 0.0, 0.25, "passed", ""),
        CheckRow("binarization", 1.0, 0.95, "passed", "", "at least"),
    ]
    text = page(replace(RESULTS, checks=checks), None)
    assert "at most 0.25" in text and "at least 0.95" in text


def test_the_gallery_is_grouped_by_outcome_the_worst_first(tmp_path):
    outcomes = ["correct", "wrong", "rejected", "wrong"]
    shown = [
        Picture("3", f"m{place}", "PGD", "", "3", 0.9, "5", 0.6, outcome, 1.0, 0.03)
        for place, outcome in enumerate(outcomes)
    ]
    images = torch.zeros(4, 1, 8, 8, dtype=torch.uint8)
    images[1] = 200
    write_gallery(tmp_path, shown, images, images + 1)
    cards = galleries.read(tmp_path).cards
    assert [card.item.model for card in cards] == ["m1", "m3", "m2", "m0"]
    assert cards[0].original != cards[1].original == cards[2].original  # pictures move along


def test_a_threat_without_a_size_is_reported_by_its_median_smallest_change():
    found = replace(RESULTS, threats=[*RESULTS.threats, row("l2", wrong=1.0, distance=0.1234)])
    assert "The median smallest change that breaks an image is 0.123 in l2." in sentences(found)
    assert not any("median" in one for one in sentences(RESULTS))


def test_the_page_shows_every_row_state_and_hash(folder):
    text = (folder / "report.html").read_text()
    for said in (
        *("linf:8/255", "l2:1", "not all attacks ran", "the attacker wants a rejection"),
        *("PGD(steps=10)", "flagged", "not run", "The images are 28x28 grey", "ab" * 16, "cd" * 16),
        *("older", "McNemar", "AML.T0015", "it is no proof", "still wrong and accepted after"),
    ):
        assert said in text
    assert "NISTAML.022" in text


def test_findings_stand_above_the_figures_and_notes_below(folder):
    text = (folder / "report.html").read_text()
    finding, note = (text.index(one) for one in (RESULTS.findings[0], RESULTS.notes[0]))
    assert finding < text.index('id="outcomes"') < note
    assert RESULTS.findings[0] in summary(RESULTS)
    assert RESULTS.notes[0] not in summary(RESULTS)


def test_the_page_loads_nothing(folder):
    text = (folder / "report.html").read_text()
    assert not re.search(r'(src|href)="(?!data:|#)', text)
    assert "default-src 'none'" in text


def test_a_strangers_text_is_escaped_everywhere():
    evil = replace(
        RESULTS,
        model=dict.fromkeys(RESULTS.model, EVIL),
        data={**dict.fromkeys(RESULTS.data, EVIL), "images": 40},
        checks=[CheckRow(EVIL, 1.0, 0.0, "flagged", EVIL)],
        handshake=[{"name": EVIL, "state": EVIL, "text": EVIL}],
        notes=[EVIL],
        findings=[EVIL],
        command=EVIL,
        versions={EVIL: EVIL},
        threats=[row("linf:8/255", by={EVIL: 3})],
    )
    text = page(evil, None)
    assert "<script>alert" not in text
    assert text.count("<script>") == 1
    assert "\x1b" not in summary(evil)
    assert "<script>" not in summary(evil)


def test_markdown_has_a_row_for_each_threat():
    lines = summary(RESULTS).splitlines()
    rows = [line for line in lines if line.startswith("| linf") or line.startswith("| l2")]
    assert len(rows) == 3
    assert "| l2:1 (not all attacks ran) | evade | 50" in rows[1]


PHONE = """<!DOCTYPE html><iframe src="report.html" width="360" height="800"></iframe><pre></pre>
<script>
document.querySelector("iframe").addEventListener("load", event => {
  const page = event.target.contentDocument, root = page.documentElement;
  const shown = [...page.querySelectorAll(".card")].filter(one => one.getClientRects().length);
  const seen = { inner: root.clientWidth, scroll: root.scrollWidth, cards: shown.length };
  document.querySelector("pre").textContent = JSON.stringify(seen);
});</script>"""


@pytest.mark.skipif(BROWSER is None, reason="no chromium or chrome on the path")
def test_a_phone_scrolls_one_way_and_the_console_stays_silent(folder: Path):
    (folder / "phone.html").write_text(PHONE)
    text = browse(folder, "phone.html")
    seen = json.loads(re.search(r"<pre>(.*?)</pre>", text)[1])
    assert seen["scroll"] == seen["inner"] <= 360
    assert seen["cards"] == 24
