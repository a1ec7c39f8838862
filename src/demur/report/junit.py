"""The decision of a gate for CI servers: JUnit XML, Markdown, and a badge."""

import html
import json
import re
from typing import Final
from xml.etree import ElementTree

from demur.data.messages import printable
from demur.evaluation.audit_results import CheckRow
from demur.evaluation.gate import Decision, GateResult

COLORS: Final = {"passed": "brightgreen", "failed": "red", "inconclusive": "yellow"}
RULES: Final = "demur.gate.rules"
SELF_TESTS: Final = "demur.gate.selftests"


def junit_of(result: GateResult) -> str:
    """Write the decision as JUnit XML.

    Parameters
    ----------
    result : GateResult

    Returns
    -------
    str
        A test case for each rule, for the verdict, and for each self-test. A rule that is proven
        broken has a <failure>, an inconclusive one an <error>. The verdict has an <error> if it
        forbids a pass. A self-test that did not pass has an <error> if its verdict forbids a pass,
        else it is <skipped>. Therefore the file has a failure or an error exactly if the exit code
        is not 0.
    """
    suites = ElementTree.Element("testsuites", name="demur gate", time="0")
    rules = [_rule_case(one) for one in result.rules]
    selftests = [
        _case(SELF_TESTS, "verdict", "error" if result.objection else "", result.objection)
    ]
    selftests += [_check_case(one, bool(result.objection)) for one in result.checks]
    for name, cases in ((RULES, rules), (SELF_TESTS, selftests)):
        suite = ElementTree.SubElement(suites, "testsuite", name=name, time="0")
        properties = ElementTree.SubElement(suite, "properties")
        about = {"model": result.model, "data": result.data, "verdict": result.verdict}
        for key, value in about.items():
            ElementTree.SubElement(properties, "property", name=key, value=value)
        suite.extend(cases)
    ElementTree.SubElement(suites[0], "system-out").text = result.text
    for element in (*suites, suites):
        element.set("tests", str(len(list(element.iter("testcase")))))
        for kind, plural in (("failure", "failures"), ("error", "errors"), ("skipped", "skipped")):
            element.set(plural, str(len(list(element.iter(kind)))))
    ElementTree.indent(suites)
    text = ElementTree.tostring(suites, encoding="unicode")
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{text}\n'


def markdown_of(result: GateResult) -> str:
    """Write the decision as Markdown: a heading, a table of the rules, and what is unclear."""
    model, data = _escaped(result.model), _escaped(result.data)
    lines = [
        f"## Gate {result.word}",
        "",
        f"{model} on {data}, verdict **{result.verdict}**.",
        "",
        "| | rule | found | reason |",
        "|---|---|---|---|",
    ]
    for one in result.rules:
        cells = (one.name, one.found, one.reason)
        lines.append(f"| **{one.state}** | {' | '.join(map(_escaped, cells))} |")
    if result.objection:
        lines += ["", f"Self-tests: {_escaped(result.objection)}."]
    flagged = [one for one in result.checks if one.state == "flagged"]
    lines += ["", *(f"- flagged: {_escaped(_said(one))}" for one in flagged)] if flagged else []
    for note in result.notes:
        lines += ["", _escaped(note)]
    return "\n".join(lines) + "\n"


def badge_of(result: GateResult) -> str:
    """Write the decision as JSON for an endpoint badge of shields.io."""
    badge = {
        "schemaVersion": 1,
        "label": "demur gate",
        "message": result.word,
        "color": COLORS[result.word],
    }
    return json.dumps(badge) + "\n"


def _rule_case(one: Decision) -> ElementTree.Element:
    kind = {"failed": "failure", "inconclusive": "error"}.get(one.state, "")
    said = one.found if not one.reason else f"{one.reason} ({one.found})"
    case = _case(RULES, one.name, kind, said)
    if not kind:
        ElementTree.SubElement(case, "system-out").text = said
    return case


def _check_case(one: CheckRow, forbidden: bool) -> ElementTree.Element:
    kinds = {"passed": "", "flagged": "error" if forbidden else "skipped"}
    return _case(SELF_TESTS, printable(one.name, 100), kinds.get(one.state, "skipped"), _said(one))


def _case(suite: str, name: str, kind: str, said: str) -> ElementTree.Element:
    """Make a test case. CI servers show the attribute `message`, and the text where it is opened."""
    case = ElementTree.Element("testcase", classname=suite, name=name, time="0")
    if kind:
        found = ElementTree.SubElement(case, kind, message=said)
        found.text = said
        if kind != "skipped":
            found.set("type", "broken" if kind == "failure" else "inconclusive")
    return case


def _said(one: CheckRow) -> str:
    return f"{printable(one.name, 100)}, {one.state}: {printable(one.text, 500)}"


def _escaped(text: str) -> str:
    """Escape what Markdown or HTML would interpret."""
    return re.sub(r"([\\`*_\[\]|~#])", r"\\\1", html.escape(text, quote=False))
