"""The files of an audit: results.json, records.parquet, report.html, counterexamples."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import polars as pl
import torch

from demur.commands.audit_baseline import beside
from demur.commands.audit_checked import Checked
from demur.commands.audit_run import AuditRun
from demur.commands.audit_subject import Subject, normalisation
from demur.data import ImageSet
from demur.evaluation import counterexamples
from demur.evaluation.audit_certified import CertifiedRow, certified_row, with_certificates
from demur.evaluation.audit_checks import verdict
from demur.evaluation.audit_counts import few_images
from demur.evaluation.audit_other import OtherInputs, corruption_rows, other_inputs
from demur.evaluation.audit_plan import Step
from demur.evaluation.audit_results import (
    SCHEMA,
    AuditResults,
    ThreatRow,
    curve_over_eps,
    curve_over_threshold,
    threat_row,
    within,
)
from demur.evaluation.audit_results import (
    write as write_results,
)
from demur.evaluation.audit_rows import ran
from demur.evaluation.keys import versions
from demur.evaluation.pictures import NORMS, describe, enlarged
from demur.evaluation.plan import Outputs
from demur.evaluation.records import PLACE, write_parquet
from demur.evaluation.results import Picture, write_gallery
from demur.files import digest
from demur.report.audit import render_audit
from demur.threat import ThreatModel

INFORMATION = ("batch size", "device", "evaluation mode", "input")
"""Points of the handshake that change no figure, however they end."""
PICTURES = 24
"""Of the gallery: the smallest changes."""


@dataclass(frozen=True)
class About:
    """What the report says of the run."""

    profile: str
    seed: int
    command: str
    device: str
    estimate: float
    seconds: float
    baseline: Path | None


def write(
    subject: Subject,
    run: AuditRun,
    outputs: Outputs,
    about: About,
    folder: Path,
) -> tuple[AuditResults, pl.DataFrame]:
    """Write all files of an audit."""
    done = [step for step in run.steps if outputs.complete(step.node)]
    missing = [*run.left, *(step for step in run.steps if step not in done)]
    records = outputs.records([step.node for step in done])
    rows = counterexamples.chosen(counterexamples.marked(records, done, outputs), done)
    rows = rows.with_columns(model=pl.lit(subject.name))
    counterexamples.save(rows, done, outputs, folder)
    _write_gallery(subject, rows, done, outputs, folder)
    checked = Checked.of(records, ran(run.tests, outputs), subject, run)
    # What a self-test broke is broken: it counts.
    records = pl.concat([records, *checked.attacked])
    proven, records = _certified(run, outputs, records)
    write_parquet(records, folder / "records.parquet")
    results = _results(subject, records, done, missing, checked, outputs, about)
    findings = results.findings
    if not all(outputs.complete(node) for node in run.proofs):
        findings = [*findings, "Not run, for lack of time: certificates."]
    others = _other_inputs(run, outputs)
    results = replace(results, findings=findings, other_inputs=others, certified=proven)
    write_results(results, folder)
    render_audit(folder)
    return results, records


def _certified(
    run: AuditRun, outputs: Outputs, records: pl.DataFrame
) -> tuple[list[CertifiedRow], pl.DataFrame]:
    """Make the rows of what is proven, and write it into the records of each threat."""
    rows = []
    marked = records
    for node in run.proofs:
        if not outputs.complete(node) or node.threat is None:
            continue  # the time was over
        found = [outputs.result(node, shard) for shard in range(node.shards)]
        broken = within(records, node.threat).filter(pl.col("outcome") == "wrong")
        row, *proven = certified_row(node, found, broken["index"].unique().to_list())
        rows.append(row)
        marked = with_certificates(marked, node.threat, *proven)
    return rows, marked


def _other_inputs(run: AuditRun, outputs: Outputs) -> OtherInputs | None:
    """Make the figures without an attack; None where the time was over."""
    if not all(outputs.complete(node) for node in (*run.answers, *run.corrupted)):
        return None
    found = [[outputs.result(node, shard) for shard in range(node.shards)] for node in run.answers]
    own, *ood = found
    name = "" if run.ood is None else run.ood.name
    figures = other_inputs(own, ood[0] if ood else [], name, run.seed)
    rows = [
        row
        for node in run.corrupted
        for row in corruption_rows(
            node.family, [outputs.result(node, shard) for shard in range(node.shards)]
        )
    ]
    return replace(figures, corruptions=rows)


def _results(
    subject: Subject,
    records: pl.DataFrame,
    done: Sequence[Step],
    missing: Sequence[Step],
    checked: Checked,
    outputs: Outputs,
    about: About,
) -> AuditResults:
    checks = checked.rows
    doubts = [*_doubts(subject, missing), *checked.doubts]
    said = [line for line in subject.handshake.lines if line.state == "note"]
    notes = [*subject.notes, *(line.text for line in said if line.name in INFORMATION)]
    findings = [line.text for line in said if line.name not in INFORMATION]
    threats = _threats(records, done, missing)
    findings += few_images(threats)
    findings += _of_the_run(done, missing, outputs)
    ensembles = _of_ensembles(done, outputs)
    findings += [text for text, bound in ensembles.items() if bound]
    notes += [text for text, bound in ensembles.items() if not bound]
    model: dict[str, Any] = {"name": subject.name, "source": subject.source}
    model["fingerprint"] = subject.fingerprint
    model["normalisation"] = normalisation(subject.classifier)
    data = {
        "name": subject.images.name,
        "source": subject.data_source,
        "fingerprint": subject.images.fingerprint,
        "images": len(subject.images),
    }
    costs = outputs.costs()
    cost = {
        "seconds": round(sum(one.seconds for one in costs), 3),
        "self_tests": round(checked.seconds, 3),
        "estimate": round(about.estimate, 3),
        "elapsed": round(about.seconds, 3),
        "steps": [asdict(one) for one in costs],
    }
    return AuditResults(
        schema=SCHEMA,
        verdict=verdict(checks, certain=not doubts),
        model=model,
        data=data,
        threats=threats,
        checks=checks,
        handshake=[asdict(line) for line in subject.handshake.lines],
        notes=notes,
        findings=findings,
        cost=cost,
        code=digest(*sorted(str(code) for code in records["code"].unique())),
        command=about.command,
        profile=about.profile,
        seed=about.seed,
        versions=versions(),
        device=about.device,
        curves=_curves(records, done),
        doubts=doubts,
        baseline=None if about.baseline is None else beside(records, done, about.baseline),
    )


def _of_the_run(done: Sequence[Step], missing: Sequence[Step], outputs: Outputs) -> list[str]:
    """Say what was not computed, what is old, and which threats have no limit."""
    parts = dict.fromkeys(step.part for step in missing)
    found = [f"Not run, for lack of time: {part}." for part in parts]
    if outputs.stale:
        found.append(
            f"{len(outputs.stale)} results were computed by an earlier version of the code "
            "(--reuse-stale)."
        )
    threats = dict.fromkeys(step.threat for step in [*done, *missing] if step.threat is not None)
    return found + without_eps(list(threats))


def without_eps(threats: Sequence[ThreatModel]) -> list[str]:
    """Say what a threat without an eps means, one sentence for each."""
    return [
        f"{one} has no eps, so every change is allowed and nearly every image breaks: read the "
        f"median smallest change, not the share of wrong answers. {one}:EPS limits the change."
        for one in threats
        if one.eps is None
    ]


def _doubts(subject: Subject, missing: Sequence[Step]) -> list[str]:
    """Say why the verdict cannot be "sound", whatever the self-tests say."""
    doubts = []
    if subject.guesses:
        doubts.append(
            "The clean accuracy is hardly above that of guessing. Check --mean, --std, --img-size "
            "and the order of the classes: attacks on such a model say little."
        )
    if not subject.gradients:
        doubts.append("The model gives only scores: attacks with gradients did not run.")
    if subject.handshake.randomised:
        doubts.append("The model is randomised.")
    if missing:
        doubts.append("Not all attacks of the plan ran.")
    return doubts


def _threats(
    records: pl.DataFrame, done: Sequence[Step], missing: Sequence[Step]
) -> list[ThreatRow]:
    rows = [threat_row(records, None)]
    both = [*done, *missing]
    for threat in dict.fromkeys(step.threat for step in both if step.threat is not None):
        left = any(step.threat == threat and step.part != "force reject" for step in missing)
        if any(step.threat == threat for step in done):
            rows.append(threat_row(records, threat, complete=not left))
    forced = [step.node.threat for step in done if step.part == "force reject"]
    return [*rows, *(threat_row(records, threat) for threat in forced if threat is not None)]


def _of_ensembles(done: Sequence[Step], outputs: Outputs) -> dict[str, float]:
    """Give what the ensembles say of themselves, once, each with the share that Square may still
    break of the images that it did not meet.
    """
    said: dict[str, float] = {}
    for step in done:
        if step.part in ("ensemble", "BPDA"):
            for shard in range(step.node.shards):
                values = outputs.result(step.node, shard).values
                if values.get("sampled"):
                    said[f"{step.threat}: {values['sampled']}"] = values.get("bound", 0.0)
    return said


def _curves(records: pl.DataFrame, done: Sequence[Step]) -> list[dict[str, Any]]:
    curves = []
    threats = list(dict.fromkeys(step.threat for step in done if step.threat is not None))
    norms = dict.fromkeys(threat.norm for threat in threats)
    for norm in norms:
        given = [one.eps for one in threats if one.norm == norm and isinstance(one.eps, float)]
        asked = {
            step.node.threat.eps
            for step in done
            if step.node.threat is not None and step.node.threat.norm == norm
        }
        sizes = sorted(
            {0.0, *(eps for eps in asked if isinstance(eps, float) and math.isfinite(eps))}
        )
        if given and len(sizes) > 1:
            curves.append(curve_over_eps(records, norm, sizes))
    clean = records.filter(pl.col("attack").is_null())
    shown = [("clean images", clean)]
    for threat in threats:
        # The row with the worst outcome stands for an image.
        worst = within(records, threat).sort("outcome", descending=True, maintain_order=True)
        shown.append((str(threat), worst.unique(list(PLACE), keep="first", maintain_order=True)))
    for name, rows in shown:
        curve = curve_over_threshold(rows)
        if curve is not None:
            curves.append({**curve, "at": name})
    return curves


def _write_gallery(
    subject: Subject,
    rows: pl.DataFrame,
    done: Sequence[Step],
    outputs: Outputs,
    folder: Path,
) -> None:
    """Draw the smallest changes that break an image, for each threat in turn."""
    place = pl.int_range(pl.len()).over("threat")
    size = pl.coalesce([pl.when(pl.col("norm") == norm).then(pl.col(norm)) for norm in NORMS])
    shown = rows.sort(size, maintain_order=True).with_columns(place=place)
    shown = shown.sort("place", maintain_order=True).head(PICTURES)
    if shown.is_empty():
        (folder / "gallery.safetensors").unlink(missing_ok=True)
        return
    original, attacked = counterexamples.images_of(shown, done, outputs)
    labels = torch.tensor(shown["label"].to_list(), dtype=torch.int64)
    clean = ImageSet(original, labels, subject.images.class_names, "shown")
    pictures: list[Picture] = []
    for number, row in enumerate(shown.iter_rows(named=True)):
        one = clean.subset([number])
        attack = str(row["by"] or row["attack"]).partition("(")[0]
        pictures += describe(
            subject.classifier,
            str(row["threat"]),
            attack,
            str(row["attacker"]),
            one,
            attacked[number : number + 1],
        )
    write_gallery(folder, pictures, enlarged(original), enlarged(attacked))
