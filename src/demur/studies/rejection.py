"""Figures of classifiers that reject: the same for all studies."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final

import polars as pl
import torch

from demur import seeds
from demur.classifier import REJECT, Classifier
from demur.evaluation.plan import Outputs
from demur.evaluation.results import Curve, Measurement, Series
from demur.evaluation.scoring import Row
from demur.evaluation.shares import series, share
from demur.evaluation.tables import outcome_table
from demur.evaluation.thresholds import ACCEPTED, Moved
from demur.metrics import Rates
from demur.metrics import rejection as measures
from demur.studies.security import NEAR, counts

ALPHAS: Final = (0.0, 0.05, 0.1, 0.25, 0.5, 1.0)
NOISE: Final = 500

Thresholds = Mapping[str, Moved]
"""Evaluations at other thresholds, by false rejection rate ("0.05") or "accepted"."""


def noise_rejected(classifier: Classifier, shape: Sequence[int], seed: int) -> list[Row]:
    """Measure the share of images of uniform noise that are rejected (R21), for a `Measure`."""
    # The tag is an old name: another tag would draw other noise.
    noise = torch.rand(NOISE, *shape, generator=seeds.generator(seed, "strangers"))
    rejected = classifier.predict(noise) == REJECT
    return [Row("noise rejected", float(rejected.double().mean()), NOISE)]


def clean_rows(
    tests: pl.DataFrame, validated: pl.DataFrame, measurements: pl.DataFrame
) -> list[Measurement]:
    """Give the outcomes of clean images by model, accuracy where they are accepted, selective F1,
    and the shares of validation images and of noise that are rejected.
    """
    rows = outcome_table("", tests, group=None).rows
    for (name,), part in tests.group_by("model", maintain_order=True):
        model = str(name)
        found = counts(part)
        accepted = found.correct + found.wrong
        rows.append(share(model, "selective accuracy", [(found.correct, accepted)]))
        rows.append(Measurement(model, "selective F1", measured=found.selective_f1, n=found.n))
    for row in outcome_table("", validated, group=None, columns=["rejected"]).rows:
        rows.append(replace(row, column="rejected of validation"))
    noise = measurements.filter(pl.col("name") == "noise rejected")
    for model, value, n in noise.select("node", "value", "n").iter_rows():
        rows.append(share(model, "noise rejected", [(round(value * n), n)]))
    return rows


def gradient_rows(records: pl.DataFrame, group: str) -> list[Measurement]:
    """Give the share of zero gradients, and the gradients of each image, by model."""
    rows = []
    for (name,), spent in records.group_by("model", maintain_order=True):
        count = int(spent["backwards"].sum())
        n = spent["index"].n_unique()
        lost = 100 * int(spent["zero_gradients"].sum()) / max(1, count)
        rows.append(Measurement(str(name), "zero gradients", group, "%", measured=lost, n=count))
        each = count / n
        rows.append(Measurement(str(name), "gradients an image", group, measured=each, n=n))
    return rows


def at_thresholds(model: str, moved: Thresholds, outputs: Outputs) -> list[Measurement]:
    """Robust error where 99 % of the correct images are accepted (Stutz et al. 2020), and what is
    detected and broken at false rejection rates of 5 and 10 %.
    """
    parts = moved[ACCEPTED].records(outputs)
    given = [
        (part["class_margin"].to_torch() < 0, part["reject_margin"].to_torch()) for part in parts
    ]
    error = measures.robust_error(*given[0], *given[1], 0.0)
    known = None if math.isnan(error) else 100 * error
    column = "robust error at 99 % accepted"
    rows = [Measurement(model, column, unit="%", measured=known, n=len(parts[0]))]
    for rate in (0.05, 0.1):
        if f"{rate:g}" in moved:
            found = counts(moved[f"{rate:g}"].records(outputs)[1])
            for word, number in (("detected", found.rejected), ("broken", found.wrong)):
                column = f"{word} at {100 * rate:g} % false rejection"
                rows.append(share(model, column, [(number, found.n)]))
    return rows


def against_rejection(
    title: str, models: Mapping[str, Thresholds], label: str, outputs: Outputs, note: str = ""
) -> Curve:
    """Draw the outcomes of clean and attacked images against the false rejection rate.

    An attacked image that is accepted at a higher threshold counts as accepted at every lower one.
    """
    lines: list[Series] = []
    rates = sorted({float(name) for moved in models.values() for name in moved if name != ACCEPTED})
    for model, moved in models.items():
        clean: list[Rates] = []
        attacked: list[Rates] = []
        broken: list[int] = []
        for rate in reversed(rates):
            before, after = moved[f"{rate:g}"].records(outputs)
            wrong = (pl.col("outcome") == "wrong") | pl.col("index").is_in(broken)
            broken = after.filter(wrong)["index"].to_list()
            kept = counts(after.filter(~wrong))
            clean.insert(0, counts(before))
            attacked.insert(0, replace(kept, wrong=len(broken)))
        lines += [series(f"{model}, clean", clean), series(f"{model}, attacked", attacked)]
    return Curve(title, label, [round(100 * rate, 10) for rate in rates], lines, note)


def implied_accuracy(model: str, changes: pl.DataFrame, eps: float, column: str) -> Measurement:
    """Give the share of images that are correct when clean and not broken within eps: of a detector
    it implies an accuracy within half of that (Tramer 2022).
    """
    found = changes.filter(pl.col("model") == model)
    kept = (found["clean"] == "correct") & (found["wrong"] > eps * NEAR)
    return share(model, column, [(int(kept.sum()), len(kept))])


def near_rejections(model: str, changes: pl.DataFrame, eps: float) -> list[Measurement]:
    """Count rejections near the image as errors: R_eps(f, alpha) and the total robust loss of Chen
    et al. 2023, and the median size of a change to a rejection.
    """
    found = changes.filter(pl.col("model") == model)
    broken = (found["wrong"] <= eps * NEAR).to_torch()
    rejected_at = found["rejected"].to_torch()
    n = len(found)
    errors = measures.error_with_rejection(broken, rejected_at, eps, ALPHAS)
    rows = [
        share(model, f"alpha {alpha:g}", [(round(error * n), n)])
        for alpha, error in zip(ALPHAS, errors, strict=True)
    ]
    for power in (1, 2, 4):
        loss = measures.total_robust_loss(broken, rejected_at, measures.ramp_loss(eps, power))
        rows.append(Measurement(model, f"ramp loss, power {power}", measured=loss, n=n))
    median = float(rejected_at.median())
    known = None if math.isinf(median) else median
    note = "none for half of the images" if known is None else ""
    column = "median L2 to a rejection"
    return [*rows, Measurement(model, column, measured=known, n=n, note=note)]
