"""An audit beside an earlier one: a paired comparison on the images that both have."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl
from scipy.stats import binomtest

from demur.errors import DemurError
from demur.evaluation.audit_plan import Step
from demur.evaluation.audit_results import read, within
from demur.evaluation.gate_rules import CLEAN
from demur.evaluation.records import decoding_records, read_parquet
from demur.threat import ThreatModel, as_threat


def beside(records: pl.DataFrame, done: Sequence[Step], baseline: Path) -> dict[str, Any]:
    """Compare with an earlier audit.

    Parameters
    ----------
    records : polars.DataFrame
        Of the new audit.
    done : sequence of Step
        Its attacks.
    baseline : Path
        The folder of the earlier audit.

    Returns
    -------
    dict
        `name`, `images`, and `threats`: for each threat that both have, the share of wrong answers
        `before` and `now`, the images that became `worse` and `better`, and `p` of McNemar's exact
        test.

    Raises
    ------
    DemurError
        If the folder holds no audit, or no image is in both.
    """
    earlier = read(baseline)
    path = baseline / "records.parquet"
    with decoding_records(path):
        old = read_parquet(path)
        before = [(threat, _wrong(old, threat)) for threat in _asked(earlier.threats)]
    own = {step.threat for step in done}
    rows = [_row(one, _wrong(records, one), wrong) for one, wrong in before if one in own]
    images = max((row["n"] for row in rows), default=0)
    if not images:
        raise DemurError(
            f"the audit has no image or no threat in common with the baseline {baseline}: use the "
            "same --data, --split, --num-samples, --seed and --threat."
        )
    return {"name": str(earlier.model.get("name", "")), "images": images, "threats": rows}


def _asked(rows: Sequence[Any]) -> list[ThreatModel | None]:
    return [
        None if row.threat == CLEAN else as_threat(row.threat)
        for row in rows
        if row.goal != "force-reject"
    ]


def _wrong(records: pl.DataFrame, threat: ThreatModel | None) -> pl.DataFrame:
    """Say of each image whether an attack within the threat makes its answer wrong."""
    clean = pl.col("attack").is_null()
    rows = records.filter(clean) if threat is None else within(records, threat)
    return rows.group_by("image", "label").agg(wrong=(pl.col("outcome") == "wrong").any())


def _row(threat: ThreatModel | None, now: pl.DataFrame, before: pl.DataFrame) -> dict[str, Any]:
    both = now.join(before, on=["image", "label"], suffix="_before")
    worse = int((both["wrong"] & ~both["wrong_before"]).sum())
    better = int((~both["wrong"] & both["wrong_before"]).sum())
    changed = worse + better
    return {
        "threat": str(threat or CLEAN),
        "n": len(both),
        "before": int(both["wrong_before"].sum()) / max(1, len(both)),
        "now": int(both["wrong"].sum()) / max(1, len(both)),
        "worse": worse,
        "better": better,
        "p": float(binomtest(worse, changed).pvalue) if changed else 1.0,
    }
