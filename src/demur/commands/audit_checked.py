"""The self-tests of an audit put together: rows, doubts, and what they broke."""

from collections.abc import Sequence
from dataclasses import dataclass

import polars as pl

from demur.commands.audit_run import AuditRun
from demur.commands.audit_subject import Subject
from demur.evaluation.audit_checks import self_tests
from demur.evaluation.audit_results import CheckRow
from demur.evaluation.audit_rows import Ran, computed_rows
from demur.evaluation.records import SCHEMA

ATTACKS = ("noise", "doubling")
"""Self-tests that attack the audited model: their images are broken like those of the audit."""


@dataclass(frozen=True, eq=False)
class Checked:
    """What the self-tests of an audit say.

    Parameters
    ----------
    rows : list of CheckRow
    attacked : list of polars.DataFrame
        Records of the self-tests that attack the model.
    seconds : float
        What the self-tests that compute cost.
    """

    rows: list[CheckRow]
    attacked: list[pl.DataFrame]
    seconds: float

    @classmethod
    def of(
        cls, records: pl.DataFrame, found: Sequence[Ran], subject: Subject, run: AuditRun
    ) -> "Checked":
        """Run the queries over the records of the attacks, and read what the other tests found."""
        noise = [one.records for one in found if one.name == "noise"]
        queries = self_tests(
            records,
            gradients=subject.gradients,
            randomised=subject.handshake.randomised,
            noise=pl.concat(noise) if noise else pl.DataFrame(schema=SCHEMA),
        )
        rows = [*queries, *computed_rows(records, found, _reasons(subject, run))]
        attacked = [one.records for one in found if one.name in ATTACKS]
        return cls(rows, attacked, sum(one.seconds for one in found))

    @property
    def doubts(self) -> list[str]:
        """Say which self-tests did not run, though they could."""
        missing = [row.name for row in self.rows if row.state == "not_run"]
        return [f"Self-tests that did not run: {', '.join(missing)}."] if missing else []


def _reasons(subject: Subject, run: AuditRun) -> dict[str, str]:
    """Say why a self-test is not applicable to this model and these threats."""
    planned = {test.name for test in run.tests}
    no_eps = "no threat of the audit has a finite eps"
    needs = {
        "incomplete optimisation": "optimisation",
        "transfer failure": "optimisation",
        "doubling": "doubling",
        "binarization": "binarization",
        "hidden state": "hidden state",
    }
    reasons = {name: no_eps for name, test in needs.items() if test not in planned}
    if "binarization" in reasons and "doubling" in planned:
        reasons["binarization"] = "it needs a threat in linf or l2"
    if "twin" not in planned:
        reasons["twin"] = "there is no undefended model; --base-model names one"
    if subject.handshake.randomised:
        needs_equal = "the model is randomised: its answers differ by chance"
        alone = ("silent success", "incomplete optimisation", "transfer failure")
        reasons |= dict.fromkeys((*alone, "binarization", "hidden state"), needs_equal)
    if not subject.gradients:
        blind = "the model gives no gradient"
        gradients = ("incomplete optimisation", "transfer failure", "doubling", "binarization")
        reasons |= dict.fromkeys((*gradients, "twin"), blind)
    return reasons
