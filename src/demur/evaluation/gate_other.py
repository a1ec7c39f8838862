"""Rules of a gate on other inputs than attacked ones: accepted images of no class, and errors
among the surest answers.
"""

from demur.errors import DemurError
from demur.evaluation.audit_other import CONFIDENCE, OtherInputs
from demur.evaluation.audit_results import AuditResults
from demur.evaluation.gate import ROUNDED, Decision, State, images_needed, too_few
from demur.evaluation.gate_rules import Rule, Rules
from demur.metrics.intervals import clopper_pearson


def decide_other(rule: Rule, audit: AuditResults, rules: Rules) -> list[Decision]:
    """Decide the limits of a rule on `accepted_ood` or `aurc`. No attack is part of these figures,
    so the verdict of the audit does not matter.

    Raises
    ------
    DemurError
        If the audit did not measure the figure.
    """
    found = audit.other_inputs
    if found is None or (rule.metric == "accepted_ood" and found.ood is None):
        remedy = "Run the audit again" + (" with --ood." if rule.metric == "accepted_ood" else ".")
        raise DemurError(f"the audit has no {rule.metric}. {remedy}")
    value, low, high, n, reasons = _measured(rule, found, rules)
    decided = []
    for side, limit in rule.limits:
        holds = high <= limit if side == "max" else low >= limit
        broken = low > limit if side == "max" else high < limit
        needed = images_needed(value, limit, side, rules) if rule.metric == "accepted_ood" else None
        said = [*reasons, *too_few(n, rules)]
        if not holds and not broken:
            said.append("the images do not decide it")
        state: State = "failed" if broken and not reasons else "inconclusive" if said else "passed"
        reason = "; ".join(said) if state == "inconclusive" else ""
        place = "other inputs" if rule.metric == "accepted_ood" else "clean"
        decided.append(
            Decision(rule.metric, place, side, limit, value, low, high, n, state, reason, needed)
        )
    return decided


def _measured(
    rule: Rule, found: OtherInputs, rules: Rules
) -> tuple[float, float, float, int, list[str]]:
    """Give the figure, its bounds, the number of images, and why it cannot be decided."""
    if rule.metric == "aurc":
        reasons = []
        if rules.confidence > CONFIDENCE:
            reasons.append(
                f"the bounds of aurc have {100 * CONFIDENCE:g} % confidence, the rules ask for "
                f"{100 * rules.confidence:g} %"
            )
        return found.aurc, found.aurc_low, found.aurc_high, found.n, reasons
    ood = found.ood
    assert ood is not None
    count = round(ood.n * ood.accepted)
    if ood.n < 1 or abs(ood.n * ood.accepted - count) > ROUNDED:
        raise DemurError("the share of accepted_ood does not belong to its number of images.")
    low = clopper_pearson(count, ood.n, rules.confidence, "lower")[0]
    high = clopper_pearson(count, ood.n, rules.confidence, "upper")[1]
    return ood.accepted, low, high, ood.n, []
