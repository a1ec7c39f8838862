"""Rules of a gate on the share of images that is proven at a threat."""

from demur.errors import DemurError
from demur.evaluation.audit_results import AuditResults
from demur.evaluation.gate import ROUNDED, Decision, State, images_needed, too_few
from demur.evaluation.gate_rules import Rule, Rules, key_of
from demur.metrics.intervals import clopper_pearson


def decide_proven(rule: Rule, audit: AuditResults, rules: Rules) -> list[Decision]:
    """Decide the limits of a rule on `proven`. A proof needs no attack, so the verdict of the audit
    does not matter.

    Raises
    ------
    DemurError
        If the audit has no certificates at the threat.
    """
    wanted = key_of(rule.threat, rule.goal)
    row = next((one for one in audit.certified if key_of(one.threat, "evade") == wanted), None)
    if row is None:
        known = ", ".join(one.threat for one in audit.certified) or "none"
        raise DemurError(
            f"the audit has no certificates at {wanted}. Known: {known}. Run it with --certify."
        )
    count = round(row.n * row.proven)
    if row.n < 1 or abs(row.n * row.proven - count) > ROUNDED:
        raise DemurError("the share of proven images does not belong to its number of images.")
    low = clopper_pearson(count, row.n, rules.confidence, "lower")[0]
    high = clopper_pearson(count, row.n, rules.confidence, "upper")[1]
    decided = []
    for side, limit in rule.limits:
        holds = high <= limit if side == "max" else low >= limit
        broken = low > limit if side == "max" else high < limit
        said = too_few(row.n, rules)
        if not holds and not broken:
            said.append("the images do not decide it")
        state: State = "failed" if broken else "inconclusive" if said else "passed"
        reason = "; ".join(said) if state == "inconclusive" else ""
        needed = images_needed(row.proven, limit, side, rules)
        values = (limit, row.proven, low, high, row.n)
        decided.append(Decision("proven", row.threat, side, *values, state, reason, needed))
    return decided
