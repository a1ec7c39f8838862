"""Other thresholds of the same classifier: set on clean images, attacked, and read from records."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl
from torch import Tensor

from demur.attacks.base import Attack
from demur.attacks.result import AttackResult
from demur.classifier import Classifier
from demur.data.images import ImageSet
from demur.evaluation.curves import offset_for, shifted
from demur.evaluation.nodes import ModelNode
from demur.evaluation.on_images import Evaluate
from demur.evaluation.plan import Outputs
from demur.evaluation.records import PLACE, SCHEMA
from demur.evaluation.scoring import Row
from demur.metrics.rejection import acceptance_threshold, confidences
from demur.threat import ThreatModel

ACCEPTED = "accepted"


@dataclass(frozen=True, repr=False)
class AtThreshold(Attack):
    """An attack on a classifier whose reject score is moved. Records of it hold the margins of the
    original classifier: `decided` gives the outcomes at the moved threshold.

    Parameters
    ----------
    attack : Attack
    offset : float
        Added to the reject score.
    """

    attack: Attack
    offset: float

    def __call__(
        self,
        classifier: Classifier,
        images: Tensor,
        labels: Tensor,
        threat: ThreatModel | str,
        **options: Any,
    ) -> AttackResult:
        """Attack the moved classifier; see `Attack.__call__`."""
        return self.attack(shifted(classifier, self.offset), images, labels, threat, **options)


def offsets(
    classifier: Classifier, validation: ImageSet, rates: Sequence[float], accepted: float
) -> list[Row]:
    """Find offsets of the reject score, on clean images (for a `Measure`).

    Parameters
    ----------
    classifier : Classifier
    validation : ImageSet
    rates : sequence of float
        False rejection rates. Each gives a row with the rate as its name.
    accepted : float
        Share of the correct images. The row "accepted" is the offset at which these are accepted.
    """
    clean = validation.to_float()
    rows = [Row(f"{rate:g}", offset_for(classifier, clean, rate), len(clean)) for rate in rates]
    confidence, classes = confidences(classifier, clean)
    right = classes == validation.labels
    threshold = acceptance_threshold(confidence.double(), right, accepted)
    # Slightly less: adding it to a float32 score rounds.
    threshold -= 1e-5 * max(1.0, abs(threshold))
    return [*rows, Row(ACCEPTED, threshold, len(clean))]


def decided(records: pl.DataFrame, offset: float) -> pl.DataFrame:
    """Decide records again with a moved reject score.

    Returns
    -------
    polars.DataFrame
        The records with another "reject_margin" and "outcome".

    Examples
    --------
    >>> rows = {"reject_margin": [0.1, 0.3], "class_margin": [0.5, -0.5]}
    >>> decided(pl.DataFrame(rows), 0.2)["outcome"].to_list()
    ['rejected', 'wrong']
    """
    margin = pl.col("reject_margin") - offset
    error = pl.col("class_margin").fill_nan(-math.inf) < 0
    answered = pl.when(error).then(pl.lit("wrong")).otherwise(pl.lit("correct"))
    outcome = pl.when(margin < 0).then(pl.lit("rejected")).otherwise(answered)
    return records.with_columns(reject_margin=margin, outcome=outcome.cast(SCHEMA["outcome"]))


@dataclass(frozen=True, eq=False)
class Moved:
    """Evaluations of a model with a moved reject score.

    Parameters
    ----------
    offset : float
    clean : Evaluate
    attacked : tuple of Evaluate
        On the same images, with attacks `AtThreshold`.
    """

    offset: float
    clean: Evaluate
    attacked: tuple[Evaluate, ...]

    @property
    def nodes(self) -> tuple[Evaluate, ...]:
        """All evaluations."""
        return (self.clean, *self.attacked)

    def records(self, outputs: Outputs) -> tuple[pl.DataFrame, pl.DataFrame]:
        """Give the records of the clean and of the attacked images, in the same order.

        Of several attacks the first success counts, else what the first attack sent.
        """
        clean = decided(outputs.records([self.clean]), self.offset)
        tried = decided(outputs.records(self.attacked), self.offset)
        failed = pl.col("outcome") != "wrong"
        attacked = tried.sort(failed, maintain_order=True).unique(PLACE, keep="first")
        return clean.sort("index"), attacked.sort("index")


def moved(
    model: ModelNode,
    images: ImageSet,
    rows: Iterable[Row],
    attacks: Sequence[Attack],
    threat: ThreatModel,
    seed: int,
) -> dict[str, Moved]:
    """Make evaluations at the thresholds of the rows of `offsets`, by their names. Their records
    have the split "thresholds".
    """
    found = {}
    for row in rows:
        offset = float(row.value or 0)
        attacked = (
            Evaluate(
                model,
                images,
                threat,
                AtThreshold(attack, offset),
                seed=seed,
                attacker="defence-aware",
                split="thresholds",
            )
            for attack in attacks
        )
        clean = Evaluate(model, images, None, seed=seed, split="thresholds")
        found[row.name] = Moved(offset, clean, tuple(attacked))
    return found
