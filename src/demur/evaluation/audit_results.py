"""What an audit found: queries over its records, and the file results.json."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import polars as pl
from pydantic import Field, TypeAdapter, ValidationError

from demur.data.messages import printable
from demur.errors import DemurError
from demur.evaluation.audit_certified import CertifiedRow
from demur.evaluation.audit_other import OtherInputs
from demur.evaluation.records import OUTCOMES, PLACE, worst_case
from demur.goals import ForceReject
from demur.metrics.intervals import clopper_pearson
from demur.threat import ThreatModel
from demur.untrusted import read_bytes
from demur.writing import write_text

SCHEMA: Final = "demur.audit/1"

Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
State = Literal["passed", "flagged", "not_run", "not_applicable"]
Verdict = Literal["sound", "doubtful", "unsound"]


@dataclass(frozen=True)
class ThreatRow:
    """Shares of the three outcomes at a threat, in the worst case over the attacks.

    Parameters
    ----------
    threat : str
        "clean", or a threat model such as "linf:8/255".
    goal : str
        "none" for clean images, "evade" or "force-reject".
    n : int
        Number of images.
    correct, rejected, wrong : float
        Shares in [0, 1].
    correct_low, correct_high, ... : float
        The 95 % Clopper-Pearson interval over images.
    complete : bool
        Whether all attacks of the plan ran.
    by : mapping of str to int
        For each attack, the images that it was the first to break.
    wrong_stored : float, optional
        The share of wrong answers on attacked images that were stored in 8 bits.
    broken : float, optional
        Of the images that are correct without an attack, the share that is wrong and accepted.
    distance : float, optional
        Median size of the smallest change that breaks an image that is correct without an attack,
        where more than half of these break.
    """

    threat: str
    goal: str
    n: int
    correct: Share
    correct_low: Share
    correct_high: Share
    rejected: Share
    rejected_low: Share
    rejected_high: Share
    wrong: Share
    wrong_low: Share
    wrong_high: Share
    complete: bool = True
    by: Mapping[str, int] = field(default_factory=dict)
    wrong_stored: Share | None = None
    broken: Share | None = None
    distance: float | None = None

    def __float__(self) -> float:
        """Give the robust share: images that are not wrong and accepted."""
        return 1 - self.wrong


@dataclass(frozen=True)
class CheckRow:
    """A self-test: what it measured, its limit, and its state.

    `direction` says whether the figure may be at most or must be at least the limit.
    """

    name: str
    value: float | None
    limit: float | None
    state: State
    text: str
    direction: Literal["at most", "at least"] = "at most"


@dataclass(frozen=True)
class AuditResults:
    """The content of results.json of an audit."""

    schema: Literal["demur.audit/1"]
    verdict: Verdict
    model: dict[str, Any]
    data: dict[str, Any]
    threats: list[ThreatRow]
    checks: list[CheckRow]
    handshake: list[dict[str, str]]
    notes: list[str]
    cost: dict[str, Any]
    code: str
    command: str
    profile: str
    seed: int
    versions: dict[str, str]
    device: str
    curves: list[dict[str, Any]] = field(default_factory=list)
    baseline: dict[str, Any] | None = None
    doubts: list[str] = field(default_factory=list)
    """Why the verdict cannot be "sound", whatever the self-tests say."""
    findings: list[str] = field(default_factory=list)
    """What changes how a figure is read. `notes` are information."""
    other_inputs: OtherInputs | None = None
    certified: list[CertifiedRow] = field(default_factory=list)
    """What is proven, where certificates were asked for."""


_FILE = TypeAdapter(AuditResults)


def write(results: AuditResults, folder: Path) -> None:
    """Write results.json into the folder of an audit."""
    text = json.dumps(asdict(results), indent=1, ensure_ascii=False, allow_nan=False)
    write_text(folder / "results.json", text + "\n")


def read(folder: Path | str) -> AuditResults:
    """Read results.json of an audit.

    Parameters
    ----------
    folder : path
        The folder of an audit, or its results.json.

    Raises
    ------
    DemurError
        If the file is missing, too large, or no audit.
    """
    folder = Path(folder)
    path = folder / "results.json" if folder.is_dir() else folder
    remedy = "Make an audit with: demur audit MODEL --data DATA"
    try:
        if not path.exists():
            raise DemurError(f"{folder} holds no audit: there is no results.json. {remedy}")
        return _FILE.validate_json(read_bytes(path))
    except OSError as error:
        raise DemurError(f"cannot read {path}: {error.strerror}.") from error
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = printable(".".join(map(str, first["loc"])), 100) or "the file"
        raise DemurError(f"{path} is no audit of demur: {place}: {first['msg']}.") from error


def within(records: pl.DataFrame, threat: ThreatModel) -> pl.DataFrame:
    """Give the rows whose images the threat allows: those of the threat itself, the clean images,
    and all other attacked images whose change is no larger (R12).

    Attacks with the goal `ForceReject` are left out, unless the threat has this goal.
    """
    clean = pl.col("attack").is_null()
    eps = math.inf if threat.eps is None else threat.eps
    assert isinstance(eps, float)
    same = (pl.col("norm") == threat.norm) & (pl.col("eps") <= eps)
    smaller = pl.col(threat.norm) <= eps
    allowed = (clean | same | smaller).fill_null(False)
    if isinstance(threat.goal, ForceReject):
        return records.filter(allowed)
    forced = (pl.col("goal") == repr(ForceReject())).fill_null(False)
    return records.filter(allowed & ~forced)


_NEEDED: Final = (*PLACE, "attack", "by", "outcome", "stored_outcome", "linf", "l2", "l1", "l0")
"""The columns that a row is made of: copies of all others would cost memory."""


def threat_row(
    records: pl.DataFrame, threat: ThreatModel | None, *, complete: bool = True
) -> ThreatRow:
    """Count the outcomes at a threat, in the worst case; `None` counts the clean images."""
    if threat is None:
        rows = records.filter(pl.col("attack").is_null())
        return _row("clean", "none", rows, {}, None, complete)
    if isinstance(threat.goal, ForceReject):
        rows = within(records, threat).select(_NEEDED)
        # The attacker wants a rejection: it is the worst outcome here.
        order = {"correct": 0, "wrong": 1, "rejected": 2}
        worst = rows.sort(pl.col("outcome").cast(pl.String).replace_strict(order)).group_by(
            PLACE, maintain_order=True
        )
        return _row(str(threat), "force-reject", worst.last(), {}, None, complete)
    rows = within(records, threat).select(_NEEDED)
    by = first_breakers(rows)
    right = rows.filter(pl.col("attack").is_null() & (pl.col("outcome") == "correct"))
    before = rows.join(right, on=list(PLACE), how="semi")
    distance = _median_distance(before, threat.norm)
    found = worst_case(before, ())["outcome"]
    broken = int((found == "wrong").sum()) / len(found) if len(found) else None
    stored = worst_case(rows.with_columns(outcome=pl.col("stored_outcome")), ())
    row = _row(str(threat), "evade", worst_case(rows, ()), by, distance, complete)
    lost = int((stored["outcome"] == "wrong").sum()) / len(stored)
    return replace(row, wrong_stored=lost, broken=broken)


def first_breakers(rows: pl.DataFrame) -> dict[str, int]:
    """Count, for each attack, the images that it was the first to break."""
    broken = rows.filter(pl.col("outcome") == "wrong").with_columns(
        attack=pl.col("by").fill_null(pl.col("attack")).fill_null("no attack")
    )
    first = broken.group_by(PLACE, maintain_order=True).first()
    return {str(name): len(part) for (name,), part in first.group_by("attack", maintain_order=True)}


def _median_distance(rows: pl.DataFrame, norm: str) -> float | None:
    """Give the median size of the smallest change that breaks an image; None for half or less."""
    smallest = pl.col(norm).filter(pl.col("outcome") == "wrong").min()
    sizes = rows.group_by(PLACE).agg(smallest)[norm].fill_null(math.inf)
    middle = sizes.median()
    return float(middle) if isinstance(middle, float) and math.isfinite(middle) else None


def _row(
    threat: str,
    goal: str,
    rows: pl.DataFrame,
    by: Mapping[str, int],
    distance: float | None,
    complete: bool,
) -> ThreatRow:
    n = len(rows)
    if not n:
        raise DemurError(f"the records hold no image for {threat}.")
    shares: dict[str, Any] = {}
    for outcome in OUTCOMES:
        count = int((rows["outcome"] == outcome).sum())
        low, high = clopper_pearson(count, n)
        shares |= {outcome: count / n, f"{outcome}_low": low, f"{outcome}_high": high}
    return ThreatRow(threat, goal, n, complete=complete, by=by, distance=distance, **shares)


# Curves


def curve_over_eps(records: pl.DataFrame, norm: str, sizes: Sequence[float]) -> dict[str, Any]:
    """Count the worst outcomes at each size of the change, in a norm.

    Every attacked image of the audit counts at each size that allows it, so the share of wrong
    answers never falls.
    """
    points = []
    for eps in sizes:
        row = threat_row(records, ThreatModel(norm, eps) if eps else None)
        points.append((row.correct, row.rejected, row.wrong))
    return {
        "kind": "eps",
        "norm": norm,
        "x": list(sizes),
        "correct": [one[0] for one in points],
        "rejected": [one[1] for one in points],
        "wrong": [one[2] for one in points],
        "n": row.n,
    }


def curve_over_threshold(rows: pl.DataFrame, points: int = 21) -> dict[str, Any] | None:
    """Count the outcomes of some records for other thresholds of the rejection.

    The attacked images stay as they are: an attacker who knows the new threshold may do better.

    Parameters
    ----------
    rows : polars.DataFrame
        One row for each image.
    points : int

    Returns
    -------
    dict or None
        None where no margin is known.
    """
    known = rows.filter(pl.col("reject_margin").is_not_null())
    if known.is_empty():
        return None
    margins = known["reject_margin"].sort()
    places = [round(step * (len(margins) - 1) / (points - 1)) for step in range(points)]
    thresholds = sorted({0.0, *(round(float(margins[place]), 6) for place in places)})
    right = known["class_margin"] > 0
    found: dict[str, Any] = {"kind": "threshold", "x": thresholds, "n": len(known)}
    for name in OUTCOMES:
        found[name] = []
    for threshold in thresholds:
        accepted = known["reject_margin"] >= threshold
        correct = int((accepted & right).sum())
        wrong = int((accepted & ~right).sum())
        found["correct"].append(correct / len(known))
        found["wrong"].append(wrong / len(known))
        found["rejected"].append((len(known) - correct - wrong) / len(known))
    return found
