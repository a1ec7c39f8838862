"""The gate: decisions against scipy's intervals, exit codes, and what CI servers read."""

import itertools
import json
import re
from functools import cache
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from command import demur
from demur import DemurError
from demur.commands.gate import COLUMNS, gate
from demur.evaluation.audit_results import AuditResults, CheckRow, ThreatRow
from demur.evaluation.gate import counts_of, decide_rule, images_needed
from demur.evaluation.gate_rules import Rule, Rules, parse_rules
from demur.evaluation.records import SCHEMA
from demur.metrics.intervals import paired_bounds, paired_p_value

LINF = "linf:8/255"
EPS = 8 / 255
PASSED = [{"name": "noise", "value": 0, "limit": 0, "state": "passed", "text": "fine"}]
FLAGGED = [{"name": "doubling", "value": 1, "limit": 0.5, "state": "flagged", "text": "more <&>"}]
ORDER = ["correct", "rejected", "wrong"]
DOCS = (Path(__file__).resolve().parents[1] / "docs" / "gate.md").read_text(encoding="utf-8")


def shares(outcomes):
    found = {name: outcomes.count(name) / len(outcomes) for name in ORDER}
    return found | {f"{name}_{end}": found[name] for name in ORDER for end in ("low", "high")}


def write_audit(folder, outcomes, verdict="sound", checks=PASSED, incomplete=(), images=None):
    """An audit of images with the given outcomes, by threat; clean images come first."""
    n = len(outcomes["clean"])
    images = images or [f"image {place}" for place in range(n)]
    threats, records = [], []
    for threat, found in outcomes.items():
        norm, _, eps = threat.partition(":")
        clean = threat == "clean"
        forced = threat.endswith("!")  # its goal is to force a rejection
        worst = [max(pair, key=ORDER.index) for pair in zip(found, outcomes["clean"], strict=True)]
        goal = "none" if clean else "force-reject" if forced else "evade"
        row = {
            "threat": threat.strip("!"),
            "goal": goal,
            "n": n,
            **shares(found if forced else worst),
        }
        threats.append({**row, "complete": threat not in incomplete})
        for place, outcome in enumerate(found):
            same = {"dataset": "d", "split": "test", "repeat": 0, "index": place, "label": 0}
            same |= {"image": images[place], "outcome": outcome}
            if not clean:
                size = {"8/255": EPS, "": None}.get(eps.strip("!")) or float(eps.strip("!"))
                named = "ForceReject()" if forced else "evade"
                same |= {"attack": "PGD()", "norm": norm, "eps": size, "goal": named, norm: size}
            records.append(same)
    results = {
        "schema": "demur.audit/1",
        "verdict": verdict,
        "model": {"name": "timm:resnet18"},
        "data": {"name": "photos"},
        "threats": threats,
        "checks": checks,
        **{"handshake": [], "notes": [], "cost": {}, "code": "c", "command": "demur audit"},
        **{"profile": "quick", "seed": 0, "versions": {}, "device": "cpu"},
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(results))
    pl.DataFrame(records, schema={name: SCHEMA[name] for name in COLUMNS}).write_parquet(
        folder / "records.parquet"
    )
    return folder


def outcomes(correct, rejected, wrong):
    return ["correct"] * correct + ["rejected"] * rejected + ["wrong"] * wrong


def write_rules(folder, rules="", head="", baseline=""):
    path = folder / "gate.toml"
    path.write_text(f"[gate]\n{head}\n{rules}\n{baseline}")
    return path


def rule(metric="wrong", threat=LINF, **limits):
    named = {key: repr(value).replace("'", '"') for key, value in limits.items()}
    rest = "\n".join(f"{key} = {value}" for key, value in named.items())
    return f'[[gate.rule]]\nmetric = "{metric}"\nthreat = "{threat}"\n{rest}\n'


def audited(count, n, metric="wrong", **given):
    """An audit in memory, with so many images of one outcome and the others of another."""
    other = "correct" if metric != "correct" else "wrong"
    found = shares([metric] * count + [other] * (n - count))
    row = ThreatRow(threat=LINF, goal="evade", n=n, **found, **given)
    rest = {"handshake": [], "notes": [], "cost": {}, "code": "", "command": "", "profile": ""}
    return AuditResults(
        schema="demur.audit/1",
        verdict="sound",
        model={},
        data={},
        threats=[row],
        checks=[CheckRow("noise", 0, 0, "passed", "")],
        **rest,
        seed=0,
        versions={},
        device="cpu",
    )


def rules_of(*given, **settings):
    return Rules(rule=list(given), **settings)


@given(
    st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))),
    st.floats(0, 1),
    st.sampled_from(["max", "min"]),
    st.sampled_from(["correct", "rejected", "wrong"]),
    st.floats(0.5, 0.999),
)
def test_a_rule_is_decided_by_scipys_one_sided_exact_bounds(
    figure, limit, side, metric, confidence
):
    count, n = figure
    one = Rule(metric=metric, threat="linf:0.03137254901960784", **{side: limit})
    (found,) = decide_rule(one, audited(count, n, metric), rules_of(one, confidence=confidence))
    upper = stats.binomtest(count, n, alternative="less").proportion_ci(confidence).high
    lower = stats.binomtest(count, n, alternative="greater").proportion_ci(confidence).low
    assert (found.low, found.high) == pytest.approx((lower, upper), abs=1e-9)
    passes = upper <= limit if side == "max" else lower >= limit
    fails = lower > limit if side == "max" else upper < limit
    if min(abs(upper - limit), abs(lower - limit)) > 1e-9:
        assert found.state == ("passed" if passes else "failed" if fails else "inconclusive")
    assert (found.value, found.n, found.limit) == (count / n, n, limit)


def test_a_rule_with_two_limits_is_two_decisions_and_equality_passes():
    edge = float(stats.beta.ppf(0.95, 31, 70))  # the upper bound of 30 of 100
    one = Rule(metric="wrong", threat=LINF, max=edge, min=0)
    found = decide_rule(one, audited(30, 100), rules_of(one))
    assert [each.state for each in found] == ["passed", "passed"]
    below = Rule(metric="wrong", threat=LINF, max=float(np.nextafter(edge, 0)))
    assert decide_rule(below, audited(30, 100), rules_of(below))[0].state == "inconclusive"
    everything = Rule(metric="wrong", threat=LINF, max=1)
    assert decide_rule(everything, audited(100, 100), rules_of(everything))[0].state == "passed"


@settings(max_examples=60)
@given(
    st.integers(1, 300).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))),
    st.floats(0.01, 0.99),
    st.sampled_from(["max", "min"]),
)
def test_the_planned_number_of_images_is_where_the_rule_starts_to_pass(figure, limit, side):
    count, n = figure
    one = Rule(metric="wrong", threat=LINF, **{side: limit})
    rules = rules_of(one)
    (found,) = decide_rule(one, audited(count, n), rules)
    wrong_side = count / n >= limit if side == "max" else count / n <= limit
    assert (found.needed is None) == wrong_side or found.needed is None  # or too close to the limit
    assert (found.state == "passed") == (found.needed is not None and found.needed <= n)
    if found.needed is not None and found.needed * n < 10**9:
        times = -(-found.needed // n)  # so many times the images, with the same share
        for factor in {times, max(times - 1, 1)}:
            again = decide_rule(one, audited(count * factor, n * factor), rules)[0].state
            assert (again == "passed") == (n * factor >= found.needed)


def test_the_planned_number_of_images_has_the_known_values():
    one = Rule(metric="wrong", threat=LINF, max=0.05)
    rules = rules_of(one)
    needed = images_needed(0.0, 0.05, "max", rules)
    assert needed == 59  # 0.95 ** 59 < 0.05 <= 0.95 ** 58
    assert images_needed(1.0, 0.95, "min", rules) == 59
    assert images_needed(0.0, 0.05, "max", rules_of(one, min_images=200)) == 200
    assert images_needed(0.2, 0.05, "max", rules) is None
    assert images_needed(0.0, 0.0, "max", rules) is None


# Exit codes

GOOD = outcomes(95, 3, 2)
BAD = outcomes(10, 0, 90)


@pytest.fixture
def call(tmp_path, monkeypatch):
    """Make an audit and rules, and call the command line."""
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)

    def run(rules, attacked=GOOD, words=(), head="", baseline="", **given):
        folder = write_audit(tmp_path / "run", {"clean": GOOD, LINF: attacked}, **given)
        return demur(
            "gate", folder, "--rules", write_rules(tmp_path, rules, head, baseline), *words
        )

    return run


KEPT = rule(max=0.1)
BROKEN = rule(max=0.3)
UNSOUND = {"verdict": "unsound", "checks": FLAGGED}
DOUBTFUL = {"verdict": "doubtful", "checks": FLAGGED}


@pytest.mark.parametrize(
    ("code", "rules", "given"),
    [
        (0, KEPT, {}),
        (0, KEPT, DOUBTFUL),
        (0, KEPT, {**UNSOUND, "head": "require_selftests = false"}),
        (0, KEPT, {"checks": [], "head": "require_selftests = false"}),
        (0, rule(threat="clean", min=0.8, metric="correct"), {"incomplete": [LINF]}),
        (1, BROKEN, {"attacked": BAD}),
        (3, rule(max=0.03), {}),
        (3, KEPT, {"head": "min_images = 101"}),
        (3, KEPT, UNSOUND),
        (3, rule(threat="clean", min=0.5, metric="correct"), UNSOUND),
        (3, KEPT, {**DOUBTFUL, "head": "allow_doubtful = false"}),
        (3, KEPT, {"checks": []}),
        (3, KEPT, {"checks": [{**PASSED[0], "state": "not_run"}]}),
        (3, KEPT, {"incomplete": [LINF]}),
        (2, rule(threat="linf:4/255", max=0.1), {}),
        (2, "", {}),
        # A broken image is a fact: 1 wins over every reason for 3.
        (1, BROKEN, {"attacked": BAD, **UNSOUND}),
        (1, BROKEN, {"attacked": BAD, "incomplete": [LINF]}),
        (1, BROKEN, {"attacked": BAD, "head": "min_images = 1000"}),
        (1, BROKEN + rule("rejected", max=0.02), {"attacked": BAD}),
        (1, rule("correct", min=0.5), {"attacked": BAD, **UNSOUND}),
        # More attacks could still turn rejections into errors, so that this is no fact yet.
        (3, rule("rejected", min=0.5), {"attacked": BAD, **UNSOUND}),
        (3, rule("correct", max=0.01), {"attacked": BAD, "incomplete": [LINF]}),
        # Bad input wins over everything.
        (2, BROKEN + rule(threat="l2:1", max=0.1), {"attacked": BAD, **UNSOUND}),
    ],
)
def test_exit_codes_and_their_precedence(call, code, rules, given):
    done = call(rules, **given)
    assert done.returncode == code, done.stdout + done.stderr
    if code == 2:
        assert done.stderr.startswith("demur: ") and done.stderr.count("\n") == 1
        assert not done.stdout
    else:
        word = {0: "passed", 1: "failed", 3: "inconclusive"}[code]
        assert done.stdout.startswith(f"Gate {word} (exit code {code}): timm:resnet18 on photos")


def test_a_missing_threat_is_answered_with_those_that_are_there(call):
    done = call(rule(threat="l2:1.5", max=0.1))
    assert done.returncode == 2
    assert "no threat l2:1.5; it has: clean, linf:8/255" in done.stderr
    forced = call(rule(max=0.1, goal="force-reject"))
    assert forced.returncode == 2 and "linf:8/255 (force-reject)" in forced.stderr


def test_goals_are_told_apart_and_a_forced_rejection_is_a_fact(tmp_path):
    given = {"clean": GOOD, LINF: GOOD, f"{LINF}!": outcomes(10, 90, 0)}
    folder = write_audit(tmp_path / "run", given, incomplete=[f"{LINF}!"])
    rules = rule(max=0.1) + rule("rejected", max=0.5, goal="force-reject")
    result = gate(folder, write_rules(tmp_path, rules))
    assert [one.state for one in result.rules] == ["passed", "failed"]
    assert result.rules[1].threat == "linf:8/255 (force-reject)" and result.exit_code == 1


def test_the_plan_says_how_many_images_each_rule_needs(call):
    rules = rule(max=0.03) + rule("rejected", max=0.01) + rule("correct", min=0.5, threat="clean")
    done = call(rules, words=["--plan"])
    plan = done.stdout.splitlines()[-3:]
    needed = int(re.search(r"needs ([\d,]+) images;", plan[0])[1].replace(",", ""))
    assert needed == images_needed(
        0.02, 0.03, "max", rules_of(Rule(metric="wrong", threat="l2", max=1))
    )
    assert "never passes" in plan[1] and re.search(r"needs \d images;", plan[2])
    assert all(line.endswith("; the audit has 100") for line in plan) and done.returncode == 3


# Rules files


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "gate: it is missing"),
        ("[gate]", "it has no rule: add [[gate.rule]]"),
        (
            "[gate]\nconfidnce = 0.9",
            "gate.confidnce: there is no such key (did you mean 'confidence'",
        ),
        (
            "[[gate.rule]]\nmetric = 'wrong'\nthreat = 'clean'\nmaximum = 1",
            "maximum: there is no such",
        ),
        ("[[gate.rule]]\nmetric = 'wrong'\nthreat = 'clean'", "no limit: add max or min"),
        (rule(max=35), "35 is no share in [0, 1]: write 0.35 for 35 %"),
        (rule(min=-0.1), "-0.1 is no share"),
        (rule() + "max = nan", "nan is no share"),
        (rule() + "max = true", "gate.rule.0.max"),
        (rule() + 'max = "0.3"', "gate.rule.0.max"),
        (rule(max=0.1, min=0.2), "min 0.2 is above max 0.1"),
        (rule("wrnog", max=0.1), "Did you mean 'wrong'?"),
        (rule("proven", min=0.1, threat="clean"), "proven needs a threat with the goal evade"),
        (rule("accepted_ood", min=0.1), "accepted_ood has no threat: leave the line out"),
        (rule("proven"), "no limit: add max or min"),
        (rule(threat="linf=8", max=0.1), "linf"),
        (rule(max=0.1, goal="fly"), "gate.rule.0.goal"),
        (rule(max=0.1) + rule(threat="linf:0.03137254901960784", max=0.2), "two rules limit wrong"),
        ("[gate]\nconfidence = 95\n" + rule(max=0.1), "gate.confidence"),
        ("[gate]\nmin_images = -1\n" + rule(max=0.1), "gate.min_images"),
        ("[gate.baseline]\nfile = 'a'\nmax_increase = 1", "max_increase"),
        ("[gate.baseline]\nfile = 'a'\nmax_increase = 0.1\nif_not_found = 'pass'", "if_not_found"),
        ("[gate", "it is not TOML"),
        ("a = " + "[" * 5000, "it is not TOML"),
        ("a = " + "1" * 5000, "it is not TOML"),
        ('"\\u001b[31m" = 1', "there is no such key"),
        (rule(max=0.1, goal="x" * 5000), "gate.rule.0.goal"),
        (rule(threat="y" * 5000, max=0.1), "gate.rule.0.threat"),
    ],
)
def test_faults_of_a_rules_file_are_named_with_their_remedy(text, said):
    with pytest.raises(DemurError) as error:
        parse_rules(text)
    line = str(error.value)
    assert said in line
    assert len(line) < 1100 and line.isprintable()
    assert re.search(r"[^.]\.$", line)  # one full stop ends it


def test_all_faults_are_named_at_once():
    text = "[gate]\nmin_image = 3\n" + rule(max=3) + rule("worng", max=0.1)
    with pytest.raises(DemurError, match=r"min_images.*write 0\.03.*Did you mean 'wrong'"):
        parse_rules(text)


def test_rules_files_that_cannot_be_read_are_one_line(tmp_path):
    folder = write_audit(tmp_path / "run", {"clean": GOOD})
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    (tmp_path / "large.toml").write_bytes(b"#" * (1 << 24) + b"##")
    for name, said in (
        ("binary.toml", "UTF-8"),
        ("large.toml", "more than the limit"),
        ("none.toml", "there is no file"),
    ):
        with pytest.raises(DemurError, match=said):
            gate(folder, tmp_path / name)
    with pytest.raises(DemurError, match="no regular file"):
        gate(folder, tmp_path)


# Results of strangers


def test_damaged_results_are_one_line_and_exit_code_2(tmp_path):
    rules = write_rules(tmp_path, rule(max=0.1))
    folder = write_audit(tmp_path / "run", {"clean": GOOD, LINF: GOOD})
    file = folder / "results.json"
    good = json.loads(file.read_text())
    first = good["threats"][0]
    wrong = [
        {**good, "schema": 1},
        {**good, "verdict": "splendid"},
        {**good, "threats": [*good["threats"], {**good["threats"][1], "threat": f"linf:{EPS!r}"}]},
        *({**good, "threats": [first, {**good["threats"][1], **one}]} for one in DAMAGES),
        [],
    ]
    texts = [json.dumps(one) for one in wrong] + ["", "{", "[" * 100_000, '{"schema": "\\ud800"}']
    for text in texts:
        file.write_text(text)
        done = demur("gate", folder, "--rules", rules)
        assert done.returncode == 2, text[:300]
        assert done.stderr.count("\n") == 1 and done.stderr.strip().isprintable()
        assert len(done.stderr) < 1000 + len(str(folder))
    file.write_text(" " * (16 << 20) + " ")
    with pytest.raises(DemurError, match="more than the limit"):
        gate(folder, rules)
    file.write_text(json.dumps(good))
    assert gate(file, rules).exit_code == 0  # the file itself is as good as its folder


DAMAGES = [
    {"n": 0},
    {"n": -5},
    {"n": 99},
    {"n": 10**400},
    {"wrong": float("nan")},
    {"wrong": 1.5},
    {"wrong": 0.5},
    {"wrong": 0.0249, "correct": 0.9451},
    {"threat": "linf:-1"},
    {"by": {"\x1b[31m" + "z" * 10_000: "many"}},
    {"threat": "\x1b[31m" + "z" * 10_000},
    {"goal": "\x1b[31m" + "z" * 10_000},
]


def test_shares_that_were_rounded_a_little_still_give_the_counts():
    row = audited(1, 3).threats[0]
    rounded = ThreatRow(**{**vars(row), "wrong": 0.3333, "correct": 0.6667})
    assert counts_of(rounded) == {"correct": 2, "rejected": 0, "wrong": 1}


# Baseline

BASELINE = '[gate.baseline]\nfile = "earlier/results.json"\nmax_increase = 0.05\n'


@pytest.fixture
def compare(tmp_path):
    """Make two audits and compare them."""

    def run(now, before, baseline=BASELINE, head="", now_given=(), before_given=()):
        write_audit(tmp_path / "earlier", before, **dict(before_given))
        folder = write_audit(tmp_path / "run", now, **dict(now_given))
        return gate(folder, write_rules(tmp_path, head=head, baseline=baseline))

    return run


CLEAN = outcomes(400, 0, 0)


def attacked(wrong):
    return {"clean": CLEAN, LINF: outcomes(400 - wrong, 0, wrong)}


def test_the_increase_over_a_baseline_passes_fails_or_is_inconclusive(compare):
    found = {}
    for wrong in (90, 100, 118, 150):
        result = compare(attacked(wrong), attacked(100))
        clean, under_attack = result.rules
        assert clean.state == "passed" and clean.value == 0
        assert under_attack.value == pytest.approx((wrong - 100) / 400)
        assert under_attack.low <= under_attack.value <= under_attack.high
        found[wrong] = (under_attack.state, result.exit_code)
    assert found == {
        90: ("passed", 0),
        100: ("passed", 0),
        118: ("inconclusive", 3),
        150: ("failed", 1),
    }


def test_pairing_sees_what_the_shares_do_not(compare):
    """Negative control: the same shares, but other images."""
    first, last = outcomes(300, 0, 100), outcomes(300, 0, 100)[::-1]
    now, before = {"clean": CLEAN, LINF: first}, {"clean": CLEAN, LINF: last}
    assert compare(now, now).rules[1].state == "passed"
    assert compare(now, before).rules[1].state == "inconclusive"


def test_doubts_about_either_audit_weaken_the_side_that_they_concern(compare):
    worse, same = attacked(150), attacked(100)
    partial = {"incomplete": [LINF]}
    assert compare(worse, same, now_given=partial).exit_code == 1  # more attacks: even worse
    assert compare(worse, same, now_given=UNSOUND).exit_code == 1
    assert compare(worse, same, before_given=partial).exit_code == 3  # it may have been so before
    assert compare(worse, same, before_given=UNSOUND).exit_code == 3
    assert compare(same, same, before_given=partial).exit_code == 0
    assert compare(same, same, now_given=partial).exit_code == 3
    assert compare(same, same, head="min_images = 401").exit_code == 3
    assert compare(worse, same, head="min_images = 401").exit_code == 1


def test_no_tolerance_is_mcnemars_exact_test(compare):
    exactly = BASELINE.replace("0.05", "0")
    found = compare(attacked(105), attacked(100), exactly).rules
    assert [one.state for one in found] == ["inconclusive", "failed"]
    found = compare(attacked(104), attacked(100), exactly).rules
    assert found[1].state == "inconclusive"
    assert stats.binomtest(5, 5, alternative="greater").pvalue < 0.05
    assert stats.binomtest(4, 4, alternative="greater").pvalue > 0.05


def test_threats_of_both_audits_are_compared_by_value_and_the_others_are_named(compare):
    now = {"clean": CLEAN, f"linf:{EPS!r}": CLEAN, "l2:1.5": CLEAN}
    before = {"clean": CLEAN, LINF: CLEAN, "l2:0.5": CLEAN}
    result = compare(now, before)
    assert [one.threat for one in result.rules] == ["clean", LINF]
    assert "only one audit has it: l2:0.5, l2:1.5" in result.text


def test_only_images_of_both_audits_count_and_equal_images_count_once(compare):
    names = [f"image {place}" for place in range(400)]
    other = names[:300] + [f"new {place}" for place in range(98)] + ["image 0", "image 0"]
    result = compare(attacked(0), attacked(0), now_given={"images": other})
    assert [one.n for one in result.rules] == [300, 300] and "only images of both" in result.text
    with pytest.raises(DemurError, match="no image in common"):
        compare(attacked(0), attacked(0), now_given={"images": [f"new {name}" for name in names]})


def test_the_clean_image_is_an_attack_too(compare):
    """An attack that fails on an image that is wrong without one does not make it right."""
    clean = outcomes(300, 0, 100)
    result = compare({"clean": clean, LINF: CLEAN}, {"clean": CLEAN, LINF: CLEAN})
    assert [one.value for one in result.rules] == [0.25, 0.25]
    assert [one.state for one in result.rules] == ["failed", "failed"]


def test_a_baseline_that_is_missing_or_of_other_records(compare, tmp_path):
    folder = write_audit(tmp_path / "run", attacked(0))
    rules = write_rules(tmp_path, rule(max=0.5), baseline=BASELINE)
    with pytest.raises(DemurError, match=r"does not exist\. .*if_not_found"):
        gate(folder, rules)
    skipping = BASELINE + 'if_not_found = "skip"\n'
    skipped = gate(folder, write_rules(tmp_path, rule(max=0.5), baseline=skipping))
    assert skipped.exit_code == 0 and "No comparison: the baseline" in skipped.text
    records = tmp_path / "earlier" / "records.parquet"
    compare(attacked(0), attacked(0))
    results = json.loads((folder / "results.json").read_text())
    l2_only = {**results, "threats": [{**results["threats"][1], "threat": "l2:1"}]}
    (tmp_path / "earlier" / "l2.json").write_text(json.dumps(l2_only))
    with pytest.raises(DemurError, match="no threat in common"):
        gate(folder, write_rules(tmp_path, baseline=BASELINE.replace("results.json", "l2.json")))
    rules = write_rules(tmp_path, rule(max=0.5), baseline=BASELINE)
    other = pl.read_parquet(records)
    other.head(100).write_parquet(records)
    with pytest.raises(DemurError, match="not of one audit"):
        gate(folder, rules)
    other.with_columns(outcome=pl.lit("splendid")).write_parquet(records)
    with pytest.raises(DemurError, match="as records of an audit"):
        gate(folder, rules)
    other.drop("image").write_parquet(records)
    with pytest.raises(DemurError, match="as records of an audit"):
        gate(folder, rules)
    for content in (b"", b"PAR1" * 100):
        records.write_bytes(content)
        with pytest.raises(DemurError, match="as records of an audit"):
            gate(folder, rules)
    records.unlink()
    with pytest.raises(DemurError, match="needs the records of both audits"):
        gate(folder, rules)


# The paired test


def test_the_paired_test_of_no_difference_is_scipys_binomial_test():
    for gained, lost in itertools.product(range(8), repeat=2):
        for side in ("less", "greater"):
            found = paired_p_value(gained, lost, 100, alternative=side)
            total = gained + lost
            expected = stats.binomtest(gained, total, alternative=side).pvalue if total else 1
            assert found == pytest.approx(expected)


@cache
def outcomes_of(n):
    cells = [(b, c) for b in range(n + 1) for c in range(n + 1 - b)]
    return np.array([(b, c, n - b - c) for b, c in cells])


@pytest.mark.parametrize("n", [7, 25])
@pytest.mark.parametrize("difference", [0.02, 0.1, 0.3, -0.05])
def test_the_paired_test_errs_no_more_often_than_it_says(n, difference):
    """All outcomes of n pairs, over all shares of discordant pairs and all true differences that
    the test excludes: an exact computation, no simulation.
    """
    cells = outcomes_of(n)
    p = np.array([paired_p_value(b, c, n, difference) for b, c, _ in cells.tolist()])
    largest = dict.fromkeys((0.01, 0.05, 0.1), 0.0)
    for true in (difference, difference + 0.03, difference + 0.2):
        for lost in np.linspace(max(0.0, -true), (1 - true) / 2, 60):
            chances = [lost + true, lost, max(1 - 2 * lost - true, 0.0)]
            weights = stats.multinomial.pmf(cells, n, np.clip(chances, 0, 1))
            for level in largest:
                largest[level] = max(largest[level], weights[p <= level].sum())
    assert all(found <= level + 1e-9 for level, found in largest.items())
    assert largest[0.1] > 0.03  # and it does reject


@pytest.mark.parametrize(("gained", "lost"), [(0.05, 0.04), (0.3, 0.28), (0.03, 0.0), (0.0, 0.04)])
def test_a_true_difference_is_seldom_excluded(gained, lost):
    """A simulation of 1,000 pairs of audits of 100 images. The test errs in at most 5 % of them,
    and with enough images it excludes differences that are not true.
    """
    true = gained - lost
    random = np.random.default_rng(0)
    drawn = random.multinomial(100, [gained, lost, 1 - gained - lost], size=1000)[:, :2]
    kinds, counts = np.unique(drawn, axis=0, return_counts=True)
    for side in ("less", "greater"):
        p = np.array([paired_p_value(b, c, 100, true, side) for b, c in kinds.tolist()])
        spread = 3 * np.sqrt(0.05 * 0.95 / 1000)
        assert counts[p <= 0.05].sum() / 1000 < 0.05 + spread
        far = true + (0.3 if side == "less" else -0.3)
        p = np.array([paired_p_value(b, c, 100, far, side) for b, c in kinds.tolist()])
        assert counts[p <= 0.05].sum() / 1000 > 0.7


@settings(max_examples=40)
@given(st.integers(0, 20), st.integers(0, 20), st.integers(40, 900), st.floats(-0.3, 0.3))
def test_the_two_sides_of_the_paired_test_fit_together(gained, lost, n, difference):
    less, greater = (paired_p_value(gained, lost, n, difference, s) for s in ("less", "greater"))
    assert less + greater >= 1 - 1e-9  # both count the observed outcome
    assert greater == paired_p_value(lost, gained, n, -difference, "less")


@settings(max_examples=10)
@given(st.integers(0, 20), st.integers(0, 20), st.integers(40, 300))
def test_paired_bounds_hold_the_estimate_and_turn_with_the_sides(gained, lost, n):
    low, high = paired_bounds(gained, lost, n)
    assert -1 <= low <= (gained - lost) / n <= high <= 1
    assert paired_bounds(lost, gained, n) == (-high, -low)
    assert paired_p_value(gained, lost, n, high) <= 0.05
    assert paired_p_value(gained, lost, n, max(high - 2**-13, (gained - lost) / n)) > 0.05


def test_without_discordant_pairs_the_bound_is_that_of_a_share():
    for n in (50, 300, 1000):
        upper = stats.binomtest(0, n, alternative="less").proportion_ci(0.95).high
        assert paired_bounds(0, 0, n)[1] == pytest.approx(upper, abs=2**-13)
        assert paired_p_value(0, 0, n, 0.1, "greater") == 1


def test_paired_figures_out_of_range_are_refused():
    for wrong in ((-1, 0, 5), (3, 3, 5), (0, 0, 0), (1, 1, 5, 1.0)):
        with pytest.raises(DemurError, match="paired test"):
            paired_p_value(*wrong)
    with pytest.raises(DemurError, match="less or greater"):
        paired_p_value(1, 1, 5, 0.1, "two-sided")
    assert paired_bounds(0, 0, 0) == (-1, 1)
    assert paired_bounds(5, 0, 5)[1] == 1 and paired_bounds(0, 5, 5)[0] == -1


# What CI servers read

HOSTILE = (
    '</failure>]]><script>alert("x")</script>\x1b[31m\x00\ud83d\ude00 | a | `b` & ' + "z" * 9000
)


def junit(path):
    root = ElementTree.parse(path).getroot()
    assert root.tag == "testsuites"
    for element in (root, *root.findall("testsuite")):
        cases = element.findall(".//testcase")
        for kind, attribute in (
            ("failure", "failures"),
            ("error", "errors"),
            ("skipped", "skipped"),
        ):
            assert int(element.get(attribute)) == sum(case.find(kind) is not None for case in cases)
        assert int(element.get("tests")) == len(cases)
    return {case.get("name"): case for case in root.iter("testcase")}


def test_junit_has_a_case_for_each_rule_and_self_test(call, tmp_path):
    checks = [*PASSED, *FLAGGED, {**PASSED[0], "name": "twin", "state": "not_applicable"}]
    rules = BROKEN + rule("rejected", max=0.001) + rule("correct", min=0.5, threat="clean")
    words = ["--junit", tmp_path / "out" / "junit.xml"]
    done = call(rules, attacked=BAD, words=words, verdict="doubtful", checks=checks)
    cases = junit(tmp_path / "out" / "junit.xml")
    assert done.returncode == 1
    assert list(cases) == [
        "wrong at linf:8/255: at most 30 %",
        "rejected at linf:8/255: at most 0.1 %",
        "correct at clean: at least 50 %",
        "verdict",
        "noise",
        "doubling",
        "twin",
    ]
    failure = cases["wrong at linf:8/255: at most 30 %"].find("failure")
    assert failure.get("message").startswith("90.00 % of 100 images") and failure.get("type")
    undecided = cases["rejected at linf:8/255: at most 0.1 %"].find("error")
    assert "do not decide" in undecided.get("message") and undecided.text
    assert not list(cases["noise"]) and not list(cases["verdict"])
    assert cases["doubling"].find("skipped").get("message") == "doubling, flagged: more <&>"
    assert cases["twin"].find("skipped") is not None
    for case in cases.values():
        assert case.get("classname").startswith("demur.gate.") and float(case.get("time")) == 0


@pytest.mark.parametrize(
    ("rules", "given"),
    [
        (KEPT, {}),
        (KEPT, DOUBTFUL),
        (BROKEN, {"attacked": BAD}),
        (rule(max=0.03), {}),
        (KEPT, UNSOUND),
        (rule("correct", "clean", min=0.5), UNSOUND),
        (KEPT, {**DOUBTFUL, "head": "allow_doubtful = false"}),
        (KEPT, {"checks": []}),
        (KEPT, {"incomplete": [LINF]}),
    ],
)
def test_junit_fails_exactly_if_the_exit_code_does(call, tmp_path, rules, given):
    done = call(rules, words=["--junit", tmp_path / "junit.xml"], **given)
    cases = junit(tmp_path / "junit.xml").values()
    failures = [case for case in cases if case.find("failure") is not None]
    errors = [case for case in cases if case.find("error") is not None]
    assert done.returncode == (1 if failures else 3 if errors else 0)


def test_texts_of_strangers_are_escaped_and_bounded_in_all_outputs(tmp_path, monkeypatch):
    folder = write_audit(tmp_path / "run", {"clean": GOOD, LINF: GOOD}, verdict="doubtful")
    content = json.loads((folder / "results.json").read_text())
    content |= {"model": {"name": HOSTILE}, "data": {"name": [HOSTILE]}}
    content["checks"] = [{**FLAGGED[0], "name": HOSTILE, "text": HOSTILE}]
    (folder / "results.json").write_text(json.dumps(content))
    words = [
        "--junit",
        tmp_path / "a.xml",
        "--markdown",
        tmp_path / "a.md",
        "--badge",
        tmp_path / "a",
    ]
    done = demur("gate", folder, "--rules", write_rules(tmp_path, rule(max=0.5)), *words)
    assert done.returncode == 0, done.stderr
    assert done.stdout.replace("\n", "").isprintable() and len(done.stdout) < 1500
    cases = junit(tmp_path / "a.xml")
    skipped = next(case for name, case in cases.items() if name.startswith("</failure>"))
    assert "<script>" in skipped.find("skipped").text  # as text, not as elements
    text = (tmp_path / "a.md").read_text()
    assert "<script>" not in text and "\\|" in text and "\x1b" not in text and len(text) < 3000
    assert len((tmp_path / "a.xml").read_text()) < 8000


def test_markdown_goes_into_the_step_summary_and_the_badge_is_an_endpoint(
    call, tmp_path, monkeypatch
):
    summary = tmp_path / "summary.md"
    summary.write_text("before\n")
    files = ["--markdown", tmp_path / "gate.md", "--badge", tmp_path / "badge.json"]
    call(KEPT, words=files)
    assert summary.read_text() == "before\n"
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    call(KEPT, words=files)
    markdown = (tmp_path / "gate.md").read_text()
    assert summary.read_text() == f"before\n{markdown}"
    table = [line for line in markdown.splitlines() if line.startswith("|")]
    assert len(table) == 3 and {re.sub(r"\\\|", "", line).count("|") for line in table} == {5}
    assert "**passed**" in table[2] and "wrong at linf:8/255: at most 10 %" in table[2]
    badge = json.loads((tmp_path / "badge.json").read_text())
    assert badge == {
        "schemaVersion": 1,
        "label": "demur gate",
        "message": "passed",
        "color": "brightgreen",
    }
    call(BROKEN, attacked=BAD, words=files)
    badge = json.loads((tmp_path / "badge.json").read_text())
    assert (badge["message"], badge["color"]) == ("failed", "red")


def test_bad_input_writes_nothing_and_outputs_replace_no_input(call, tmp_path):
    done = call(rule(threat="l2:1", max=0.1), words=["--junit", tmp_path / "junit.xml"])
    assert done.returncode == 2 and not (tmp_path / "junit.xml").exists()
    results = tmp_path / "run" / "results.json"
    before = results.read_text()
    for words in (
        ["--junit", results],
        ["--markdown", tmp_path / "gate.toml"],
        ["--junit", tmp_path / "same", "--badge", tmp_path / "run" / ".." / "same"],
    ):
        done = call(KEPT, words=words)
        assert done.returncode == 2 and "a name of its own" in done.stderr
    assert results.read_text() == before and not (tmp_path / "same").exists()
    (tmp_path / "file").write_text("")
    done = call(KEPT, words=["--junit", tmp_path / "file" / "junit.xml"])
    assert done.returncode == 2 and "cannot write" in done.stderr


def test_the_rules_of_the_document_are_rules():
    short, text, *_ = re.findall(r"```toml\n(.*?)```", DOCS, re.DOTALL)
    assert parse_rules(short).rule and not parse_rules(short).min_images
    found = parse_rules(text)
    assert found.rule and found.baseline and found.min_images == 200
