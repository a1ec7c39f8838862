"""The page of an audit, from its folder. Everything from the folder is text and escaped."""

import base64
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from demur.errors import amount
from demur.evaluation.audit_certified import CertifiedRow
from demur.evaluation.audit_other import OtherInputs
from demur.evaluation.audit_results import AuditResults, ThreatRow, read
from demur.evaluation.results import Curve, Series
from demur.report import gallery as galleries
from demur.report.corruptions import SEVERITY, CorruptionTable, corruption_tables
from demur.report.gallery import Gallery
from demur.report.html import ENVIRONMENT, asset, curve_view, facets
from demur.report.pivot import OUTCOMES, number
from demur.writing import write_text

BOUND: Final = "An attack gives an upper bound on robustness; it is no proof."

FRAMEWORKS: Final = (
    (
        "NIST AI 100-2 E2025",
        "NISTAML.022 evasion; NISTAML.025 black-box evasion (noise, Square, transfer); NISTAML.01 "
        "availability, for an attacker who forces rejections",
    ),
    ("MITRE ATLAS", "AML.T0015 evade ML model; AML.T0043 craft adversarial data"),
    ("EU AI Act", "Article 15, paragraphs 3 to 5: accuracy, robustness and cybersecurity"),
    ("ISO/IEC 24029-2", "counterexamples only; this audit shows no conformity"),
)

ALL_WRONG: Final = (
    "There is doubt about the attacks. It does not matter here: every image is wrong already, and no "
    "attack can find more."
)

VERDICTS: Final = {
    "sound": "All self-tests that can be applied passed: the figures are an upper bound on robustness that can be "
    "relied on.",
    "doubtful": "There is doubt: a stronger attack may find more.",
    "unsound": "A self-test shows that an attack failed by its own fault: do not call this model "
    "robust by these figures.",
}


def render_audit(folder: Path) -> Path:
    """Write report.html and summary.md into the folder of an audit.

    Parameters
    ----------
    folder : Path
        With results.json and, if there is one, gallery.safetensors.

    Returns
    -------
    Path
        The page.

    Raises
    ------
    DemurError
        If results.json is missing or no audit, or the folder cannot be written.
    """
    results = read(folder)
    write_text(folder / "summary.md", summary(results))
    path = folder / "report.html"
    write_text(path, page(results, galleries.read(folder)))
    return path


def page(results: AuditResults, gallery: Gallery | None) -> str:
    """Give the whole page as text."""
    script = asset("script.js")
    views = [curve_view(_curve(one), f"curve{place}") for place, one in enumerate(results.curves)]
    return ENVIRONMENT.get_template("audit.html").render(
        audit=results,
        sentences=sentences(results),
        breakers=[row for row in results.threats if row.by],
        curves=views,
        gallery=gallery,
        facets=facets(gallery) if gallery else {},
        outcomes=OUTCOMES,
        frameworks=FRAMEWORKS,
        risks=_places(results.other_inputs),
        corruptions=_corruptions(results),
        severity=SEVERITY,
        style=asset("style.css"),
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii"),
    )


def _places(other: OtherInputs | None) -> list[int]:
    """Give the places of the curve that the page shows: about ten coverages."""
    count = 0 if other is None else min(len(other.coverage), len(other.risk))
    return sorted({round(step * (count - 1) / 10) for step in range(11)}) if count else []


def _corruptions(results: AuditResults) -> list[CorruptionTable]:
    other = results.other_inputs
    return corruption_tables(other.corruptions) if other is not None else []


def sentences(results: AuditResults) -> list[str]:
    """Say what was found: one sentence for the worst threat, one for clean images, the verdict."""
    clean = next((row for row in results.threats if row.threat == "clean"), None)
    evade = [row for row in results.threats if row.goal == "evade"]
    found = []
    if evade:
        worst = max(evade, key=lambda row: row.wrong)
        found.append(
            f"Within {worst.threat}, the attacks make the model answer wrong, without a rejection, "
            f"on {_percent(worst, 'wrong')} of {amount(worst.n, 'image')}."
        )
        if worst.broken is not None:
            found.append(
                f"Of the images that are correct without an attack, {100 * worst.broken:.1f} % "
                "become wrong."
            )
    found += [
        f"The median smallest change that breaks an image is {row.distance:.3g} in {row.threat}."
        for row in evade
        if ":" not in row.threat and row.distance is not None
    ]
    if clean is not None:
        found.append(
            f"Without an attack, {_percent(clean, 'correct')} are correct and "
            f"{100 * clean.rejected:.1f} % rejected."
        )
    found += [proven_sentence(row) for row in results.certified]
    other = results.other_inputs
    if other is not None and other.ood is not None:
        bounds = f"{100 * other.ood.accepted_low:.1f} to {100 * other.ood.accepted_high:.1f}"
        found.append(
            f"Of {other.ood.n:,} images of none of the classes ({other.ood.name}), the model accepts "
            f"{100 * other.ood.accepted:.1f} % ({bounds})."
        )
    if results.baseline:
        found.append(baseline_sentence(results.baseline))
    all_wrong = bool(evade) and all(row.wrong == 1 for row in evade)
    told = ALL_WRONG if all_wrong and results.verdict == "doubtful" else VERDICTS[results.verdict]
    return [*found, told, *results.doubts]


def baseline_sentence(baseline: Mapping[str, Any]) -> str:
    """Say what changed since an earlier audit, at each threat that both have."""
    changes = [
        f"{'without an attack' if row['threat'] == 'clean' else row['threat']}, wrong "
        f"{100 * row['before']:.1f} % before and {100 * row['now']:.1f} % now ({row['worse']} became "
        f"wrong, {row['better']} no longer are, p = {row['p']:.2g})"
        for row in baseline["threats"]
    ]
    return (
        f"Beside the baseline {baseline['name']}, on the {amount(baseline['images'], 'image')} that "
        f"both audits have: {'; '.join(changes)}. p is of McNemar's exact test."
    )


def proven_sentence(row: CertifiedRow) -> str:
    """Say what is proven at a threat."""
    if row.unsupported is not None:
        return f"Nothing is proven within {row.threat}: {row.unsupported} has no bounds."
    bounds = f"{100 * row.proven_low:.1f} to {100 * row.proven_high:.1f}"
    sure = "" if row.probability == 1 else f", each with probability {row.probability:g}"
    radius = "" if row.radius is None else f" The median certified radius is {row.radius:.4g}."
    return (
        f"Within {row.threat}, {100 * row.proven:.1f} % ({bounds}) of {row.n:,} images are proven "
        f"never to be wrong and accepted{sure}.{radius}"
    )


def _percent(row: ThreatRow, outcome: str) -> str:
    low, high = getattr(row, f"{outcome}_low"), getattr(row, f"{outcome}_high")
    return f"{100 * getattr(row, outcome):.1f} % ({100 * low:.1f} to {100 * high:.1f})"


def _curve(found: dict[str, Any]) -> Curve:
    series = Series("", found["correct"], found["rejected"], found["wrong"], found["n"])
    if found["kind"] == "eps":
        norm = found["norm"]
        note = "At each size, the worst of all attacked images that the size allows."
        return Curve(
            f"Outcomes against eps in {norm}", f"eps in {norm}", found["x"], [series], note
        )
    note = (
        "The attacked images stay the same: an attacker who knows the new threshold may do better. "
        "0 is the threshold of the model."
    )
    title = f"Outcomes against the threshold of rejection, {found['at']}"
    return Curve(title, "threshold", found["x"], [series], note)


def summary(results: AuditResults) -> str:
    """Write the audit as Markdown, for a pull request or a wiki."""
    lines = [
        f"# Audit of {_plain(results.model['name'])}",
        "",
        *[f"{_plain(one)}\n" for one in [*sentences(results), *results.findings]],
        "| threat | goal | correct % | rejected % | wrong % | n |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for row in results.threats:
        cells = [f"{number(100 * getattr(row, name), '%')}" for name in OUTCOMES]
        by_name = dict(zip(OUTCOMES, cells, strict=True))
        shares = " | ".join(by_name[name] for name in ("correct", "rejected", "wrong"))
        missing = "" if row.complete else " (not all attacks ran)"
        lines.append(f"| {_plain(row.threat)}{missing} | {_plain(row.goal)} | {shares} | {row.n} |")
    lines += _corruption_lines(results)
    lines += ["", "| check | state |", "|---|---|"]
    states = [(_plain(check.name), check.state.replace("_", " ")) for check in results.checks]
    lines += [f"| {name} | {state} |" for name, state in states]
    lines += ["", BOUND, "", "```sh", _plain(results.command), "```", ""]
    return "\n".join(lines)


def _corruption_lines(results: AuditResults) -> list[str]:
    """Write the wrong answers on corrupted images, by kind and severity."""
    tables = _corruptions(results)
    if not tables:
        return []
    table = tables[0]
    severities = " | ".join(map(str, table.severities))
    lines = ["", f"| wrong % on corrupted images, severity | {severities} | mean |"]
    lines.append(f"|---|{'---:|' * (len(table.severities) + 1)}")
    for line in table.lines:
        cells = ["–" if one is None else number(100 * one, "%") for one in line.shares]
        lines.append(f"| {_plain(line.name)} | {' | '.join(cells)} |")
    return [*lines, "", SEVERITY]


def _plain(text: str) -> str:
    """Give text of a stranger's file without what Markdown or a terminal reads as a command."""
    kept = "".join(letter if letter.isprintable() else "?" for letter in str(text))
    return kept.replace("|", "\\|").replace("`", "'").replace("<", "&lt;")
