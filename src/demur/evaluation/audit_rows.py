"""Rows of the self-tests that compute, from what they found."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import polars as pl
from torch import Tensor

from demur.evaluation.audit_counts import averaged, counted, low_of, named, worst_of
from demur.evaluation.audit_results import CheckRow, State, within
from demur.evaluation.audit_tests import TestStep
from demur.evaluation.plan import Outputs
from demur.evaluation.records import PLACE, SCHEMA, worst_case
from demur.evaluation.selftests import SelfTest
from demur.metrics.intervals import paired_bounds
from demur.threat import ThreatModel

UNSTABLE: Final = 0.1
INCOMPLETE: Final = 0.05
DOUBLED: Final = 0.005
UNSOLVED: Final = 0.05
BY_CHANCE: Final = 0.5
BUILT: Final = 0.5
"""Of the images of the binarization test: the share whose task must be built."""
ROUNDED: Final = 1e-4
"""Of the median margin: a margin below it may be a matter of rounding."""

COMPUTED: Final = (
    "unstable predictions",
    "silent success",
    "incomplete optimisation",
    "transfer failure",
    "doubling",
    "binarization",
    "twin",
    "hidden state",
)
"""The self-tests of this module, in the order of the report."""


@dataclass(frozen=True, eq=False)
class Ran:
    """What a self-test found.

    Parameters
    ----------
    name : str
    threat : ThreatModel or None
    hashes : tuple of str
        Of its images.
    values : mapping
    tensors : mapping of str to Tensor
        A row for each image.
    records : polars.DataFrame
        Of an attack, with the places of its images in the audit; else empty.
    seconds : float
        What the test cost.
    """

    name: str
    threat: ThreatModel | None
    hashes: tuple[str, ...]
    values: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    records: pl.DataFrame
    seconds: float

    def images(self, flags: Tensor) -> list[str]:
        """Give the hashes of the flagged images."""
        return [one for one, flag in zip(self.hashes, flags.tolist(), strict=True) if flag]


def ran(tests: Sequence[TestStep], outputs: Outputs) -> list[Ran]:
    """Collect what the complete self-tests found."""
    found = []
    for test in tests:
        if not outputs.complete(test.node):
            continue
        records = pl.DataFrame(schema=SCHEMA)
        values: Mapping[str, Any] = {}
        tensors: Mapping[str, Tensor] = {}
        if isinstance(test.node, SelfTest):
            result = outputs.result(test.node)
            values, tensors = result.values, result.tensors
        else:
            places = pl.Series(test.rows, dtype=pl.Int64)
            records = outputs.records([test.node])
            records = records.with_columns(index=places.gather(records["index"]))
        hashes = tuple(test.node.images.hashes)
        seconds = sum(outputs.result(test.node, one).seconds for one in range(test.node.shards))
        found.append(Ran(test.name, test.threat, hashes, values, tensors, records, seconds))
    return found


def computed_rows(
    records: pl.DataFrame, found: Sequence[Ran], reasons: Mapping[str, str]
) -> list[CheckRow]:
    """Make the rows of the self-tests of this module.

    Parameters
    ----------
    records : polars.DataFrame
        Of the attacks of the audit, without those of self-tests.
    found : sequence of Ran
    reasons : mapping of str to str
        Why a self-test is not applicable, by its name.

    Returns
    -------
    list of CheckRow
        One for each name in `COMPUTED`. A test that is applicable and found nothing out is
        "not_run".
    """
    tests: dict[str, tuple[str, Callable[[Ran], CheckRow]]] = {
        "unstable predictions": ("unstable predictions", _unstable),
        "incomplete optimisation": ("optimisation", _incomplete),
        "transfer failure": ("optimisation", lambda one: _transfer(one, records)),
        "doubling": ("doubling", lambda one: _doubling(one, records)),
        "binarization": ("binarization", _binarization),
        "twin": ("twin", lambda one: _twin(one, records)),
        "hidden state": ("hidden state", _hidden),
    }
    rows = []
    for name in COMPUTED:
        if name in reasons:
            rows.append(CheckRow(name, None, None, "not_applicable", reasons[name]))
        elif name == "silent success":
            rows.append(_silent(records))
        else:
            kind, make = tests[name]
            made = [_at(make(one), one.threat) for one in found if one.name == kind]
            missing = CheckRow(name, None, None, "not_run", "the time was over")
            rows.append(worst_of(made) if made else missing)
    return rows


def _at(row: CheckRow, threat: ThreatModel | None) -> CheckRow:
    return row if threat is None else replace(row, text=f"At {threat}: {row.text}")


def _unstable(found: Ran) -> CheckRow:
    text = "the relative change of the margin under noise of 4/255"
    return averaged("unstable predictions", found.tensors["change"], UNSTABLE, text)


def _incomplete(found: Ran) -> CheckRow:
    name = "incomplete optimisation"
    left = found.tensors["left"]
    if not bool(left.any()):
        text = f"the attack breaks all {len(left)} images of the sample, so no path is unfinished."
        return CheckRow(name, 0.0, INCOMPLETE, "passed", text)
    text = "the change of the loss over the last tenth of the steps, on images that are left,"
    return averaged(name, found.tensors["change"][left], INCOMPLETE, text)


def _transfer(found: Ran, records: pl.DataFrame) -> CheckRow:
    """Count the images whose attacked point the whole model decides differently (I5)."""
    text = "images on which the attack and the whole model decide differently at the final point"
    lost = _clear(records).filter(pl.col("success") & (pl.col("outcome") != "wrong"))
    images = {*found.images(found.tensors["differs"]), *lost["image"]}
    n = max(records["image"].n_unique(), len(found.hashes))
    return counted("transfer failure", len(images), n, 0.0, text, sorted(images))


def _silent(records: pl.DataFrame) -> CheckRow:
    """Count the images that an attack broke and did not say so (I3)."""
    text = "images that an attack broke without noticing it"
    attacked = _clear(records)
    silent = attacked.filter(~pl.col("success") & (pl.col("outcome") == "wrong"))
    images = silent["image"].unique().sort().to_list()
    n = attacked["image"].n_unique()
    if not n:
        return CheckRow("silent success", None, 0.0, "not_applicable", f"it counts {text}")
    return counted("silent success", len(images), n, 0.0, text, images)


def _clear(records: pl.DataFrame) -> pl.DataFrame:
    """Give the rows of attacks that know their success, without those near a boundary."""
    clean = records.filter(pl.col("attack").is_null())
    aware = pl.col("attacker").is_in(["defence-aware", "strongest"]) & (pl.col("goal") == "evade")
    middle = clean["class_margin"].abs().median()
    least = ROUNDED * (float(middle) if isinstance(middle, float) else 0.0)
    clear = (pl.col("class_margin").abs() > least) & (
        pl.col("reject_margin").abs().fill_null(2 * least + 1) > least
    )
    return records.filter(pl.col("attack").is_not_null() & aware & clear)


def _doubling(found: Ran, records: pl.DataFrame) -> CheckRow:
    """Count the images that only twice the steps and twice the restarts break (R11)."""
    assert found.threat is not None
    text = "images of the sample that break only with twice the steps and twice the restarts"
    before = worst_case(within(records, found.threat), ())
    both = found.records.join(before, on=list(PLACE), suffix="_before")
    new = both.filter((pl.col("outcome") == "wrong") & (pl.col("outcome_before") != "wrong"))
    images = new["image"].to_list()
    return counted("doubling", len(images), len(both), DOUBLED, text, images)


def _twin(found: Ran, records: pl.DataFrame) -> CheckRow:
    """Compare the undefended twin and the model under the same attack (R15)."""
    name = "twin"
    attack, eps = found.records["attack"][0], found.records["eps"][0]
    same = (pl.col("attack") == attack) & (pl.col("eps") == eps) & (pl.col("goal") == "evade")
    own = records.filter(same & (pl.col("norm") == found.records["norm"][0]))
    both = found.records.join(own, on=list(PLACE), suffix="_own")
    if both.is_empty():
        return CheckRow(name, None, 0.0, "not_run", "the same attack did not run on the model")
    twin, model = both["outcome"] != "wrong", both["outcome_own"] != "wrong"
    gained, lost = int((twin & ~model).sum()), int((~twin & model).sum())
    n = len(both)
    low, _ = paired_bounds(gained, lost, n)
    state: State = "flagged" if low > 0 else "passed"
    said = (
        f"the undefended model keeps {int(twin.sum())} of {n} images under {attack}, the model "
        f"{int(model.sum())}. The undefended one must not keep more."
    )
    return CheckRow(name, (gained - lost) / n, 0.0, state, said)


def _hidden(found: Ran) -> CheckRow:
    """Count the images whose decision depends on more than the image."""
    text = "images that get another answer after the attacks, in another batch, or with gradients"
    differs = found.tensors["differs"]
    row = counted(
        "hidden state", int(differs.sum()), len(differs), 0.0, text, found.images(differs)
    )
    said = []
    if found.values["reseeds"]:
        said.append("The model seeds the random state in each call: that hides its draws.")
    if found.values["buffers"]:
        said.append(f"A pass changes buffers: {', '.join(found.values['buffers'])}.")
    if said:
        return replace(row, state="flagged", text=" ".join([row.text, *said]))
    return row


def _binarization(found: Ran) -> CheckRow:
    """Count the tasks that the attack and random points solve (Zimmermann et al. 2022)."""
    name = "binarization"
    limit = 1 - UNSOLVED
    built = found.tensors["built"]
    n = int(built.sum())
    if not found.values["layer"]:
        text = "the model calls no linear layer whose input is a vector for each image."
        return CheckRow(name, None, limit, "not_applicable", text, "at least")
    if n < max(1, BUILT * len(built)):
        text = (
            f"only {n} of {len(built)} images gave a task: the points were rejected, or no linear "
            "layer separates them."
        )
        return CheckRow(name, None, limit, "not_run", text, "at least")
    failed = built & ~found.tensors["solved"]
    easy = int((built & found.tensors["random"]).sum())
    row = counted(name, int(failed.sum()), n, UNSOLVED, "tasks not solved", found.images(failed))
    said = (
        f"the attack solves {n - int(failed.sum())} of {n} tasks: to find an adversarial image "
        "that is known to exist."
    )
    state = row.state
    if low_of(easy, n) > BY_CHANCE:
        state = "flagged"
        said += f" Random points solve {easy}: the tasks are too easy to say anything."
    else:
        said += f" Random points solve {easy}."
    power = row.text.partition(". ")[2].partition(" Images:")[0].replace("images", "failures")
    said = f"{said} {power.replace('such image ', 'such failure ')}{named(found.images(failed))}"
    return CheckRow(name, 1 - (row.value or 0.0), limit, state, said, "at least")
