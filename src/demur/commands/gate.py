"""`demur gate`: decide whether an audit keeps the rules of a file, and write it for CI servers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import polars as pl

from demur.data.messages import printable
from demur.errors import DemurError
from demur.evaluation.audit_results import AuditResults, read
from demur.evaluation.gate import Decision, GateResult, conclude, decide_rule, rows_of
from demur.evaluation.gate_baseline import belongs, decide_increase, pair
from demur.evaluation.gate_other import decide_other
from demur.evaluation.gate_proven import decide_proven
from demur.evaluation.gate_rules import (
    OTHER,
    PROVEN,
    SEEKS_ERRORS,
    BaselineRule,
    Rules,
    parse_rules,
)
from demur.evaluation.records import SCHEMA, decoding_records, read_parquet
from demur.report.junit import badge_of, junit_of, markdown_of
from demur.untrusted import read_text
from demur.writing import write_text, writing

COLUMNS: Final = (
    *("dataset", "split", "repeat", "index", "image", "label", "outcome"),
    *("attack", "norm", "eps", "goal", "linf", "l2", "l1", "l0"),
)
"""The columns of the records that a comparison needs."""


def gate(
    run: Path | str,
    rules: Path | str,
    *,
    junit: Path | None = None,
    markdown: Path | None = None,
    badge: Path | None = None,
    step_summary: Path | None = None,
) -> GateResult:
    """Decide whether the figures of an audit keep the rules.

    Parameters
    ----------
    run : Path or str
        The folder of an audit, or its results.json.
    rules : Path or str
        The rules file (.toml).
    junit, markdown, badge : Path, optional
        Files that are written: JUnit XML, Markdown, and the JSON of a badge of shields.io.
    step_summary : Path, optional
        A file that the Markdown is appended to, such as `GITHUB_STEP_SUMMARY`.

    Returns
    -------
    GateResult
        With `exit_code` 0 (all rules passed), 1 (a rule is proven broken) or 3 (inconclusive),
        `text`, and `rules`: state, value, bounds, limit and needed images of each.

    Raises
    ------
    DemurError
        If a file is missing or does not fit, or a rule names a threat that the audit does not have.
        No output is written then. The command line exits with 2.

    Examples
    --------
    >>> from demur.commands.gate import gate
    >>> gate("runs/missing", "gate.toml")
    Traceback (most recent call last):
    demur.errors.DemurError: there is no file gate.toml.
    """
    folder = Path(run)
    file = Path(rules)
    chosen = _read_rules(file)
    outputs = [path for path in (junit, markdown, badge) if path]
    _refuse_overwriting(outputs, [file, folder, folder / "results.json"])
    audit = read(folder)
    decided = []
    for rule in chosen.rule:
        decide = decide_other if rule.metric in OTHER else decide_rule
        decide = decide_proven if rule.metric == PROVEN else decide
        decided += decide(rule, audit, chosen)
    notes: list[str] = []
    if chosen.baseline is not None:
        increases, notes = _compare(audit, folder, chosen, chosen.baseline, file.parent)
        decided += increases
    result = conclude(audit, chosen, decided, notes)
    if junit:
        write_text(junit, junit_of(result))
    if markdown:
        write_text(markdown, markdown_of(result))
    if badge:
        write_text(badge, badge_of(result))
    if step_summary:
        with writing(step_summary), step_summary.open("a", encoding="utf-8") as summary:
            summary.write(markdown_of(result))
    return result


def _read_rules(file: Path) -> Rules:
    text = read_text(file)
    try:
        return parse_rules(text)
    except DemurError as error:
        raise DemurError(f"the rules {file}: {error}") from error


def _refuse_overwriting(outputs: Sequence[Path], inputs: Sequence[Path]) -> None:
    """Refuse outputs that would replace an input or each other."""
    places = [path.resolve() for path in outputs]
    kept = {path.resolve() for path in inputs}
    for place, path in zip(places, outputs, strict=True):
        if place in kept or places.count(place) > 1:
            raise DemurError(
                f"{path} is also another file of this gate: give it a name of its own."
            )


def _compare(
    audit: AuditResults, run: Path, rules: Rules, rule: BaselineRule, beside: Path
) -> tuple[list[Decision], list[str]]:
    """Compare with the earlier audit at each threat that both have."""
    path = beside / rule.file
    if not (path / "results.json" if path.is_dir() else path).exists():
        if rule.if_not_found == "skip":
            return [], [f"No comparison: the baseline {printable(path)} does not exist."]
        raise DemurError(
            f"the baseline {printable(path)} does not exist. Copy an earlier audit there, or set "
            'if_not_found = "skip".'
        )
    earlier = read(path)
    before = rows_of(earlier)
    now = rows_of(audit)
    compared = [key for key, row in now.items() if key in before and row.goal in SEEKS_ERRORS]
    if not compared:
        raise DemurError(
            f"the audit and the baseline {printable(path)} have no threat in common. Make the "
            "baseline again with the threats of this audit."
        )
    new = _records(run, audit, compared)
    old = _records(path, earlier, compared)
    pairs = [pair(new, old, key) for key in compared]
    if not all(one.n for one in pairs):
        raise DemurError(
            f"the audit and the baseline {printable(path)} have no image in common: the data or "
            "the input size of the model changed. Make the baseline again."
        )
    notes = []
    if min(one.n for one in pairs) < max(now[key].n for key in compared):
        notes.append("The comparison counts each image once, and only images of both audits.")
    either = {key: row for key, row in (*before.items(), *now.items()) if key not in compared}
    alone = [key for key, row in either.items() if row.goal in SEEKS_ERRORS]
    if alone:
        said = printable(", ".join(alone), 200)
        notes.append(f"Not compared, because only one audit has it: {said}.")
    return [decide_increase(one, audit, earlier, rules) for one in pairs], notes


def _records(run: Path, audit: AuditResults, keys: Sequence[str]) -> pl.DataFrame:
    """Read the records beside results.json, and check that they belong to it."""
    path = (run if run.is_dir() else run.parent) / "records.parquet"
    types = pl.Schema({name: SCHEMA[name] for name in COLUMNS})
    if not path.exists():
        raise DemurError(
            f"cannot read {path}: it is missing. The comparison with a baseline needs the records "
            "of both audits beside their results.json."
        )
    with decoding_records(path):
        # Another program may have stored an outcome as a plain or categorical text.
        found = read_parquet(path, COLUMNS)
        records = found.with_columns(pl.col("outcome").cast(pl.String)).cast(types)
    rows = rows_of(audit)
    for key in keys:
        if not belongs(records, rows[key]):
            raise DemurError(
                f"{path} and results.json are not of one audit: they differ at {key}. Run the "
                "audit again."
            )
    return records
