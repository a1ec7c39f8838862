"""The gate: the decision whether the figures of an audit keep the rules, and its text."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

from demur.data.messages import printable
from demur.errors import DemurError
from demur.evaluation.audit_results import AuditResults, CheckRow, ThreatRow
from demur.evaluation.gate_rules import CLEAN, Rule, Rules, Side, key_of
from demur.evaluation.records import OUTCOMES
from demur.metrics.intervals import clopper_pearson

ROUNDED: Final = 0.001
"""How far n times a share may be from a whole number of images."""
MOST_IMAGES: Final = 10**8
"""A rule that needs more images than this never passes."""
PASSED, BROKEN, INCONCLUSIVE = 0, 1, 3
"""Exit codes of a gate. Bad input has the exit code 2."""

INCREASE: Final = "increase of wrong"
"""The figure of a baseline rule."""

State = Literal["passed", "failed", "inconclusive"]
WORDS: Final[dict[int, State]] = {PASSED: "passed", BROKEN: "failed", INCONCLUSIVE: "inconclusive"}

# Decisions


@dataclass(frozen=True)
class Decision:
    """What was decided about one limit.

    Parameters
    ----------
    figure : str
        "correct", "rejected", "wrong", "proven" or "increase of wrong".
    threat : str
        With the goal in brackets where it is not "evade".
    side : {"max", "min"}
    limit : float
        A share, or a difference of shares.
    value, low, high : float
        The measured figure, and its two one-sided bounds.
    n : int
        Number of images.
    state : {"passed", "failed", "inconclusive"}
    reason : str
        Why it is inconclusive, else empty.
    needed : int, optional
        The smallest number of images with which the rule passes if the share stays the same. None:
        no number of images is enough, or the figure is an increase.
    """

    figure: str
    threat: str
    side: Side
    limit: float
    value: float
    low: float
    high: float
    n: int
    state: State
    reason: str = ""
    needed: int | None = None

    @property
    def name(self) -> str:
        """The rule as one phrase."""
        words = "at most" if self.side == "max" else "at least"
        return f"{self.figure} at {self.threat}: {words} {100 * self.limit:.6g} %"

    @property
    def found(self) -> str:
        """The measured figure and its bounds as one phrase."""
        bounds = f"bounds {100 * self.low:.2f} % and {100 * self.high:.2f} %"
        return f"{100 * self.value:.2f} % of {self.n:,} images, {bounds}"


def find(audit: AuditResults, threat: str, goal: str = "evade") -> ThreatRow:
    """Give the row of an audit at a threat. Threats compare by value.

    Raises
    ------
    DemurError
        If the audit does not have the threat: the message lists those that it has.
    """
    known = rows_of(audit)
    wanted = key_of(threat, goal)
    if wanted not in known:
        there = printable(", ".join(known), 400) or "none"
        raise DemurError(
            f"the audit has no threat {wanted}; it has: {there}. Correct the rule, or run the "
            "audit again with the threat."
        )
    return known[wanted]


def rows_of(audit: AuditResults) -> dict[str, ThreatRow]:
    """Give the rows of an audit by the keys of their threats."""
    keys = [key_of(row.threat, row.goal) for row in audit.threats]
    if twice := next((key for key in keys if keys.count(key) > 1), None):
        raise DemurError(f"the audit has the threat {twice} twice. Run the audit again.")
    return dict(zip(keys, audit.threats, strict=True))


def counts_of(row: ThreatRow) -> dict[str, int]:
    """Give the number of images of each outcome.

    Raises
    ------
    DemurError
        If the shares are no shares of n images.
    """
    n = min(max(row.n, 0), MOST_IMAGES)  # an integer of a file may be too large for a float
    exact = {name: n * float(getattr(row, name)) for name in OUTCOMES}
    counts = {name: round(number) for name, number in exact.items()}
    whole = all(abs(exact[name] - counts[name]) <= ROUNDED for name in OUTCOMES)
    if n < 1 or not whole or sum(counts.values()) != row.n:
        raise DemurError(
            f"the shares of the audit at {printable(row.threat, 80)} do not belong to its number "
            f"of images, {printable(row.n, 20)}. Run the audit again."
        )
    return counts


def decide_rule(rule: Rule, audit: AuditResults, rules: Rules) -> list[Decision]:
    """Decide the limits of a rule.

    Parameters
    ----------
    rule : Rule
    audit : AuditResults
    rules : Rules

    Returns
    -------
    list of Decision
        One for each limit.
    """
    row = find(audit, rule.threat, rule.goal)
    count = counts_of(row)[rule.metric]
    low = clopper_pearson(count, row.n, rules.confidence, "lower")[0]
    high = clopper_pearson(count, row.n, rules.confidence, "upper")[1]
    doubts = [] if rule.threat == CLEAN else doubts_of(audit, row, rules)
    few = too_few(row.n, rules)
    decided = []
    for side, limit in rule.limits:
        holds = high <= limit if side == "max" else low >= limit
        broken = low > limit if side == "max" else high < limit
        needed = images_needed(count / row.n, limit, side, rules)
        reasons = doubts + few
        if not holds and not broken:
            reasons = [*reasons, _undecided(needed)]
        proven = broken and not (doubts and not _worsens(rule.metric, side, rule.goal))
        state: State = "failed" if proven else "inconclusive" if reasons else "passed"
        decided.append(
            Decision(
                rule.metric,
                key_of(rule.threat, rule.goal),
                side,
                limit,
                count / row.n,
                low,
                high,
                row.n,
                state,
                "; ".join(reasons) if state == "inconclusive" else "",
                needed,
            )
        )
    return decided


def images_needed(share: float, limit: float, side: Side, rules: Rules) -> int | None:
    """Give the smallest number of images with which a rule passes if the share stays the same.

    Parameters
    ----------
    share : float
        The measured share.
    limit : float
    side : {"max", "min"}
    rules : Rules
        Confidence and smallest number of images.

    Returns
    -------
    int or None
        None if the rule does not pass with `MOST_IMAGES` images. A share of n images need not be
        a whole number of them.

    Examples
    --------
    >>> from demur.evaluation.gate_rules import BaselineRule, Rules
    >>> rules = Rules(baseline=BaselineRule(file="earlier.json", max_increase=0.01))
    >>> images_needed(0.0, 0.05, "max", rules), images_needed(0.05, 0.05, "max", rules)
    (59, None)
    """

    def passes(n: int) -> bool:
        bound: Literal["upper", "lower"] = "upper" if side == "max" else "lower"
        low, high = clopper_pearson(share * n, n, rules.confidence, bound)
        return high <= limit if side == "max" else low >= limit

    enough = 1
    while not passes(enough):
        if enough >= MOST_IMAGES:
            return None
        enough *= 2
    short = enough // 2
    while enough - short > 1:
        middle = (enough + short) // 2
        if passes(middle):
            enough = middle
        else:
            short = middle
    return max(enough, rules.min_images)


def objection(audit: AuditResults, rules: Rules) -> str:
    """Say why the self-tests of an audit forbid a pass; empty if they do not."""
    ran = any(check.state in ("passed", "flagged") for check in audit.checks)
    if rules.require_selftests and not ran:
        return "no self-test ran"
    if audit.verdict == "unsound" and (rules.require_selftests or not rules.allow_doubtful):
        return "the verdict of the audit is unsound"
    if audit.verdict == "doubtful" and not rules.allow_doubtful:
        return "the verdict of the audit is doubtful, and allow_doubtful is false"
    return ""


def doubts_of(audit: AuditResults, row: ThreatRow, rules: Rules) -> list[str]:
    """Say why attacks may have missed wrong answers."""
    said = [objection(audit, rules)]
    if not row.complete:
        said.append("an attack of this threat did not run")
    return [one for one in said if one]


def too_few(n: int, rules: Rules) -> list[str]:
    """Say that there are fewer images than the rules ask for; empty if there are not."""
    if n >= rules.min_images:
        return []
    return [f"{n:,} images are fewer than min_images = {rules.min_images:,}"]


def _worsens(metric: str, side: Side, goal: str) -> bool:
    """Say whether a limit that is broken stays broken when more attacks run."""
    sought = "rejected" if goal == "force-reject" else "wrong"
    return (metric, side) in ((sought, "max"), ("correct", "min"))


def _undecided(needed: int | None) -> str:
    if needed is None:
        return "the images do not decide it; with this share, no number of images passes"
    return f"the images do not decide it; with this share, {needed:,} images pass"


# The result


@dataclass(frozen=True)
class GateResult:
    """The decision of a gate.

    Parameters
    ----------
    exit_code : {0, 1, 3}
        0: all rules passed. 1: a rule is proven broken. 3: neither.
    text : str
        The decision and what was found, in lines.
    plan : str
        The number of images that each rule needs, in lines.
    rules : tuple of Decision
    checks : tuple of CheckRow
        The self-tests of the audit.
    objection : str
        Why the self-tests forbid a pass; empty if they do not.
    verdict, model, data : str
    notes : tuple of str
    """

    exit_code: int
    text: str
    plan: str
    rules: tuple[Decision, ...]
    checks: tuple[CheckRow, ...]
    objection: str
    verdict: str
    model: str
    data: str
    notes: tuple[str, ...] = ()

    @property
    def word(self) -> State:
        """The decision as one word."""
        return WORDS[self.exit_code]


def conclude(
    audit: AuditResults, rules: Rules, decided: Sequence[Decision], notes: Sequence[str] = ()
) -> GateResult:
    """Give the exit code and the text: the only place where the two are made.

    A rule that is proven broken comes first, whatever else is unclear.
    """
    said = objection(audit, rules)
    states = {one.state for one in decided}
    code = PASSED
    if "inconclusive" in states or said:
        code = INCONCLUSIVE
    if "failed" in states:
        code = BROKEN
    model, data = (
        printable(part.get("name", "without a name"), 100) for part in (audit.model, audit.data)
    )
    lines = [
        f"Gate {WORDS[code]} (exit code {code}): {model} on {data}, verdict {audit.verdict}.",
        *(_line(one) for one in decided),
    ]
    if said:
        lines.append(f"self-tests     {said}")
    lines.append(f"Bounds are one-sided, each with {100 * rules.confidence:g} % confidence.")
    return GateResult(
        code,
        "\n".join([*lines, *notes]),
        "\n".join(_plan(one) for one in decided),
        tuple(decided),
        tuple(audit.checks),
        said,
        audit.verdict,
        model,
        data,
        tuple(notes),
    )


def _line(one: Decision) -> str:
    reason = f": {one.reason}" if one.reason else ""
    return f"{one.state:14} {one.name}: {one.found}{reason}"


def _plan(one: Decision) -> str:
    if one.figure == INCREASE:
        return f"{one.name}: not planned"
    needed = (
        "never passes with this share" if one.needed is None else f"needs {one.needed:,} images"
    )
    return f"{one.name}: {needed}; the audit has {one.n:,}"
