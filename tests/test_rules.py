"""The rules R1 to R26 of docs/rules.md, and their citations in tests and source files."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
RULES = range(1, 27)
LISTED = [
    int(number)
    for number in re.findall(
        r"^### R(\d+): ", (ROOT / "docs" / "rules.md").read_text(encoding="utf-8"), re.MULTILINE
    )
]


def cited(text):
    """Numbers of the rules that a text cites, alone or in a range such as R1-R3."""
    numbers = {int(number) for number in re.findall(r"\bR(\d+)\b", text)}
    for first, last in re.findall(r"\bR(\d+)-R(\d+)\b", text):
        numbers |= set(range(int(first), int(last) + 1))
    return numbers


def citations(folder):
    """Rules that each Python file of a folder cites, by path."""
    files = [path for path in sorted((ROOT / folder).rglob("*.py")) if path != Path(__file__)]
    return {path: cited(path.read_text(encoding="utf-8")) for path in files}


def test_citations_are_found_alone_and_in_ranges():
    """Negative control."""
    assert cited('"""R7, R10-R12: not CR3, nor R_eps."""') == {7, 10, 11, 12}


def test_the_page_lists_every_rule_once_in_order():
    assert list(RULES) == LISTED


@pytest.mark.parametrize("folder", ["src", "tests", "benchmarks", "examples"])
def test_every_cited_rule_is_on_the_page(folder):
    unknown = {path.name: rules - set(LISTED) for path, rules in citations(folder).items()}
    assert not {name: rules for name, rules in unknown.items() if rules}


def test_every_rule_is_cited_by_a_test():
    found = set().union(*citations("tests").values())
    assert not set(LISTED) - found
